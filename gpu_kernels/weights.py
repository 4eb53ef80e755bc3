"""upload(): a weight of the file to the device, its blocks taken apart there (quants.py says why, and into what).

Blocks go to the device in pieces as they are, and a kernel splits them: NumPy would take ten seconds for 10 GB. What
has a single plane is copied to its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ._compile import kernel
from .quants import Format, Weight, format_of, planes_of, weight_of
from .stream import wide

SPLIT = kernel("split.cu", "split")
PIECE = 64 << 20  # bytes at a time


def upload(run: Any, weight: Any) -> Weight:
    """A weight of the file (type.id, shape, data (…, row bytes) u8) as the kernels take it, there when this returns."""
    f = format_of(weight.type.id)
    k = weight.shape[-1]
    if k % f.block or weight.data.shape != (*weight.shape[:-1], k // f.block * f.nbytes):
        raise ValueError(f"weight is {weight.data.shape} bytes for {weight.shape} values of {f.name}")
    n_blocks = weight.data.size // f.nbytes
    starts = planes_of(f, n_blocks)
    data = run.empty(starts[-1])
    rows = weight.data.reshape(-1, weight.data.shape[-1]) if weight.data.flags.c_contiguous else None
    for at, some in _pieces(weight.data if rows is None else rows):
        first = at // f.nbytes
        if len(f.planes) == 1:
            run.put(data[at : at + some.size], some)
            continue
        stage = run.workspace(some.size)
        run.put(stage, some)
        split(run, f, stage, data, starts, first)
        run.sync()
    return weight_of(weight.type, weight.shape, data, starts)


def split(run: Any, f: Format, blocks: Any, data: Any, starts: Sequence[int], first: int = 0) -> None:
    """Queue: blocks, flat bytes on the device, are taken apart into the planes of data, from block `first` on."""
    for (offset, n), start in zip(f.planes, starts):
        n_values = blocks.size // f.nbytes * n // 2
        args = (blocks, f.nbytes // 2, offset // 2, data[start + first * n :], n // 2, wide(n_values))
        run.launch(SPLIT, (-(-n_values // 256),), 256, 0, args)


def _pieces(data: np.ndarray) -> Any:
    """(bytes before it, flat bytes) of pieces of about PIECE, whole rows each."""
    if data.ndim > 2:  # a part of a bigger tensor, whose experts or heads lie apart
        at = 0
        for one in data:
            for before, some in _pieces(one):
                yield at + before, some
            at += one.size
        return
    n = max(1, PIECE // data.shape[-1])
    for at in range(0, len(data), n):
        some = np.ascontiguousarray(data[at : at + n]).reshape(-1)
        yield at * data.shape[-1], some
