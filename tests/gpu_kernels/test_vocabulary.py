"""gpu_kernels exports what cpu_kernels does, with the same parameters."""

from __future__ import annotations

import inspect
from types import ModuleType

import pytest

import cpu_kernels
import gpu_kernels

ONLY_ON_GPU = {"DryRun", "GpuError", "Queue", "arrays", "can_stream", "device", "experts_streamed", "upload"}


def exported(package: ModuleType) -> set[str]:
    source = inspect.getsource(package)
    return {line.split(" as ")[1] for line in source.splitlines() if line.startswith("from .") and " as " in line}


def parameters(function: object) -> list[tuple[str, object, object]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


OPS = sorted((exported(cpu_kernels) & exported(gpu_kernels)) - {"Run", "Cancelled", "prepare", "roofline"})


def test_the_card_s_vocabulary_is_the_cpu_s_and_what_is_listed() -> None:
    assert exported(cpu_kernels) <= exported(gpu_kernels)
    assert exported(gpu_kernels) - exported(cpu_kernels) == ONLY_ON_GPU


@pytest.mark.parametrize("name", OPS)
def test_an_op_has_the_same_parameters_on_both(name: str) -> None:
    gpu, cpu = getattr(gpu_kernels, name), getattr(cpu_kernels, name)
    assert parameters(gpu) == parameters(cpu)
    assert next(iter(inspect.signature(gpu).parameters)) == "run"


def test_a_run_is_used_in_the_same_way_on_both() -> None:
    assert parameters(gpu_kernels.prepare) == parameters(cpu_kernels.prepare)
    for name in ("limits", "attention_kinds", "matmul_kind"):
        assert parameters(getattr(gpu_kernels.roofline, name)) == parameters(getattr(cpu_kernels.roofline, name))
    for name in ("take", "replay", "sync", "profile"):
        assert parameters(getattr(gpu_kernels.Run, name)) == parameters(getattr(cpu_kernels.Run, name))


def test_arrays_of_the_host_have_the_names_and_parameters_of_the_card_s() -> None:
    from engine import host

    for name in ("zeros", "mirror", "layers", "upload", "put", "get", "move", "release"):
        assert parameters(getattr(gpu_kernels.arrays, name)) == parameters(getattr(host, name))
    for name in ("send", "fetch", "first"):
        assert parameters(getattr(gpu_kernels.arrays.Mirror, name)) == parameters(getattr(host.Mirror, name))


def test_names_of_cache_types_and_layouts_are_the_engine_s() -> None:
    from engine.k_cache import TYPES_K
    from gpu_kernels import k_cache

    assert k_cache.TYPES_K == TYPES_K
