"""The project's own virtual environment, .venv: made, and konly installed into it as a wheel, not editable.

Used by try.py and test.py, on any Python >= 3.11 and its standard library. What is installed is remembered in a stamp
beside it, by content, so that a second run does nothing; the build tool is kept in .venv, so that installing changed
sources again needs no network.
"""

from __future__ import annotations  # an old Python must get as far as our message about it

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
STAMP = VENV / "konly-installed.json"
PACKAGES = ("engine", "cpu_kernels", "gpu_kernels")
MIN_PYTHON = (3, 11)


def ensure(extras: Iterable[str] = (), reinstall: bool = False) -> Path:
    """Make .venv if needed, with konly and these extras in it, as the sources are now. Returns its Python's path.

    reinstall  build and install konly afresh even if the stamp says that nothing changed
    """
    if sys.version_info < MIN_PYTHON:
        version = ".".join(map(str, sys.version_info[:2]))
        _fail(f"konly needs Python 3.11 or newer; this is {version} ({sys.executable})")
    python = _make_venv()
    project = _project()
    installed = _installed()
    extras = sorted({*extras, *installed.get("extras", ())})
    now = {"project": _digest([ROOT / "pyproject.toml"]), "sources": _digest(_sources()), "extras": extras}

    if now == installed and not reinstall:
        return python
    STAMP.unlink(missing_ok=True)
    if now["project"] != installed.get("project") or extras != installed.get("extras"):
        _say("installing konly's dependencies into .venv")
        _pip(python, *project["build-system"]["requires"])
        wanted = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
        _pip(python, "--no-build-isolation", wanted)
    _say("installing konly into .venv")
    _pip(python, "--no-build-isolation", "--no-deps", "--force-reinstall", str(ROOT))
    STAMP.write_text(json.dumps(now))
    return python


def script(name: str) -> Path:
    """The path of a command installed in .venv."""
    return VENV / ("Scripts" if os.name == "nt" else "bin") / (name + (".exe" if os.name == "nt" else ""))


def environ() -> dict[str, str]:
    """Environment of a process which must see the installed packages, and no source tree."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    env["PYTHONSAFEPATH"] = "1"  # neither the working directory nor a script's folder goes on sys.path
    return env


def _make_venv() -> Path:
    python = script("python")
    if python.exists() and _runs(python):
        return python
    _say("making .venv")
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=False)
    if made.returncode != 0 or not _runs(python):
        _fail(
            "could not make a virtual environment in .venv; is the module venv there?\n"
            "(Debian and Ubuntu: apt install python3-venv)"
        )
    return python


def _runs(python: Path) -> bool:
    check = f"import pip, sys; sys.exit(sys.version_info < {MIN_PYTHON!r})"
    try:
        return subprocess.run([str(python), "-c", check], stderr=subprocess.DEVNULL, check=False).returncode == 0
    except OSError:
        return False


def _project() -> dict[str, Any]:
    import tomllib  # new in 3.11, hence not at the top: older versions are to get our message

    with open(ROOT / "pyproject.toml", "rb") as file:
        return tomllib.load(file)


def _sources() -> Iterator[Path]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path


def _installed() -> dict[str, Any]:
    try:
        return dict(json.loads(STAMP.read_text()))
    except (OSError, ValueError, TypeError):  # never made, or not written to its end
        return {}


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *arguments]
    if subprocess.run(command, env=environ(), stdout=sys.stderr, check=False).returncode != 0:
        _fail(
            f"pip could not install {arguments[-1]}: its message is above. The first time this needs a package\n"
            "index; without a network, put the wheels into a folder and set PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER"
        )


def _say(what: str) -> None:
    print(what + " …", file=sys.stderr, flush=True)


def _fail(message: str) -> NoReturn:
    sys.exit("Error: " + message)
