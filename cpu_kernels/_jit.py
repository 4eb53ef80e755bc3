"""@kernel: the one place where Numba's options, the disk cache and the loading of compiled code are decided.

A kernel is a *factory*: a function of plain constants (its specialisation) that returns the body to compile.

    @kernel
    def scale_rows(accumulate):                              # part of the cache key
        from .simd import bc, ld, st                         # here, not at the top: see below
        def body(tile, scratch, x, out, n, factor: f32):     # addresses and sizes are int64, f32 is a float
            ...
        return body

    run.launch(scale_rows(accumulate=True), n_tiles, (x, out, n, 0.5))

`scale_rows(accumulate=True)` is a Code: it costs nothing until its `address` is asked for. Then the object file
comes from the disk cache and is loaded by llvmlite alone, or the body is compiled by Numba and kept. So a warm start
never imports Numba (0.4 s), as long as no module imports it, or `simd`, at its top.

A body gets the index of its tile, the address of its thread's scratch (SCRATCH_BYTES), and its arguments. It takes
no arrays, allocates nothing and cannot raise: there are no bounds checks, so wrappers validate before they launch.
Compiled code has the ABI of a Numba function: int32 f(void *ret, void **exc, int64 args, int64 tile, int64 scratch).

A first start compiles in several processes: compiling.py.

The cache lives in the user's cache folder (KONLY_CACHE_DIR overrides), one folder per key: the content of all of
cpu_kernels/, the versions of Numba and llvmlite, the CPU's name and features. Files are written beside and renamed,
so two processes may compile at once; a folder that cannot be written costs a compilation per process, nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import os
import signal
import struct
import sys
import tempfile
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import llvmlite.binding as llvm

from .isa import CPU_FEATURES, CPU_NAME

f32 = "f32"  # annotates a float parameter of a body; by name, so that it reads the same with postponed annotations
MAGIC = b"konlyobj"
SCRATCH_BYTES = 2 << 20  # per thread
OPTIONS: dict[str, Any] = {
    "error_model": "numpy",  # no exceptions, so no Python symbols in the object file
    "boundscheck": False,
    "fastmath": {"reassoc", "contract"},  # never nnan or ninf: masks are -inf
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}

Origin = tuple[str, str, dict[str, Any]]

_lock = threading.RLock()
_engines: list[Any] = []  # MCJIT engines own the machine code; one per object, since symbols of two may be equal


class Code:
    """One specialisation of a kernel: compiled, or loaded from the cache, when `address` is first asked for."""

    def __init__(self, name: str, build: Callable[[], Callable[..., None]], origin: Origin | None = None):
        self.name = name
        self.origin = origin  # module, factory and constants, if another process can make it from these
        self._build = build
        self._address = 0

    @property
    def loaded(self) -> bool:
        return self._address != 0

    @property
    def address(self) -> int:
        if not self._address:
            with _lock:
                if not self._address:
                    found = _read(self.name)
                    if found is None:
                        found = self.compile()
                        _write(self.name, *found)
                    self._address = _link(*found)
        return self._address

    def load_cached(self) -> bool:
        """Load it from the disk cache, if that has it whole."""
        with _lock:
            if not self._address and (found := _read(self.name)):
                self._address = _link(*found)
        return self.loaded

    def compile(self) -> tuple[str, bytes]:
        """(symbol, object file), neither kept nor loaded."""
        return _compile(self._build())

    def adopt(self, symbol: str, code: bytes) -> None:
        """Keep and load what another process has compiled."""
        _write(self.name, symbol, code)
        with _lock:
            if not self._address:
                self._address = _link(symbol, code)

    def assembly(self) -> str:
        """What the compiler emitted, for tests that look at instructions."""
        return _dispatcher(self._build()).inspect_asm().popitem()[1]


def kernel(factory: Callable[..., Callable[..., None]]) -> Callable[..., Code]:
    """Turn a factory of kernel bodies into a factory of Codes; equal constants give the same Code."""
    base = f"{factory.__module__.removeprefix(__package__ + '.')}.{factory.__name__}"
    codes: dict[tuple[tuple[str, Any], ...], Code] = {}

    @functools.wraps(factory)
    def code(**spec: Any) -> Code:
        key = tuple(sorted(spec.items()))
        if key not in codes:
            name = "-".join([base] + [f"{k}={v}" for k, v in key])
            plain = all(isinstance(v, int | str) for v in spec.values()) and "<" not in factory.__qualname__
            origin = (factory.__module__, factory.__name__, spec) if plain else None
            codes[key] = Code(name, lambda: factory(**spec), origin)
        return codes[key]

    return code


def load(codes: Iterable[Code], progress: Callable[[int, int, str], None] | None = None) -> int:
    """Load every code, what the disk cache has first; returns how many had to be compiled.

    progress(done, total, name) is called before each compilation here, and once at the end, with total = those to
    compile; if there are many, other processes compile some of them.
    """
    to_compile = [c for c in dict.fromkeys(codes) if not c.loaded and not c.load_cached()]
    if not to_compile:
        return 0
    from .compiling import helped

    total, queue = len(to_compile), deque(to_compile)
    with helped(queue) as elsewhere:
        while queue:
            try:
                code = queue.popleft()
            except IndexError:  # a helper was quicker
                break
            if progress:
                progress(total - len(queue) - 1, total, code.name)
            _ = code.address
    for code, found in elsewhere.items():
        code.adopt(*found)
    for code in to_compile:  # what a helper took and did not bring back
        _ = code.address
    if progress:
        progress(total, total, "")
    return total


# ------------------------------------------------------------------------------------------------ compile and link


def _dispatcher(body: Callable[..., None]) -> Any:
    from numba import njit, types

    from .simd import unpack

    parameters = list(inspect.signature(body).parameters.values())[2:]
    arguments = unpack(["f32" if p.annotation == f32 else "i64" for p in parameters])
    inner = njit(**OPTIONS)(body)

    def entry(args, tile, scratch):
        inner(tile, scratch, *arguments(args))

    return njit(types.void(types.intp, types.intp, types.intp), **OPTIONS)(entry)


def _compile(body: Callable[..., None]) -> tuple[str, bytes]:
    """(symbol, object file) of a body."""
    with _whole():
        compiled = next(iter(_dispatcher(body).overloads.values()))
        _, _, (code, _) = compiled.library.serialize_using_object_code()
        return compiled.fndesc.llvm_func_name, code


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: in a callback of LLVM's it would be printed and lost."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda *what: came.append(what))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])


@functools.cache
def _target() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple()


def _link(symbol: str, code: bytes) -> int:
    machine = _target().create_target_machine(codemodel="jitdefault", jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    address = engine.get_function_address(symbol)
    assert address, f"{symbol} is not in its object file"
    _engines.append(engine)
    return int(address)


# --------------------------------------------------------------------------------------------------- the disk cache


@functools.cache
def cache_key() -> str:
    """Hash of everything that compiled code depends on."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    for part in (version("numba"), version("llvmlite"), sys.platform, CPU_NAME, CPU_FEATURES):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:20]


