"""Prefixes: rows of prompts that streams have left behind, so that coming back to one costs a copy and no computing.

An application that alternates between two system prompts, say, pays for each once. What is kept is found by token ids;
the least recently used goes first when the budget is full. Rows are copies: a stream goes on writing into its own.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .k_cache import KCache

MIN_TOKENS = 32  # fewer are computed again as fast as they are looked after


@dataclass(frozen=True)
class End:
    """The logits (n_vocab,) after the first n tokens: of a prompt, so that asking again gives the same, bit for bit."""

    n: int
    logits: np.ndarray


@dataclass(frozen=True)
class Prefix:
    """rows[il] (n, row_stride) u8 of tokens (n,) int32, row 0 at first_position; the ends of prompts among them."""

    type_k: str
    tokens: np.ndarray
    first_position: int
    rows: list[np.ndarray]
    ends: tuple[End, ...]

    @property
    def nbytes(self) -> int:
        ends = sum(end.logits.nbytes for end in self.ends)
        return self.tokens.nbytes + sum(rows.nbytes for rows in self.rows) + ends


class Prefixes:
    """Of one model, for all its streams and threads. budget: bytes; 0 keeps nothing."""

    def __init__(self, budget: int):
        self.budget = budget
        self._kept: list[Prefix] = []  # the most recently used comes last
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        with self._lock:
            return sum(prefix.nbytes for prefix in self._kept)

    def keep(self, cache: KCache, tokens: Sequence[int], ends: Sequence[End] = ()) -> None:
        """Copy the rows of a cache, whose tokens these are; no more than the budget has room for."""
        n = min(len(tokens), self.budget // (cache.layout.bytes_per_token + 4))
        if n < MIN_TOKENS:
            return
        ids = np.array(tokens[:n], np.int32)
        with self._lock:
            if any(common(prefix.tokens, ids) == n for prefix in self._of(cache)):
                return
        prefix = Prefix(cache.layout.type_k, ids, cache.first_position, cache.copy(n), ())
        room = self.budget - prefix.nbytes
        fitting = tuple(end for end in ends if end.n <= n and (room := room - end.logits.nbytes) >= 0)
        prefix = replace(prefix, ends=fitting)
        with self._lock:
            covered = [p for p in self._of(cache) if common(p.tokens, ids) == len(p.tokens)]
            self._kept = [p for p in self._kept if not any(p is c for c in covered)] + [prefix]
            while sum(p.nbytes for p in self._kept) > self.budget:
                del self._kept[0]

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()

    def longest(self, cache: KCache, tokens: Sequence[int], at_least: int) -> tuple[Prefix | None, int]:
        """(the kept prefix that shares the most first tokens with these, how many); None if they are fewer."""
        ids = np.array(tokens, np.int32)
        with self._lock:
            best = max(self._of(cache), key=lambda p: common(p.tokens, ids), default=None)
            n = common(best.tokens, ids) if best is not None else 0
            if n < at_least:
                return None, 0
            self._kept = [p for p in self._kept if p is not best] + [best]  # type: ignore[list-item]
        return best, n

    def _of(self, cache: KCache) -> list[Prefix]:
        return [prefix for prefix in self._kept if prefix.type_k == cache.layout.type_k]


def common(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> int:
    """How many first tokens are the same."""
    n = min(len(a), len(b))
    different = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(different[0]) if len(different) else n
