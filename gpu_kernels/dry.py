"""DryRun: a run without a card: it takes what is queued, executes nothing, and tells what memory would be taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .device import Limits
from .stream import Queue, Tape


class DryRun(Queue):
    """kept: bytes that empty() and upload() were asked for. Arrays are address space that is never touched."""

    def __init__(self, limits: Limits):
        super().__init__(limits)
        self.kept = 0
        self._workspace = np.empty(0, np.uint8)

    def replay(self, tape: Tape, tell: Callable[[float], None] | None = None) -> None:
        pass

    def workspace(self, nbytes: int) -> np.ndarray:
        if self._workspace.size < nbytes:
            self._workspace = np.empty(nbytes, np.uint8)
        return self._workspace[:nbytes]

    @property
    def workspace_nbytes(self) -> int:
        """What the ops that were queued have asked for, to work in and to keep."""
        return self._workspace.nbytes + self.kept

    def pinned(self, nbytes: int) -> np.ndarray:
        return np.empty(nbytes, np.uint8)

    def empty(self, nbytes: int) -> np.ndarray:
        self._keep(nbytes)
        return np.lib.stride_tricks.as_strided(np.empty(1, np.uint8), (nbytes,), (0,), writeable=False)

    def put(self, to: Any, values: np.ndarray) -> None:
        pass

    def upload(self, a: np.ndarray) -> np.ndarray:
        self._keep(a.nbytes)
        return a

    def _keep(self, nbytes: int) -> None:
        self.kept += -(-nbytes // 512) * 512  # as CuPy rounds
