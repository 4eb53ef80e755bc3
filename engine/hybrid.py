"""The card and the CPU together: attention, dense and shared parts there; the routed experts here, from the file.

A model whose experts do not fit the card's memory runs so. For each layer of a step

    card   … router ─ y, ids, weights, x ──► pinned memory            (a graph)
    CPU                                      x += experts(y)          (cpu_kernels)
    card   … the next layer ◄── x            pinned memory            (a graph)

For a large ubatch the layer's experts are brought to the card instead, piece by piece (gpu_kernels/streamed.py).

The shared expert comes before, on the card: it is ten microseconds of the milliseconds that a token's experts take from
main memory, so that nothing is gained by computing both at once. One set of pinned arrays serves all layers of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from .tensor import QuantTensor

STREAM_TOKENS = 512  # of a ubatch, from which weights go to the card, rather than tokens to the CPU (docs/gpu.md)


class HybridOps:
    """The ops of a card, except for experts whose weights are in main memory: those run by the CPU's."""

    def __init__(self, gpu: ModuleType, cpu: ModuleType):
        self._gpu, self._cpu = gpu, cpu
        self.Cancelled = (gpu.Cancelled, cpu.Cancelled)
        self._tapes: list[Any] = []  # of the CPU, not yet compiled

    def __getattr__(self, name: str) -> Any:
        return getattr(self._gpu, name)

    def Run(self, n_threads: int | None = None) -> Any:
        run = self._gpu.Run(n_threads)
        run.beside = Beside(self._cpu.Run(n_threads))
        return run

    def prepare(self, tapes: Sequence[Any], progress: Callable[[int, int, str], None] | None = None) -> int:
        n = self._gpu.prepare(tapes, progress)
        of_cpu, self._tapes = self._tapes, []
        return n + (self._cpu.prepare(of_cpu, progress) if of_cpu else 0)

    def experts(self, run: Any, x: Any, ids: Any, weights: Any, gate: Any, up: Any, down: Any, out: Any) -> None:
        """As the op; gate, up and down are on the card, or they are tensors of the file."""
        if not isinstance(gate, QuantTensor):
            self._gpu.experts(run, x, ids, weights, gate, up, down, out)
            return
        types = [w.type.id for w in (gate, up, down)]
        if x.shape[0] >= STREAM_TOKENS and self._gpu.can_stream(run, types, x.shape[0]):
            self._gpu.experts_streamed(run, x, ids, weights, gate, up, down, out)
            return
        pinned = run.beside.arrays(self._gpu.arrays, x, ids, weights, out)
        for to, a in zip(pinned, (x, ids, weights, out)):
            run.copy(to, a)
        on_cpu = run.beside.run
        self._cpu.experts(on_cpu, *pinned[:3], gate, up, down, pinned[3])
        tape = on_cpu.take()
        self._tapes.append(tape)

        def compute() -> None:
            on_cpu.cancel = run.cancel  # a batch lends its own to its streams
            on_cpu.replay(tape)

        run.call(compute)
        run.copy(out, pinned[3])


class Beside:
    """The CPU's run beside a card's, and the pinned arrays between them."""

    def __init__(self, run: Any):
        self.run = run
        self._pinned: dict[Any, list[np.ndarray]] = {}

    def arrays(self, where: ModuleType, *of_card: Any) -> list[np.ndarray]:
        """Pinned arrays for these, the same ones for the same shapes."""
        shapes = tuple(a.shape for a in of_card)
        if shapes not in self._pinned:
            self._pinned[shapes] = [where.mirror(a.shape, a.dtype).host for a in of_card]
        return self._pinned[shapes]
