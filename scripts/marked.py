"""Text that scripts write into documents, and nobody by hand, between two comments: <!-- name --> … <!-- /name -->."""

from __future__ import annotations

from pathlib import Path


def replace(path: str | Path, name: str, text: str) -> None:
    """Put text between the comments, which stay. ValueError unless the document has this pair once."""
    path = Path(path)
    document = path.read_text(encoding="utf-8")
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = document.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed or start in rest or end in before + after:
        raise ValueError(f"{path}: expected {start} and {end}, once each, in this order")
    path.write_text(f"{before}{start}\n{text.strip()}\n{end}{after}", encoding="utf-8", newline="\n")
