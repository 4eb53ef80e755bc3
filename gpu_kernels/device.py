"""The card: whether there is one that we can use, and what it can hold.

check() says in one sentence what is missing. Limits decide which variant of a kernel runs; they are plain numbers, so
the choice is a pure function that is tested for every card below.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

WHEELS = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x", "cupy-rocm-5-0", "cupy-rocm-6-0", "cupy-rocm-7-0")
EXTRAS = 'pip install "konly[cuda13]" (drivers from 580 on) or "konly[cuda12]"'
OLDEST = 75  # Turing: ldmatrix, and mma of f16


class GpuError(RuntimeError):
    """No GPU that can be used; one sentence that says why and what to do."""


@dataclass(frozen=True)
class Limits:
    """What kernels are chosen by. Shared memory in bytes: what a block may ask for, what all blocks of an SM have."""

    name: str
    sm: int  # 90 for compute capability 9.0
    n_sm: int
    shared_per_block: int
    shared_per_sm: int

    @property
    def has_bf16(self) -> bool:
        return self.sm >= 80


# Source: NVIDIA, CUDA C++ programming guide, technical specifications by compute capability. n_sm of a usual card.
CARDS = {
    limits.sm: limits
    for limits in (
        Limits("T4", 75, 40, 64 << 10, 64 << 10),
        Limits("A100", 80, 108, 163 << 10, 164 << 10),
        Limits("RTX 3090", 86, 82, 99 << 10, 100 << 10),
        Limits("RTX 4090", 89, 128, 99 << 10, 100 << 10),
        Limits("H100", 90, 132, 227 << 10, 228 << 10),
        Limits("B200", 100, 148, 227 << 10, 228 << 10),
        Limits("RTX 5090", 120, 170, 99 << 10, 100 << 10),
    )
}


def _import_cupy() -> Any:
    import cupy

    return cupy


def _installed() -> list[str]:
    found = []
    for wheel in WHEELS:
        try:
            found.append(f"{wheel} {importlib.metadata.version(wheel)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def check(installed: Callable[[], list[str]] = _installed, import_cupy: Callable[[], Any] = _import_cupy) -> Limits:
    """The limits of the current device. GpuError, one sentence, if there is none that can be used.

    The arguments stand for this machine in tests.
    """
    wheels = installed()
    if len(wheels) > 1:
        raise GpuError(f"{' and '.join(wheels)} are both installed, and break each other; uninstall all, then {EXTRAS}")
    try:
        cupy = import_cupy()
    except ImportError as error:
        if wheels:
            raise GpuError(f"{wheels[0]} is installed, but cannot be imported ({_line(error)}); {EXTRAS}") from None
        raise GpuError(f"CuPy is not installed; {EXTRAS}") from None
    try:
        n_devices = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CUDARuntimeError; its class is CuPy's own
        raise GpuError(f"CuPy found no device ({_line(error)}); install or update NVIDIA's driver") from None
    if not n_devices:
        raise GpuError("CuPy found no device; check CUDA_VISIBLE_DEVICES, and nvidia-smi")
    try:
        cupy.cuda.nvrtc.getVersion()
    except Exception as error:  # DynamicLibNotFoundError of another package
        raise GpuError(f"CuPy found no NVRTC, which compiles kernels ({_line(error)}); {EXTRAS}") from None
    limits = _limits(cupy)
    if limits.sm < OLDEST:
        have, need = (f"{sm // 10}.{sm % 10}" for sm in (limits.sm, OLDEST))
        raise GpuError(f"{limits.name} has compute capability {have}; expected {need} (Turing) or newer; use the CPU")
    return limits


@functools.cache
def limits() -> Limits:
    """check()'s, asked for once."""
    return check()


def _limits(cupy: Any) -> Limits:
    device = cupy.cuda.Device()
    attributes = device.attributes
    name = cupy.cuda.runtime.getDeviceProperties(device.id)["name"]
    return Limits(
        name.decode() if isinstance(name, bytes) else name,
        int(device.compute_capability),
        attributes["MultiProcessorCount"],
        attributes["MaxSharedMemoryPerBlockOptin"],
        attributes["MaxSharedMemoryPerMultiprocessor"],
    )


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
