"""README and CONTRIBUTING say what is so: their Python runs, their files and options exist."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import click
import pytest

from engine import cli
from engine.engine import default_model

ROOT = Path(__file__).resolve().parents[1]
CLI = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for line in (README + CLI).splitlines() if line.startswith("    konly ")]


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_of_the_readme_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").write_bytes(Path(default_model()).read_bytes())
    exec(code, {})


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_the_documents_are_understood(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    command = cli.main.commands[name]
    assert command.make_context(name, arguments, parent=click.Context(cli.main)).params["model"] == "model.gguf"


def test_the_readme_has_the_two_commands_and_python_to_run() -> None:
    assert len(PYTHON) == 2 and len(COMMANDS) == 13
    assert {shlex.split(line)[1] for line in COMMANDS} == set(cli.main.commands)
    for name in ("try.py", "test.py"):
        assert f"    python scripts/{name}" in README


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_files_that_are_named_exist(text: str) -> None:
    named = re.findall(r"(?:engine|cpu_kernels|tests|scripts)/[\w/.]+\.\w+", text)
    named += re.findall(r"\]\(([^:)]+)\)", text)
    assert named
    missing = [name for name in named if not os.path.exists(ROOT / name)]
    assert not missing
