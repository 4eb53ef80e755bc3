"""Fixtures that several test files share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from llama_cpp_peer import require_xllamacpp


@pytest.fixture
def llama_cpp() -> None:
    """The peer is at hand; else the test is skipped, or fails in CI."""
    require_xllamacpp()


@pytest.fixture
def model_file(tmp_path: Path) -> Iterator[Path]:
    """Where a model may be written; removed at once, for pytest would keep 150 MB of each for three runs."""
    path = tmp_path / "model.gguf"
    yield path
    with contextlib.suppress(PermissionError):  # Windows, while it is mapped
        path.unlink(missing_ok=True)
