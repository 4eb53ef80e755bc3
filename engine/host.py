"""Arrays in main memory: what gpu_kernels/arrays.py is for a card. Streams and caches need not know which it is."""

from __future__ import annotations

import ctypes
import mmap
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

PAGE = mmap.PAGESIZE
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # has its name since 3.13


@dataclass(frozen=True)
class Mirror:
    """An array that the host fills or reads, and kernels, too. Here they are one."""

    host: np.ndarray

    @property
    def here(self) -> np.ndarray:
        return self.host

    def send(self, run: Any) -> None:
        """Queue: what the host's has goes to the device's. Nothing to do here."""

    def fetch(self, run: Any) -> None:
        """Queue: what the device's has goes to the host's. Nothing to do here."""

    def first(self, n: int) -> Mirror:
        return Mirror(self.host[:n])


def zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.zeros(shape, dtype)


def mirror(shape: tuple[int, ...], dtype: Any) -> Mirror:
    """Contents undefined."""
    return Mirror(np.empty(shape, dtype))


def layers(n: int, nbytes: int) -> list[np.ndarray]:
    """n arrays (nbytes,) u8 of zeros that begin on a page. MemoryError if they cannot be had.

    An anonymous mapping: memory is taken page by page as it is written, so a long n_ctx costs nothing by itself.
    """
    each = -(-nbytes // PAGE) * PAGE
    try:
        if hasattr(mmap, "MAP_PRIVATE"):
            memory = mmap.mmap(-1, n * each, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        else:
            memory = mmap.mmap(-1, n * each)
    except (OSError, OverflowError, ValueError) as error:
        raise MemoryError(str(error)) from None
    return [layer[:nbytes] for layer in np.frombuffer(memory, np.uint8).reshape(n, each)]


def release() -> None:
    """What has been left behind goes back to the system. Nothing to do here."""


def upload(a: np.ndarray) -> np.ndarray:
    """The array itself."""
    return a


def put(to: np.ndarray, values: np.ndarray) -> None:
    """to = values, of the same shape and dtype."""
    to[...] = values


def get(a: np.ndarray) -> np.ndarray:
    """The array itself."""
    return a


def move(a: np.ndarray, to: int, start: int, n: int) -> None:
    """a[to : to + n] = a[start : start + n], along the first axis of a contiguous array; they may overlap."""
    stride, begin = a.strides[0], a.ctypes.data
    ctypes.memmove(begin + to * stride, begin + start * stride, n * stride)
