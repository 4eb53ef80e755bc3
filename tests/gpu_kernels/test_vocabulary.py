"""gpu_kernels exports what cpu_kernels does, with the same parameters; what is still missing is named here."""

from __future__ import annotations

import inspect
from types import ModuleType

import pytest

import cpu_kernels
import gpu_kernels

MISSING = {
    "Cancelled",  # a GPU step is short; cancelling between launches is to come
    "prepare",  # compiling ahead of the first step
    "roofline",
}
ONLY_ON_GPU = {"GpuError", "device", "upload"}


def exported(package: ModuleType) -> set[str]:
    source = inspect.getsource(package)
    return {line.split(" as ")[1] for line in source.splitlines() if line.startswith("from .") and " as " in line}


def parameters(function: object) -> list[tuple[str, object, object]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


OPS = sorted((exported(cpu_kernels) & exported(gpu_kernels)) - {"Run"})


def test_what_is_missing_is_what_is_listed() -> None:
    assert exported(cpu_kernels) - exported(gpu_kernels) == MISSING
    assert exported(gpu_kernels) - exported(cpu_kernels) == ONLY_ON_GPU


@pytest.mark.parametrize("name", OPS)
def test_an_op_has_the_same_parameters_on_both(name: str) -> None:
    gpu, cpu = getattr(gpu_kernels, name), getattr(cpu_kernels, name)
    assert parameters(gpu) == parameters(cpu)
    assert next(iter(inspect.signature(gpu).parameters)) == "run"


def test_names_of_cache_types_and_layouts_are_the_engine_s() -> None:
    from engine.k_cache import TYPES_K
    from gpu_kernels import k_cache

    assert k_cache.TYPES_K == TYPES_K
