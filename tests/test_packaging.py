"""What a user gets from the wheel: the three packages, whole, and nothing else."""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("engine", "cpu_kernels", "gpu_kernels")


@pytest.fixture(scope="module")
def distribution() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("konly")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("konly is not installed here; scripts/test.py installs it")


@pytest.fixture(scope="module")
def files(distribution: importlib.metadata.Distribution) -> list[PurePosixPath]:
    return [path for path in distribution.files or [] if "__pycache__" not in path.parts]


@pytest.mark.parametrize("package", PACKAGES)
def test_the_installed_package_is_the_one_under_test(
    distribution: importlib.metadata.Distribution, package: str
) -> None:
    imported = Path(str(importlib.import_module(package).__file__)).resolve()
    assert imported == Path(str(distribution.locate_file(f"{package}/__init__.py"))).resolve()
    assert ROOT / package not in imported.parents


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_of_the_source_tree_is_installed(files: list[PurePosixPath], package: str) -> None:
    source = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert source == {path.as_posix() for path in files if path.parts[0] == package}


def test_nothing_else_is_installed(files: list[PurePosixPath]) -> None:
    outside = {path.parts[0] for path in files} - {*PACKAGES, ".."}
    assert [name.split("-")[0] for name in outside] == ["konly"]  # konly-0.1.0.dist-info
    assert [path.stem for path in files if path.parts[0] == ".."] == ["konly"]  # the command


def test_model_types_and_licences_are_there(files: list[PurePosixPath]) -> None:
    names = {path.name for path in files}
    assert {"tiny-mla-tales-Q8_0.gguf", "py.typed", "LICENSE", "NOTICE"} <= names


def test_command_is_declared(distribution: importlib.metadata.Distribution) -> None:
    (command,) = distribution.entry_points
    assert (command.group, command.name, command.value) == ("console_scripts", "konly", "engine.cli:main")
