"""poke(): damage to one tensor of a GGUF file, for tests of what finds it."""

from __future__ import annotations

from pathlib import Path

from engine.gguf_file import read


def poke(path: Path, tensor: str, at: int, data: bytes) -> None:
    """Overwrite bytes of a tensor, counted from its start."""
    content = bytes(read(path).tensors[tensor].data.reshape(-1)[:64])
    whole = path.read_bytes()
    start = whole.index(content)
    assert whole.find(content, start + 1) < 0
    with path.open("r+b") as file:
        file.seek(start + at)
        file.write(data)
