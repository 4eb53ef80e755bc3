"""Kernels on the CPU: a Run that takes the place of gpu_kernels.stream.Run, over g++ and shim.h.

A .cu file is built once, under all the defines that its tests name, each in a namespace of its own.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpu_kernels import _compile
from gpu_kernels._compile import Kernel
from gpu_kernels.device import CARDS, Limits
from gpu_kernels.stream import Call, Cancelled, Copy, Feed, Queue, Tape

HERE = Path(__file__).parent
FLAGS = ("-O1", "-std=c++17", "-shared", "-fPIC", "-w", "-U_FORTIFY_SOURCE", "-fno-strict-aliasing")
Defines = tuple[tuple[str, int], ...]

_known: dict[str, list[Defines]] = {}


def instances(kernels: Iterable[Kernel]) -> None:
    """Kernels that tests are going to launch: what is not named before the first launch costs another build."""
    for k in kernels:
        known = _known.setdefault(k.file, [])
        if k.defines not in known:
            known.append(k.defines)


def require_compiler() -> str:
    if sys.platform != "linux":
        pytest.skip("the shim's fibers are tried on Linux only")
    compiler = shutil.which("g++")
    if compiler is None:
        if os.environ.get("CI"):
            pytest.fail("g++ is missing, and CI is set")
        pytest.skip("g++ is missing")
    return compiler


def text(file: str, units: Sequence[Defines]) -> str:
    """One C++ source with every unit; call(unit, kernel, …) launches, by numbers."""
    parts = ['#include "shim.h"']
    names = _compile.kernel_names(file)
    for i, defines in enumerate(units):
        parts += [f"namespace unit{i} {{", _compile.source(file, defines), "}", *(f"#undef {n}" for n, _ in defines)]
    table = ", ".join(f"[](void** a) {{ shim::call(unit{i}::{n}, a); }}" for i in range(len(units)) for n in names)
    counts = ", ".join(f"shim::arity(unit{i}::{n})" for i in range(len(units)) for n in names)
    parts.append(
        f"""
static void (*const table[])(void**) = {{{table}}};
static std::string error;
extern "C" const char* last_error() {{ return error.c_str(); }}
extern "C" int arity(int i) {{ const int counts[] = {{{counts}}}; return counts[i]; }}
extern "C" int launch(int i, void** args, unsigned x, unsigned y, int threads, size_t shared, int order) {{
  try {{ shim::launch({{x, y, 1}}, threads, shared, order, [=] {{ table[i](args); }}); return 0; }}
  catch (const std::exception& e) {{ error = e.what(); return 1; }}
}}"""
    )
    return "\n".join(parts)


@functools.cache
def library(file: str, units: tuple[Defines, ...]) -> Any:
    compiler = require_compiler()
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder) / "unit.cpp", Path(folder) / "unit.so"
        source.write_text(text(file, units), encoding="utf-8")
        extra = os.environ.get("KONLY_SHIM_FLAGS", "").split()
        command = [compiler, *FLAGS, *extra, f"-I{HERE}", str(source), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{file}: g++ failed\n{done.stderr[:4000]}"
        lib = ctypes.CDLL(str(built))
    lib.last_error.restype = ctypes.c_char_p
    return lib


class ShimRun(Queue):
    """As gpu_kernels.stream.Run, on NumPy arrays. order: in which threads run, see shim.h.

    at_once: a launch is executed, not queued.
    """

    def __init__(self, order: int = 0, limits: Limits = CARDS[90], at_once: bool = True):
        super().__init__(limits, 1)
        self.order, self.at_once = order, at_once
        self.launched: list[tuple[Kernel, tuple[int, ...], int, int]] = []

    def launch(self, *args: Any) -> None:
        super().launch(*args)
        if self.at_once:
            self.sync()

    def feed(self, *args: Any) -> None:
        super().feed(*args)
        if self.at_once:
            self.sync()

    def replay(self, tape: Tape, tell: object = None) -> None:
        for job in tape.jobs:
            if self.cancel[0]:
                raise Cancelled
            if isinstance(job, Call):
                job.function()
            elif isinstance(job, Feed):
                job.fill(job.pinned)
                job.to[:] = job.pinned
            elif isinstance(job, Copy):
                job.to.reshape(-1).view(np.uint8)[:] = job.start.reshape(-1).view(np.uint8)
            else:
                self._launch(job.kernel, job.grid, job.threads, job.shared, job.args)

    def _launch(self, kernel: Kernel, grid: tuple[int, ...], threads: int, shared: int, args: Sequence[Any]) -> None:
        assert 0 < threads <= 1024 and shared <= self.limits.shared_per_block
        assert grid[0] > 0 and all(0 < n <= 65535 for n in grid[1:]) and len(grid) <= 2
        instances([kernel])
        units = tuple(_known[kernel.file])
        lib = library(kernel.file, units)
        names = _compile.kernel_names(kernel.file)
        index = units.index(kernel.defines) * len(names) + names.index(kernel.name)
        assert lib.arity(index) == len(args), f"{kernel.name} takes {lib.arity(index)} arguments, got {len(args)}"
        values = [_value(arg) for arg in args]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        x, y = (*grid, 1)[:2]
        self.launched.append((kernel, grid, threads, shared))
        if lib.launch(index, pointers, x, y, threads, ctypes.c_size_t(shared), self.order):
            raise AssertionError(f"{kernel.name}: {lib.last_error().decode()}")

    def workspace(self, nbytes: int) -> np.ndarray:
        return self.empty(nbytes)  # a new one for each op, of NaN: no op reads what another left

    def empty(self, nbytes: int) -> np.ndarray:
        memory = np.full(nbytes + 256, 0xFF, np.uint8)
        start = -memory.ctypes.data % 256
        return memory[start : start + nbytes]

    def pinned(self, nbytes: int) -> np.ndarray:
        return self.empty(nbytes)

    def put(self, to: np.ndarray, values: np.ndarray) -> None:
        to[...] = values

    def upload(self, a: np.ndarray) -> np.ndarray:
        return a.copy()


def _value(arg: Any) -> Any:
    if arg is None:
        return ctypes.c_void_p(0)
    if isinstance(arg, np.int64):
        return ctypes.c_int64(int(arg))
    if isinstance(arg, int):
        return ctypes.c_int32(arg)
    if isinstance(arg, float):
        return ctypes.c_float(arg)
    return ctypes.c_void_p(arg.ctypes.data)
