"""The disk cache of compiled kernels: hits, damage, folders that cannot be written. Ctrl-C while one is compiled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cpu_kernels import _jit
from cpu_kernels.threads import work

CODE = """
import sys
import numpy as np
from cpu_kernels.threads import Run, BASE, load
compiled = load(BASE)
print(compiled, 'numba' in sys.modules)
"""


def run(cache: Path | str, code: str = CODE, warning: str = "") -> tuple[int, bool]:
    """(kernels compiled, whether Numba was imported) in a process of its own; warning: found on stderr, once."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"KONLY_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(warning) == 1 if warning else not done.stderr
    compiled, numba = done.stdout.split()
    return int(compiled), numba == "True"


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    assert run(cache) == (4, True)
    return cache


def test_a_second_process_compiles_nothing_and_needs_no_numba(filled: Path) -> None:
    assert run(filled) == (0, False)


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped"])
def test_a_damaged_object_is_compiled_again(filled: Path, damage: str) -> None:
    path = next(filled.rglob("threads.work.o"))
    good = path.read_bytes()
    bad = {"empty": b"", "cut": good[:-1], "flipped": good[:-1] + bytes([good[-1] ^ 1])}[damage]
    path.write_bytes(bad)
    run(filled)
    assert path.read_bytes() != bad
    assert run(filled) == (0, False)


def test_no_temporary_file_is_left_behind(filled: Path) -> None:
    assert {p.suffix for p in filled.rglob("*") if p.is_file()} == {".o"}


def test_a_folder_that_cannot_be_written_costs_only_time_and_a_warning(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert run(blocked / "cache", warning="compiled kernels cannot be kept") == (4, True)


@pytest.mark.skipif(sys.platform == "win32", reason="looks for its folder elsewhere")
def test_a_user_without_a_home_can_work() -> None:
    nameless = """
import os, pathlib
os.environ.pop("XDG_CACHE_HOME", None)
pathlib.Path.home = lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
"""
    assert run("", nameless + CODE, warning="Could not determine home directory") == (4, True)


def test_ctrl_c_comes_when_a_kernel_is_compiled_and_not_within(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLVM calls back while it compiles; an exception there would be printed and lost."""
    done = []

    def dispatcher(body: object, make: object = _jit._dispatcher) -> object:
        signal.raise_signal(signal.SIGINT)
        found = make(body)
        done.append(body)
        return found

    monkeypatch.setattr(_jit, "_dispatcher", dispatcher)
    with pytest.raises(KeyboardInterrupt):
        work().compile()
    assert len(done) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
