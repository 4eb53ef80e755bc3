"""Text files of documents, each ended by a line that holds only <|end|>."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

END = "<|end|>"


def read_documents(path: str | Path) -> list[str]:
    return [text.strip() for text in Path(path).read_text(encoding="utf-8").split(END) if text.strip()]


def write_documents(path: str | Path, documents: Iterable[str]) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for text in documents:
            file.write(f"{text}\n{END}\n")
