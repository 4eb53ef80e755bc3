"""From a .cu file to code: one string of source, compiled when a kernel is first used.

    file.cu + its headers, put in their places + #defines   ──►   source()   ──►   CuPy's RawModule    (to run)
                                                                             ├─►   _cubin.py           (to run, sm_90a)
                                                                             └─►   compile_only()      (to check)

Headers are put into the text because CuPy's disk cache goes by the text and the options alone: with #include, a changed
header would leave old code in use. All sizes are defines, so a kernel has plain C names and is compiled for one layout.

compile_only needs NVIDIA's compiler library (the wheel nvidia-cuda-nvrtc) but neither CuPy, nor a driver, nor headers.
"""

from __future__ import annotations

import ctypes
import functools
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import _cubin

CUDA = Path(__file__).parent / "cuda"
OPTIONS, FLUSHES = ("--std=c++17",), "-ftz=true"  # the second is put in by CuPy
LOSS = "Potential Performance Loss"  # a warning of ptxas
STATIC_SHARED = 48 << 10  # what a block may take without asking
ARCHITECTURES = {"mla_decode_wgmma.cu": (90, "90a")}  # files for one alone: the card's sm, and what it is called
BEGIN = re.compile(r"^KERNEL\([^()]*?(\w+)\)\([^{]*?\{$", flags=re.M)  # of a kernel, to the brace of its body


@dataclass(frozen=True)
class Kernel:
    """A kernel of a .cu file under some defines. Cheap: nothing is read or compiled until it is launched."""

    file: str
    name: str
    defines: tuple[tuple[str, int], ...] = ()

    @property
    def unit(self) -> tuple[str, tuple[tuple[str, int], ...]]:
        """What is compiled at once: the file and its defines."""
        return self.file, self.defines

    @property
    def is_loaded(self) -> bool:
        return self in _loaded

    def function(self, shared: int) -> int:
        """The driver's handle, compiled by now, of a kernel that may take so many bytes of dynamic shared memory."""
        if self not in _loaded:
            _loaded[self] = _module(self).get_function(self.name), STATIC_SHARED
        function, granted = _loaded[self]
        if shared > granted:
            function.max_dynamic_shared_size_bytes = shared
            _loaded[self] = function, shared
        return int(function.kernel.ptr)


def kernel(file: str, name: str, defines: Mapping[str, int] | None = None) -> Kernel:
    return Kernel(file, name, tuple(sorted((defines or {}).items())))


_loaded: dict[Kernel, tuple[Any, int]] = {}  # CuPy's function, and the shared memory that it has been granted
_modules: dict[tuple[str, tuple[tuple[str, int], ...]], Any] = {}


def _module(k: Kernel) -> Any:
    import cupy

    if k.unit not in _modules:
        text = source(*k.unit)
        if k.file in ARCHITECTURES:
            _, arch = ARCHITECTURES[k.file]
            _modules[k.unit] = _cubin.Module(text, (f"-arch=sm_{arch}", FLUSHES, *OPTIONS))
        else:
            _modules[k.unit] = cupy.RawModule(code=text, options=OPTIONS)
    return _modules[k.unit]


def source(file: str, defines: Iterable[tuple[str, int]] = ()) -> str:
    """The whole text that is compiled: defines, then the file with its headers in it.

    Every kernel begins with AFTER_PREVIOUS (driver.py): that is put in here, so that none can do without it.
    """
    lines = [f"#define {name} {int(value)}" for name, value in defines]
    return "\n".join([*lines, BEGIN.sub(r"\g<0>\n  AFTER_PREVIOUS;", with_headers(file))])


@functools.cache
def with_headers(file: str) -> str:
    """The text of a file under cuda/; each `#include "x.cuh"` is replaced by that file, the first time it is met."""
    seen: set[str] = set()

    def text(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        return re.sub(r'^#include "([\w.]+)"$', lambda m: text(m[1]), (CUDA / name).read_text("utf-8"), flags=re.M)

    return text(file)


def arch_of(file: str, sm: int) -> str:
    """What a file is compiled for, for a card: "90", or "90a" where it has instructions of that architecture alone."""
    only, name = ARCHITECTURES.get(file, (sm, str(sm)))
    if only != sm:
        raise ValueError(f"{file} is for sm_{name} only, not for sm_{sm}")
    return name


def kernel_names(file: str) -> list[str]:
    """The kernels that a .cu file has."""
    return BEGIN.findall(with_headers(file))


# --------------------------------------------------------------------------------------------------------- to check


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes: registers a thread, bytes of stack and of spills, static shared memory."""

    registers: int
    stack: int
    spills: int
    shared: int


def compile_only(file: str, defines: Iterable[tuple[str, int]], arch: int) -> dict[str, Usage]:
    """Each kernel's usage for an architecture such as 90, by ptxas's report. ValueError with the log if it fails."""
    text, target = source(file, defines).encode(), f"-arch=sm_{arch_of(file, arch)}"
    lib = nvrtc()
    program = ctypes.c_void_p()

    def log() -> str:
        n = ctypes.c_size_t()
        lib.nvrtcGetProgramLogSize(program, ctypes.byref(n))
        buffer = ctypes.create_string_buffer(n.value)
        lib.nvrtcGetProgramLog(program, buffer)
        return buffer.value.decode()

    if lib.nvrtcCreateProgram(ctypes.byref(program), text, file.encode(), 0, None, None):
        raise ValueError(f"{file}: nvrtcCreateProgram failed")
    try:
        options = [o.encode() for o in (target, "--ptxas-options=-v", FLUSHES, *OPTIONS, *_no_cache())]
        if lib.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)):
            raise ValueError(f"{file} for sm_{arch} with {dict(defines)}:\n{log()}")
        if LOSS in log():  # such as wgmma one by one
            raise ValueError(f"{file} for sm_{arch} with {dict(defines)} is slower than need be:\n{log()}")
        return _usages(log())
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def _no_cache() -> tuple[str, ...]:
    """From 13 on, beside a driver, the library remembers what it compiled, and has no report on it."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return ("--no-cache",) if major.value >= 13 else ()


def _usages(log: str) -> dict[str, Usage]:
    found: dict[str, Usage] = {}
    name, stack, spills = "", 0, 0
    for line in log.splitlines():
        if m := re.search(r"Compiling entry function '(\S+)'", line):
            name, stack, spills = m[1], 0, 0
        elif m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, spills = int(m[1]), int(m[2]) + int(m[3])
        elif m := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            found[name] = Usage(int(m[1]), stack, spills, int(shared[1]) if shared else 0)
    return found


@functools.cache
def nvrtc() -> Any:
    """NVIDIA's runtime compiler, from its wheel or the system; OSError if there is none."""
    folders = [Path(p) / "nvidia" for p in sys.path]
    found = [lib for f in folders for lib in sorted(f.glob("*/lib/libnvrtc.so.1[0-9]"), reverse=True)]
    for path in [*found, Path("libnvrtc.so.13"), Path("libnvrtc.so.12")]:
        try:
            for builtins in path.parent.glob("libnvrtc-builtins.so*"):
                ctypes.CDLL(str(builtins))  # the library finds it by its name, once it is loaded
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    raise OSError("no libnvrtc; pip install nvidia-cuda-nvrtc")
