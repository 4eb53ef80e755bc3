"""One piece of device memory, cut up: what an op keeps between its kernels."""

from __future__ import annotations

from typing import Any


def pieces(run: Any, *sizes: int) -> list[Any]:
    """Arrays of so many bytes each, u8, in run's workspace, each from a multiple of 256 on; an empty one for 0."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // 256) * 256)
    memory = run.workspace(starts[-1])
    return [memory[start : start + size] for start, size in zip(starts, sizes)]
