"""Run: the place that kernels are queued on, and the one seam between the wrappers and CuPy.

A wrapper checks its arrays, chooses a kernel and a grid, and calls

    run.launch(kernel, grid, threads, shared, args)        args as below; nothing else of CuPy is used by a wrapper
    run.workspace(nbytes)                                  (nbytes,) u8 on the device, shared by all that is queued
    run.upload(a), run.sync()                              a copy on the device; wait for all that is queued
    run.limits                                             device.Limits

so a test puts another Run in its place, which runs the same kernels on the CPU (tests/gpu_kernels/shim.py).

Arguments: an array is passed by the address of its first value (None: 0); a Python int as 32 bits, a float as f32;
`wide(n)` is an int of 64 bits, which strides in values or bytes are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import device
from ._compile import Kernel
from .check import address

wide = np.int64
STATIC_SHARED = 48 << 10  # what a block may take without asking


class Run:
    """Queues on one CUDA stream of the current device; a new stream by default. GpuError if there is no device."""

    def __init__(self, stream: Any = None):
        self.limits = device.limits()
        import cupy

        self.stream = cupy.cuda.Stream(non_blocking=True) if stream is None else stream
        self._workspace = cupy.empty(0, np.uint8)

    def launch(self, kernel: Kernel, grid: tuple[int, ...], threads: int, shared: int, args: Sequence[Any]) -> None:
        """Queue a kernel on grid blocks of so many threads with so many bytes of dynamic shared memory."""
        function = kernel.function()
        if shared > STATIC_SHARED and function.max_dynamic_shared_size_bytes < shared:
            function.max_dynamic_shared_size_bytes = shared
        with self.stream:
            function(grid, (threads,), tuple(map(_argument, args)), shared_mem=shared)

    def workspace(self, nbytes: int) -> Any:
        """Memory for a job's inner results; the next job may overwrite it. It grows, which a captured graph forbids."""
        if self._workspace.size < nbytes:
            import cupy

            self.sync()
            self._workspace = cupy.empty(nbytes, np.uint8)
        return self._workspace[:nbytes]

    def upload(self, a: np.ndarray) -> Any:
        """A copy on the device."""
        import cupy

        with self.stream:
            return cupy.asarray(a)

    def sync(self) -> None:
        """Wait until everything queued is done."""
        self.stream.synchronize()


def _argument(arg: Any) -> Any:
    if arg is None:
        return np.uintp(0)
    if isinstance(arg, np.generic):
        return arg
    if isinstance(arg, int):
        return np.int32(arg)
    if isinstance(arg, float):
        return np.float32(arg)
    return np.uintp(address(arg))
