"""Other processes that compile some of the kernels of a first start.

Numba compiles one function at a time, under a lock, and half of that is Python: threads gain nothing. So a process for
each further core takes kernels from the end of the queue, while this one works from its beginning:

    here                                           a helper
    one line of JSON: sys.path, our_mark()    ->   imports Numba (a second), compares the mark
    one line a kernel: module, factory, spec  ->   compiles it
                                              <-   u32, u32: lengths of symbol and object file; then both. 0, 0: failed

A helper writes no files. It ends with its standard input, and is killed when the queue is done; Ctrl-C reaches this
process alone. Where none can be started, or one ends early, this process compiles what is left.

Zen 4, two cores, first text of the default model with its 26 kernels: 14.2 -> 7.4 s; while other programs used both
cores, 15.3 -> 13.7 and 19.3 -> 17.0 s.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any, BinaryIO

from . import _jit
from .isa import ISA

KERNELS_PER_PROCESS = 5  # fewer do not pay for its start
MAX_HELPERS = 3

BOOT = f"""import json, sys
hello = json.loads(sys.stdin.buffer.readline())
sys.path[:] = hello["path"]
from {__name__} import serve
serve(hello["mark"])"""


@contextlib.contextmanager
def helped(queue: deque[_jit.Code]) -> Iterator[dict[_jit.Code, tuple[str, bytes]]]:
    """While the body takes kernels from the left of the queue, helpers take from its right; it may be empty soon.

    Yields what they have compiled: (symbol, object file), complete when the block is left without an exception.
    """
    done: dict[_jit.Code, tuple[str, bytes]] = {}
    n = min(MAX_HELPERS, _cores() - 1, len(queue) // KERNELS_PER_PROCESS - 1)
    helpers: list[tuple[subprocess.Popen[bytes], threading.Thread]] = []
    try:
        for _ in range(n):
            if process := _start():
                helpers.append((process, threading.Thread(target=_feed, args=(process, queue, done), daemon=True)))
                helpers[-1][1].start()
        yield done
        for _, thread in helpers:
            thread.join()
    finally:
        for process, thread in helpers:
            process.kill()
            thread.join()  # it reads the end of the pipe
            process.wait()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def our_mark() -> str:
    """Equal in two processes that compile the same code from a kernel."""
    return f"{_jit.cache_key()} {ISA}"


def _start() -> subprocess.Popen[bytes] | None:
    name = os.path.basename(sys.executable or "").lower()
    if not name.startswith(("python", "pypy")) or getattr(sys, "frozen", False):
        return None  # Python is inside of another program, which must not be started again
    apart: dict[str, Any] = {"start_new_session": True}
    if sys.platform == "win32":
        apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", BOOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            **apart,
        )
    except OSError:
        return None


def _feed(process: subprocess.Popen[bytes], queue: deque[_jit.Code], done: dict[_jit.Code, tuple[str, bytes]]) -> None:
    """A thread for each helper."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(OSError, IndexError), process.stdin, process.stdout:  # it has gone, or nothing is left
        _send(process.stdin, {"path": sys.path, "mark": our_mark()})
        if process.stdout.read(1) != b"!":
            return
        while True:
            code = queue.pop()
            if code.origin is None:
                continue  # left to those who wait for the queue
            _send(process.stdin, code.origin)
            head = process.stdout.read(8)
            if len(head) < 8:
                return
            n_symbol, n_code = struct.unpack("<II", head)
            symbol, machine_code = process.stdout.read(n_symbol), process.stdout.read(n_code)
            if n_code and len(machine_code) == n_code:
                done[code] = (symbol.decode(), machine_code)


def _send(pipe: Any, what: object) -> None:
    pipe.write(json.dumps(what).encode() + b"\n")
    pipe.flush()


def serve(mark: str) -> None:
    """A helper's whole life."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what else would print must not get in between
    if mark != our_mark():
        return
    with contextlib.suppress(OSError):
        importlib.import_module(".simd", __package__)  # Numba's
        out.write(b"!")
        out.flush()
        for line in sys.stdin.buffer:
            _answer(out, *json.loads(line))


def _answer(out: BinaryIO, module: str, factory: str, spec: dict[str, Any]) -> None:
    try:
        symbol, code = getattr(importlib.import_module(module), factory)(**spec).compile()
    except Exception:  # the other process will meet it too, and tell
        symbol, code = "", b""
    out.write(struct.pack("<II", len(symbol), len(code)) + symbol.encode() + code)
    out.flush()
