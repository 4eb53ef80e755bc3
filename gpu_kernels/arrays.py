"""Arrays in the device's memory, and what the host does with them: engine/host.py has the same for main memory.

Copies here wait until they are done. Those that belong to a step are queued on its run: Mirror.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

PIECE = 32 << 20  # bytes that move() takes at once


@dataclass(frozen=True)
class Mirror:
    """The same array twice: pinned in main memory, and on the device."""

    host: np.ndarray
    here: Any

    def send(self, run: Any) -> None:
        """Queue: what the host's has goes to the device's."""
        run.copy(self.here, self.host)

    def fetch(self, run: Any) -> None:
        """Queue: what the device's has goes to the host's."""
        run.copy(self.host, self.here)

    def first(self, n: int) -> Mirror:
        return Mirror(self.host[:n], self.here[:n])


def zeros(shape: tuple[int, ...], dtype: Any) -> Any:
    import cupy

    return _ready(cupy.zeros(shape, dtype))


def mirror(shape: tuple[int, ...], dtype: Any) -> Mirror:
    """Contents undefined."""
    import cupy
    import cupyx

    return Mirror(cupyx.empty_pinned(shape, dtype), cupy.empty(shape, dtype))


def layers(n: int, nbytes: int) -> list[Any]:
    """n arrays (nbytes,) u8, contents undefined; MemoryError if they do not fit."""
    import cupy

    return [cupy.empty(nbytes, np.uint8) for _ in range(n)]


def upload(a: np.ndarray) -> Any:
    """A copy on the device."""
    import cupy

    return _ready(cupy.asarray(a))


def put(to: Any, values: np.ndarray) -> None:
    """to = values, of the same shape and dtype; both contiguous."""
    to.set(np.ascontiguousarray(values))
    _ready(to)


def get(a: Any) -> np.ndarray:
    """A copy in main memory; a is contiguous."""
    return a.get()


def move(a: Any, to: int, start: int, n: int) -> None:
    """a[to : to + n] = a[start : start + n] of a contiguous array; if to < start, they may overlap."""
    import cupy

    size = max(1, PIECE // a[:1].nbytes)
    between = cupy.empty((min(n, size), *a.shape[1:]), a.dtype)
    for at in range(0, n, size):
        some = min(size, n - at)
        for dst, src in ((between[:some], a[start + at :]), (a[to + at :], between)):
            cupy.cuda.runtime.memcpyAsync(dst.data.ptr, src.data.ptr, between[:some].nbytes, 3, 0)
    _ready(a)


def free_nbytes() -> int:
    """Bytes that can be allocated."""
    import cupy

    pool = cupy.get_default_memory_pool()
    return int(cupy.cuda.runtime.memGetInfo()[0]) + pool.free_bytes()


def release() -> None:
    """Give what arrays have left behind back to the device."""
    import cupy

    cupy.get_default_memory_pool().free_all_blocks()


def _ready(a: Any) -> Any:
    """Wait for the stream that CuPy itself works on: a Run's does not wait for it."""
    import cupy

    cupy.cuda.get_current_stream().synchronize()
    return a
