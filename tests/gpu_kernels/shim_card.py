"""A card that is the shim: what an Engine needs of a backend, so that whole streams run on CUDA kernels under g++."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from shim import ShimRun

import gpu_kernels
from engine import host
from engine.backend import Backend, on_card
from gpu_kernels.arrays import Mirror
from gpu_kernels.device import CARDS, Limits


class ShimOps:
    """gpu_kernels, with runs of the shim that queue, and arrays that are copies as a card's are.

    taken, n_taken   bytes of the weights that were brought here, and how many they are
    """

    def __init__(self, free: int = 1 << 40):
        self.taken = self.n_taken = 0
        self.arrays: Any = SimpleNamespace(
            zeros=host.zeros,
            layers=self._layers,
            mirror=lambda shape, dtype: Mirror(np.empty(shape, dtype), np.empty(shape, dtype)),
            upload=np.copy,
            put=host.put,
            get=np.copy,
            move=self._move,
            release=host.release,
            free_nbytes=lambda: free,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(gpu_kernels, name)

    def Run(self, n_threads: int | None = None) -> ShimRun:
        run = ShimRun(-1, at_once=False)
        run.upload = lambda a: self._took(a.copy())
        return run

    def prepare(self, tapes: Any, progress: Callable[[int, int, str], None] | None = None) -> int:
        return 0

    def upload(self, run: ShimRun, weight: Any) -> Any:
        placed = gpu_kernels.upload(run, weight)
        return self._took(placed) if isinstance(run, ShimRun) else placed  # else it is a plan's

    def _took(self, a: Any) -> Any:
        self.taken += a.nbytes
        self.n_taken += 1
        return a

    @staticmethod
    def _layers(n: int, nbytes: int) -> list[np.ndarray]:
        return [np.full(nbytes, 0xFF, np.uint8) for _ in range(n)]

    @staticmethod
    def _move(a: np.ndarray, to: int, start: int, n: int) -> None:
        a[to : to + n] = a[start : start + n].copy()


def card(free: int = 1 << 40, limits: Limits = CARDS[90]) -> tuple[Backend, ShimOps]:
    """A card with so much free memory, and its ops."""
    ops = ShimOps(free)
    return on_card(ops, limits), ops  # type: ignore[arg-type]
