"""Who may import whom, by the source text; and what `import engine` pulls in.

engine may import the leaves; cpu_kernels and gpu_kernels import neither engine nor each other.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("engine", "cpu_kernels", "gpu_kernels")

ALLOWED = {
    "engine": {
        "numpy",
        "gguf",
        "tokenizers",
        "jinja2",
        "rich",
        "click",
        "llguidance",
        "prompt_toolkit",
        "cpu_kernels",
        "gpu_kernels",
    },
    "cpu_kernels": {"numpy", "numba", "llvmlite"},
    "gpu_kernels": {"numpy", "cupy", "cupyx"},
}
ONLY_IN = {  # the only files that may import it
    "click": {
        "engine/cli.py",
        *(path.relative_to(ROOT).as_posix() for path in (ROOT / "engine/commands").glob("*.py")),
    },
    "cpu_kernels": {"engine/backend.py"},
    "gpu_kernels": {"engine/backend.py"},
}
LAZY = {
    "llguidance",
    "prompt_toolkit",
    "gguf",
    "tokenizers",
    "jinja2",
    "rich",
    "cupy",
    "cupyx",
}  # not at the top of a module: they cost, or may be missing

MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path, only_top: bool = False) -> Iterator[str]:
    """Top-level names of the absolute imports in a module; only_top: of those that run when it is imported."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").split(".")[0]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and only_top:
            return
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING") and only_top:
            return
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    return visit(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_module_imports_only_what_its_layer_may(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    allowed = ALLOWED[package] | {package} | set(sys.stdlib_module_names)
    found = set(imports(path))
    assert found <= allowed
    misplaced = {module for module in found & set(ONLY_IN) if name(path) not in ONLY_IN[module] and module != package}
    assert not misplaced


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_slow_imports_wait_until_they_are_needed(path: Path) -> None:
    assert not LAZY & set(imports(path, only_top=True))


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_engine_is_light() -> None:
    assert not loaded_by("import engine") & {
        "numpy",
        "numba",
        "llvmlite",
        "cupy",
        "click",
        "rich",
        "tokenizers",
        "gguf",
    }


def test_importing_the_cli_is_light() -> None:
    assert not loaded_by("import engine.cli") & {"numpy", "numba", "llvmlite", "cupy", "rich", "tokenizers", "gguf"}


def test_a_warm_start_needs_no_numba() -> None:
    assert not loaded_by("import cpu_kernels; from engine import Engine") & {"numba", "cupy", "gguf", "jinja2"}
