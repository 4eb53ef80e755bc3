"""Helpers: processes that compile kernels for this one."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import deque

import numpy as np
import pytest

from cpu_kernels import _jit, compiling
from cpu_kernels.matmul import decode_row
from cpu_kernels.threads import Run

F32, F16 = 0, 1


@pytest.fixture(autouse=True)
def one_helper(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Even for two kernels on one core; the list is of all that were started."""
    started: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[call-overload]
            started.append(self)

    monkeypatch.setattr(compiling.subprocess, "Popen", Noted)
    monkeypatch.setattr(compiling, "_cores", lambda: 2)
    monkeypatch.setattr(compiling, "KERNELS_PER_PROCESS", 1)
    return started


def fresh(type_id: int) -> _jit.Code:
    """A Code that this process has not compiled."""
    made = decode_row(type_id=type_id)
    return _jit.Code(made.name, made._build, made.origin)


def local() -> _jit.Code:
    """A kernel that no other process can import."""

    @_jit.kernel
    def nothing():
        def body(tile, scratch):
            pass

        return body

    return nothing()


def test_a_kernel_compiled_elsewhere_works_here(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    monkeypatch.setattr(_jit, "_write", lambda *what: kept.append(what))
    queue = deque([fresh(F16), fresh(F32)])
    with compiling.helped(queue) as done:
        pass  # the helper has to do it all
    assert not queue and len(done) == 2
    code = next(code for code in done if code.name.endswith(f"={F32}"))
    code.adopt(*done[code])
    assert code.loaded and kept == [(code.name, *done[code])]
    rows, out, tokens = np.random.default_rng(0).random((3, 64), np.float32), np.zeros((2, 64), np.float32), [2, 0]
    run = Run(1)
    run.launch(code, 2, (rows, rows.strides[0], np.array(tokens, np.int32), out, out.strides[0], 64))
    run.sync()
    assert np.array_equal(out, rows[tokens])


def test_all_kernels_are_loaded_whoever_compiled_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_jit, "_write", lambda *_: None)
    monkeypatch.setattr(_jit, "_read", lambda _: None)
    codes, told = [fresh(F32), local(), fresh(F16)], []
    assert _jit.load(codes, lambda done, total, name: told.append((done, total))) == 3
    assert all(code.loaded for code in codes)
    assert told == sorted(told) and told[0] == (0, 3) and told[-1] == (3, 3)


def test_a_helper_that_would_compile_other_code_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "our_mark", lambda: "another CPU")
    queue = deque([fresh(F16), fresh(F32)])
    with compiling.helped(queue) as done:
        pass
    assert len(queue) == 2 and not done


@pytest.mark.parametrize("executable", ["", os.devnull, "/opt/program/that-has-python-inside"])
def test_without_a_python_to_start_this_process_compiles(monkeypatch: pytest.MonkeyPatch, executable: str) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    queue = deque([fresh(F16), fresh(F32)])
    with compiling.helped(queue) as done:
        pass
    assert len(queue) == 2 and not done


def test_no_process_is_left_after_an_interrupt(one_helper: list[subprocess.Popen[bytes]]) -> None:
    threads = threading.enumerate()
    with pytest.raises(KeyboardInterrupt), compiling.helped(deque([fresh(F16), fresh(F32)])):
        raise KeyboardInterrupt
    assert [process.poll() is not None for process in one_helper] == [True]
    assert set(threading.enumerate()) <= set(threads)


def test_a_helper_ends_with_its_input() -> None:
    process = compiling._start()
    assert process is not None
    with process:
        compiling._send(process.stdin, {"path": sys.path, "mark": compiling.our_mark()})
        assert process.stdout is not None and process.stdout.read(1) == b"!"
        process.stdin.close()  # type: ignore[union-attr]  # as if this process had been killed
        assert process.wait(30) == 0


def test_few_kernels_or_one_core_start_no_helper(
    monkeypatch: pytest.MonkeyPatch, one_helper: list[subprocess.Popen[bytes]]
) -> None:
    with compiling.helped(deque([fresh(F16)])):
        pass
    monkeypatch.setattr(compiling, "_cores", lambda: 1)
    with compiling.helped(deque([fresh(F16), fresh(F32)])):
        pass
    assert not one_helper
