"""Code for one architecture: compiled by NVRTC once, then from the disk, however that looks."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpu_kernels import _compile, _cubin
from gpu_kernels.attention import WarpgroupVariant, kernels


class Nvrtc:
    """As much of CuPy's as is asked; compiled: the options of each program so far."""

    NVRTCError = RuntimeError

    def __init__(self, version: tuple[int, int] = (13, 0), fails: bool = False):
        self.version, self.fails, self.compiled = version, fails, []

    def getVersion(self) -> tuple[int, int]:
        return self.version

    def createProgram(self, text: str, name: str, headers: tuple[()], names: tuple[()]) -> str:
        return text

    def compileProgram(self, program: str, options: tuple[str, ...]) -> None:
        self.compiled.append(options)
        if self.fails:
            raise self.NVRTCError("NVRTC_ERROR_COMPILATION (6)")

    def getCUBIN(self, program: str) -> bytes:
        return b"code of " + program.encode()

    def getProgramLog(self, program: str) -> str:
        return "line 3: no such thing"

    def destroyProgram(self, program: str) -> None:
        pass


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_it_is_compiled_once_for_a_text_its_options_and_a_compiler() -> None:
    nvrtc, newer = Nvrtc(), Nvrtc((13, 1))
    for text, options, compiler in (
        ("a", ("x",), nvrtc),
        ("b", ("x",), nvrtc),
        ("a", ("y",), nvrtc),
        ("a", ("x",), newer),
    ):
        for _ in range(2):
            assert _cubin.cubin(text, options, compiler) == b"code of " + text.encode()
    assert nvrtc.compiled == [("x",), ("x",), ("y",)] and newer.compiled == [("x",)]


def test_a_damaged_file_is_compiled_anew(folder: Path) -> None:
    nvrtc = Nvrtc()
    _cubin.cubin("a", (), nvrtc)
    (path,) = folder.iterdir()
    for damaged in (path.read_bytes()[:-1], b""):
        path.write_bytes(damaged)
        assert _cubin.cubin("a", (), nvrtc) == b"code of a" == path.read_bytes()[32:]
    assert len(nvrtc.compiled) == 3


def test_where_nothing_can_be_written_it_is_compiled_every_time(folder: Path) -> None:
    folder.write_text("a file where the folder should be")
    nvrtc = Nvrtc()
    assert [_cubin.cubin("a", (), nvrtc) for _ in range(2)] == [b"code of a"] * 2
    assert len(nvrtc.compiled) == 2


def test_what_does_not_compile_is_told_with_the_log(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="NVRTC_ERROR_COMPILATION.*\nline 3: no such thing"):
        _cubin.cubin("a", (), Nvrtc(fails=True))
    assert not folder.exists()


def test_the_kernel_of_warpgroups_is_asked_for_by_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, module = [], SimpleNamespace(get_function=lambda name: SimpleNamespace(kernel=SimpleNamespace(ptr=7)))
    monkeypatch.setattr(_cubin, "Module", lambda text, options: asked.append((text, options)) or module)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace())
    split, combine = kernels(WarpgroupVariant(), "f16", 512, 64)
    assert split.function(0) == combine.function(0) == 7
    assert asked == [(_compile.source(*split.unit), ("-arch=sm_90a", "-ftz=true", "--std=c++17"))]
    for known in (_compile._loaded, _compile._modules):
        for key in [key for key in known if key in (split, combine, split.unit)]:
            del known[key]


def test_shared_memory_is_asked_for_through_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    driver = SimpleNamespace(funcSetAttribute=lambda *args: asked.append(args))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(driver=driver)))
    function = _cubin.Function(SimpleNamespace(ptr=5))
    function.max_dynamic_shared_size_bytes = 230_488
    assert asked == [(5, 8, 230_488)]
