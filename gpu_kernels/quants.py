"""Quantised weights on the device: the blocks of the file, taken apart into planes.

A Q6_K block has 210 bytes and a Q8_0 block 34: a thread that loads 16 bytes at once would meet them unaligned. So each
field of all blocks becomes an array of its own, once, at upload; cuda/blocks.cuh draws them. Q4_K blocks (144 bytes,
the header 16) and those of Q5_K (176) stay as they are. The bits of a value do not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ALIGNMENT = 256  # of a plane


@dataclass(frozen=True)
class Format:
    """A ggml type: values and bytes of a block, and (offset, bytes) of each plane in it. Floats: blocks of 32."""

    name: str
    type_id: int
    block: int
    nbytes: int
    planes: tuple[tuple[int, int], ...]
    step: int  # values that a thread decodes at once

    @property
    def is_float(self) -> bool:
        return self.type_id in (0, 1, 30)


FORMATS: dict[int, Format] = {
    f.type_id: f
    for f in (
        Format("F32", 0, 32, 128, ((0, 128),), 8),
        Format("F16", 1, 32, 64, ((0, 64),), 8),
        Format("BF16", 30, 32, 64, ((0, 64),), 8),
        Format("Q4_0", 2, 32, 18, ((2, 16), (0, 2)), 32),
        Format("Q4_1", 3, 32, 20, ((4, 16), (0, 4)), 32),
        Format("Q5_0", 6, 32, 22, ((6, 16), (2, 4), (0, 2)), 32),
        Format("Q5_1", 7, 32, 24, ((8, 16), (4, 4), (0, 4)), 32),
        Format("Q8_0", 8, 32, 34, ((2, 32), (0, 2)), 32),
        Format("Q2_K", 10, 256, 84, ((16, 64), (0, 16), (80, 4)), 64),
        Format("Q3_K", 11, 256, 110, ((32, 64), (0, 32), (96, 12), (108, 2)), 64),
        Format("Q4_K", 12, 256, 144, ((0, 144),), 64),
        Format("Q5_K", 13, 256, 176, ((0, 176),), 64),
        Format("Q6_K", 14, 256, 210, ((0, 128), (128, 64), (192, 16), (208, 2)), 64),
        Format("IQ4_NL", 20, 32, 18, ((2, 16), (0, 2)), 32),
        Format("IQ4_XS", 23, 256, 136, ((8, 128), (0, 8)), 64),
    )
}


@dataclass(frozen=True)
class Weight:
    """A weight on the device.

    type    has an id, ggml's
    shape   (…, rows, k)
    data    flat u8: the planes, one after another
    planes  where the second, third and fourth plane begin; 0 where there is none
    """

    type: Any
    shape: tuple[int, ...]
    data: Any
    planes: tuple[int, int, int]

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes)


def format_of(type_id: int) -> Format:
    """ValueError for a type without a GPU kernel."""
    if type_id not in FORMATS:
        names = ", ".join(f.name for f in FORMATS.values())
        raise ValueError(f"ggml type {type_id} has no GPU kernel; supported: {names}; use the CPU, or requantise")
    return FORMATS[type_id]


def planes_of(f: Format, n_blocks: int) -> list[int]:
    """Where each plane of so many blocks begins, and where the last ends, in bytes."""
    starts = [0]
    for _, n in f.planes:
        starts.append(starts[-1] + -(-n_blocks * n // ALIGNMENT) * ALIGNMENT)
    return starts


def weight_of(kind: Any, shape: Sequence[int], data: Any, starts: Sequence[int]) -> Weight:
    """Planes at data, which begin (and end) where planes_of says; kind: what has ggml's id."""
    second, third, fourth = (*starts[1:-1], 0, 0, 0)[:3]
    return Weight(kind, tuple(shape), data, (second, third, fourth))
