"""Set up, then test: python scripts/test.py [PYTEST ARGUMENTS], such as -k gguf or -m slow

Makes .venv with the test extra, installs konly into it from a wheel built now, checks style (ruff) and types (mypy),
and runs pytest against what is installed; the source tree is not importable. Returns pytest's exit code, or 1 if
pytest is content and a check is not.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import environment

CHECKS = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("mypy",),
)
PARALLEL = ("-n", "auto", "--dist", "loadfile")  # a process for each core, a file of tests in one of them


def main() -> int:
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    python = environment.ensure(extras=["test"], reinstall=True)
    failed = [" ".join(check) for check in CHECKS if _module(python, *check) != 0]
    code = _module(python, "pytest", *PARALLEL, *sys.argv[1:])
    for check in failed:
        print(f"Error: `{check}` found faults, see above", file=sys.stderr)
    return code or int(bool(failed))


def _module(python: Path, *arguments: str) -> int:
    command = [str(python), "-P", "-m", *arguments]
    print("$ " + " ".join(("python", *command[1:])), flush=True)
    return subprocess.run(command, cwd=environment.ROOT, env=environment.environ(), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