@functools.cache
def cache_dir() -> Path:
    """Folder of this key's object files; it may not exist. OSError for a user without a home and without another."""
    if folder := os.environ.get("KONLY_CACHE_DIR"):
        base = Path(folder)
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or _home() / "AppData/Local") / "konly"
    elif sys.platform == "darwin":
        base = _home() / "Library/Caches/konly"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache") / "konly"
    return base / cache_key()


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:  # a container that runs under a number without a name
        raise OSError(str(error)) from None


def _read(name: str) -> tuple[str, bytes] | None:
    """(symbol, object file), or None if the cache has none or a damaged one."""
    try:
        data = (cache_dir() / f"{name}.o").read_bytes()
    except OSError:
        return None
    head = len(MAGIC) + 32
    if data[: len(MAGIC)] != MAGIC or hashlib.sha256(data[head:]).digest() != data[len(MAGIC) : head]:
        return None
    (n,) = struct.unpack_from("<I", data, head)
    return data[head + 4 : head + 4 + n].decode(), data[head + 4 + n :]


def _write(name: str, symbol: str, code: bytes) -> None:
    payload = struct.pack("<I", len(symbol)) + symbol.encode() + code
    temporary = None
    try:
        path = cache_dir() / f"{name}.o"
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
        with os.fdopen(descriptor, "wb") as file:
            file.write(MAGIC + hashlib.sha256(payload).digest() + payload)
        os.replace(temporary, path)
    except OSError as error:  # read-only home, full disk: this process has the code, the next one compiles again
        _warn_once(f"{error}")
        if temporary is not None:
            try:
                os.unlink(temporary)
            except OSError:
                pass


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"compiled kernels cannot be kept, so the next start compiles them again ({reason});"
        " KONLY_CACHE_DIR may name another folder",
        stacklevel=2,
    )
