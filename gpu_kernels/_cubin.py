"""Code for one architecture alone, such as sm_90a: CuPy's RawModule cannot ask for that, so NVRTC is asked here.

What it gives is kept in CuPy's folder of compiled kernels (CUPY_CACHE_DIR), under a name of the text, the options and
the compiler's version, and each file begins with a hash of the rest: as CuPy's own, a damaged one is compiled anew, and
where nothing can be written, every process compiles (a second).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MAX_DYNAMIC_SHARED = 8  # CUfunction_attribute


class Module:
    """As much of CuPy's RawModule as _compile.py uses."""

    def __init__(self, text: str, options: Sequence[str]):
        import cupy

        self._module = cupy.cuda.function.Module()
        self._module.load(cubin(text, options, cupy.cuda.nvrtc))

    def get_function(self, name: str) -> Function:
        return Function(self._module.get_function(name))


class Function:
    """As much of CuPy's RawKernel: kernel.ptr, and one attribute to set."""

    def __init__(self, kernel: Any):
        self.kernel = kernel

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "max_dynamic_shared_size_bytes":
            import cupy

            cupy.cuda.driver.funcSetAttribute(self.kernel.ptr, MAX_DYNAMIC_SHARED, value)
        else:
            super().__setattr__(name, value)


def cubin(text: str, options: Sequence[str], nvrtc: Any) -> bytes:
    """From the disk, or compiled and put there. nvrtc: CuPy's."""
    key = hashlib.sha256(repr((text, tuple(options), nvrtc.getVersion())).encode()).hexdigest()
    return kept(folder() / f"konly-{key}.cubin", lambda: _compiled(text, options, nvrtc))


def folder() -> Path:
    return Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")


def kept(path: Path, make: Callable[[], bytes]) -> bytes:
    """What make() gave before, in whatever process, and is in the file; else what it gives, put there if it can be."""
    with contextlib.suppress(OSError):
        data = path.read_bytes()
        if hashlib.sha256(data[32:]).digest() == data[:32]:
            return data[32:]
    content = make()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(content).digest() + content)
        os.replace(file.name, path)  # so that nobody reads half a file
    return content


def _compiled(text: str, options: Sequence[str], nvrtc: Any) -> bytes:
    program = nvrtc.createProgram(text, "kernel.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
        return bytes(nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"NVRTC failed ({error}):\n{nvrtc.getProgramLog(program)}") from None
    finally:
        nvrtc.destroyProgram(program)
