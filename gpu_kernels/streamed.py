"""Experts whose weights stay in main memory, brought to the card for every ubatch: worth it for many tokens.

    host    piece i + 1: file -> pinned memory        (threads)
    copy    piece i + 1: pinned -> one of two buffers (a stream of its own)
    card    piece i: blocks taken apart, products of the slots whose experts it holds

A piece is some experts of a layer, gate, up and down. Both buffers and what blocks are taken apart into are 3 PIECE of
the card's memory, whatever the model's size.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from . import moe
from .quants import Weight, format_of, planes_of, weight_of
from .weights import split

PIECE = 256 << 20  # bytes, at least one expert
ALIGNMENT = 256
THREADS = 8  # that fill pinned memory


def can_stream(run: Any, types: Sequence[int], n_tok: int) -> bool:
    """Whether so many tokens are multiplied by tiles: F32 weights, and a few tokens, are not."""
    return moe.by_tile(run, types, n_tok)


def experts_streamed(run: Any, x: Any, ids: Any, weights: Any, gate: Any, up: Any, down: Any, out: Any) -> None:
    """As experts, where can_stream, with gate, up and down of the file: type.id, shape, data (n_expert, …) u8."""
    moe.check_arguments(x, ids, weights, gate, up, down, out)
    mats = (gate, up, down)
    n_expert = gate.shape[0]
    each = [w.data[0].size for w in mats]
    n = max(1, min(n_expert, PIECE // sum(each)))  # experts of a piece
    sizes = [-(-n * size // ALIGNMENT) * ALIGNMENT for size in each]
    starts = [0, sizes[0], sizes[0] + sizes[1]]
    planes = [_planes(w, n)[-1] for w in mats]
    staging = _staging(run, sum(sizes), sum(planes))
    for first in range(0, n_expert, n):
        some = slice(first, min(first + n, n_expert))
        raw, pinned, slot = staging.next()
        parts = [w.data[some] for w in mats]
        run.feed(raw, pinned, partial(_fill, parts, starts), slot)
        placed, at = [], 0
        for w, part, start, size in zip(mats, parts, starts, planes):
            data, k = staging.planes[at : at + size], len(part)
            blocks = raw[start : start + part.size]
            placed.append(_split(run, w, k, blocks, data))
            at += size
        moe.queue(run, x, ids, weights, *placed, out, first)


def _planes(w: Any, n: int) -> list[int]:
    return planes_of(format_of(w.type.id), n * w.data[0].size // format_of(w.type.id).nbytes)


def _split(run: Any, w: Any, n: int, blocks: Any, data: Any) -> Weight:
    """n experts' blocks on the device as a weight; planes go to data, unless there is but one."""
    f, starts = format_of(w.type.id), _planes(w, n)
    if len(f.planes) == 1:
        data = blocks
    else:
        split(run, f, blocks, data, starts)
    return weight_of(w.type, (n, *w.shape[1:]), data, starts)


def _fill(parts: Sequence[np.ndarray], starts: Sequence[int], pinned: np.ndarray) -> None:
    """Each part's experts one after another from its start on."""

    def copy(of: tuple[np.ndarray, int]) -> None:
        one, at = of
        np.copyto(pinned[at : at + one.size].reshape(one.shape), one)

    jobs = [(one, start + i * one.size) for part, start in zip(parts, starts) for i, one in enumerate(part)]
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:  # NumPy lets go of Python meanwhile
        list(pool.map(copy, jobs))


class Staging:
    """Two buffers, by turns, in pinned memory and on the device; one for planes on the device."""

    def __init__(self, run: Any, nbytes: int, planes: int):
        self._turn = 0
        self._buffers = [(run.empty(nbytes), run.pinned(nbytes)) for _ in range(2)]
        self.planes = run.empty(planes)

    def next(self) -> tuple[Any, np.ndarray, int]:
        self._turn = 1 - self._turn
        return *self._buffers[self._turn], self._turn


def _staging(run: Any, nbytes: int, planes: int) -> Staging:
    """The run's own, for pieces of this size."""
    if (nbytes, planes) not in run.staging:
        run.staging[nbytes, planes] = Staging(run, nbytes, planes)
    found: Staging = run.staging[nbytes, planes]
    return found
