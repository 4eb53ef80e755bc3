"""The K-cache: one row per token and layer, and no V anywhere.

    K-cache of one layer: (n_ctx, row_stride) bytes      row of one token
                                                        ┌─────────────────────────────┬──────────────┐
      token 0   ─────────────────────────────────►      │ latent  kv_lora_rank = 512  │ rope n_rot=64│
      …                                                 └─────────────────────────────┴──────────────┘
      n_kv - 1                                            ▲ V is this part of the same bytes

    type_k   latent                                      rope      after it             bytes (512 + 64)
    f16      f16, after RMS norm and its weight          f16                            1152
    bf16     bf16, the same                              bf16                           1152
    q8       int8 (stored as value + 128) of the norm    bf16      f32 scale, padding   656
             before its weight, times a Hadamard matrix

Rows have a stride that is a multiple of 16 bytes; each layer starts on a page. Every other file that needs one of
these numbers asks KCacheLayout; kernels get plain integers from it.

Why q8 is so: with one scale per row, scores and values are plain int8 dot products, and the Hadamard matrix makes that
safe for uneven columns. Relative error of scores over rows of 512 with uneven weights and six outliers (in brackets: of
what attention gives, over 500 tokens of the default model, whose columns are even): 0.8 % (0.49 %); without the matrix
2.2 % (0.49 %); with a scale per 32 values 0.9 % (0.40 %). The rope in f16 rather than bf16 would take the whole path,
int8 queries included, from 0.60 % to 0.52 %, and off the bf16 dot product.

Context shift: tokens after the first n_keep are dropped. Attention sees differences of positions only, so the rows
after the gap stay as they are, at the positions they have, and the n_keep rows before it move up: their rope part is
turned, always from what was stored first. A hundred shifts round as often as one, and a long tail is moved but not
rewritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from . import host
from .errors import EngineError

TYPES_K = ("f16", "bf16", "q8")
DEFAULT_TYPE_K = "q8"  # no further from float64 than f16 (README), 0.57 of its memory, and the fastest of the three


@dataclass(frozen=True)
class KCacheLayout:
    """One row, and what follows from it. Sizes in bytes unless they count values."""

    n_layer: int
    n_ctx: int
    kv_lora_rank: int
    n_rot: int
    type_k: str = "f16"

    def __post_init__(self) -> None:
        if self.type_k not in TYPES_K:
            raise EngineError(f"type_k is {self.type_k!r}; expected one of {', '.join(TYPES_K)}")
        for name in ("n_layer", "n_ctx", "kv_lora_rank", "n_rot"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise EngineError(f"{name} is {value!r}; expected a positive integer")

    @property
    def latent_nbytes(self) -> int:
        return self.kv_lora_rank * (1 if self.type_k == "q8" else 2)

    @property
    def rope_offset(self) -> int:
        return self.latent_nbytes

    @property
    def scale_offset(self) -> int:
        """Where q8 keeps the row's f32 scale."""
        return self.rope_offset + 2 * self.n_rot

    @property
    def row_stride(self) -> int:
        used = self.scale_offset + (4 if self.type_k == "q8" else 0)
        return -(-used // 16) * 16

    @property
    def bytes_per_token(self) -> int:
        """Of all layers."""
        return self.n_layer * self.row_stride

    @property
    def nbytes(self) -> int:
        """Of n_ctx tokens in all layers."""
        return self.n_ctx * self.bytes_per_token


class KCache:
    """The rows of one stream: `rows[il]` is (n_ctx, row_stride) u8, of which the first n_kv are filled.

    Row i holds the token at position first_position + i.

    arrays   where they lie: host.py, or gpu_kernels' arrays.py
    """

    def __init__(self, layout: KCacheLayout, arrays: ModuleType = host):
        self.layout, self._arrays = layout, arrays
        self.n_kv = 0
        self.first_position = 0
        self.head = Head.none(layout)
        try:
            layers = arrays.layers(layout.n_layer, layout.n_ctx * layout.row_stride)
        except MemoryError as error:
            size = f"{layout.nbytes / 2**20:,.0f} MiB"
            raise EngineError(f"no room for a K-cache of {size} ({error}); lower n_ctx, or take type_k q8") from None
        self.rows = [layer.reshape(layout.n_ctx, -1) for layer in layers]

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that are filled."""
        return self.n_kv * self.layout.bytes_per_token

    def append(self, n: int) -> None:
        """The next n rows have been written in every layer."""
        assert 0 <= n <= self.layout.n_ctx - self.n_kv
        self.n_kv += n

    def truncate(self, n: int) -> None:
        """Keep the first n tokens; the rows after them may be written again."""
        if not isinstance(n, int | np.integer) or isinstance(n, bool) or not 0 <= n <= self.n_kv:
            raise EngineError(f"truncate({n!r}): expected 0 to n_kv = {self.n_kv}")
        self.n_kv = int(n)
        self.head = self.head.cut(self.n_kv)
        if not n:
            self.first_position = 0

    def check_drop(self, n_keep: int, n_discard: int) -> None:
        """EngineError unless drop() can do it."""
        for name, value in (("n_keep", n_keep), ("n_discard", n_discard)):
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 0:
                raise EngineError(f"shift: {name} is {value!r}; expected an integer, 0 or more")
        if int(n_keep) + int(n_discard) > self.n_kv:
            raise EngineError(f"shift: n_keep {n_keep} + n_discard {n_discard} are more than n_kv = {self.n_kv}")

    def drop(self, n_keep: int, n_discard: int) -> None:
        """Forget rows n_keep … n_keep + n_discard - 1; the ones after them move down, and keep their positions.

        So the first n_keep rows are to move up by n_discard positions: the caller turns their rope part, from `head`.
        """
        n_keep, n_discard = int(n_keep), int(n_discard)
        self.head = self._head(n_keep)
        for rows in self.rows:
            self._arrays.move(rows, n_keep, n_keep + n_discard, self.n_kv - n_keep - n_discard)
        self.n_kv -= n_discard
        self.first_position += n_discard

    def restore(self, rows: Sequence[np.ndarray], first_position: int) -> None:
        """Hold the first rows of others: rows[il] (n, row_stride) u8, n <= n_ctx, row 0 at first_position."""
        n = len(rows[0])
        assert n <= self.layout.n_ctx and len(rows) == self.layout.n_layer
        self.n_kv, self.head = 0, Head.none(self.layout)

        def copy(il: int) -> None:
            self._arrays.put(self.rows[il][:n], rows[il])

        with ThreadPoolExecutor() as pool:  # fresh pages take longer to come than bytes to copy
            list(pool.map(copy, range(self.layout.n_layer)))
        self.n_kv, self.first_position = n, first_position

    def layer(self, il: int, n: int) -> np.ndarray:
        """(n, row_stride) u8 in main memory: the first rows of a layer. Where that is their place, a view."""
        return self._arrays.get(self.rows[il][:n])

    def copy(self, n: int) -> list[np.ndarray]:
        """The first n rows of every layer, copied to main memory."""
        return [np.array(self.layer(il, n), copy=self._arrays is host) for il in range(self.layout.n_layer)]

    def repeat(self, n: int, n_kv: int) -> None:
        """Hold n_kv rows: the first n of them, again and again. For timing: as real as any."""
        for rows in self.rows:
            for start in range(n, n_kv, n):
                self._arrays.move(rows, start, 0, min(n, n_kv - start))
        self.n_kv = n_kv

    def release(self) -> None:
        """Give all memory back; the cache holds no rows afterwards."""
        self.n_kv, self.rows = 0, []

    def rope(self, il: int, rows: slice) -> np.ndarray:
        """(n, n_rot) u16: the rope part of some rows of a layer."""
        begin = self.layout.rope_offset
        return self._arrays.get(self.rows[il][rows])[:, begin : begin + 2 * self.layout.n_rot].view(np.uint16)

    def _head(self, n: int) -> Head:
        """The first n rows as they were stored at first, taken now where they have not been turned yet."""
        old, new = self.head.cut(n), slice(len(self.head.cut(n).positions), n)
        positions = np.arange(new.start, n) + self.first_position
        fresh = np.stack([self.rope(il, new) for il in range(self.layout.n_layer)])
        return Head(np.concatenate([old.rope, fresh], axis=1), np.concatenate([old.positions, positions]))


@dataclass(frozen=True)
class Head:
    """The rope part of a cache's first rows as first stored: shifts turn this, so that rounding never adds up.

    rope       (n_layer, n, n_rot) u16, f16 or bf16 as the cache has it
    positions  (n,) int64: what they were stored at
    """

    rope: np.ndarray
    positions: np.ndarray

    @classmethod
    def none(cls, layout: KCacheLayout) -> Head:
        return cls(np.zeros((layout.n_layer, 0, layout.n_rot), np.uint16), np.zeros(0, np.int64))

    def cut(self, n: int) -> Head:
        return self if n >= len(self.positions) else Head(self.rope[:, :n], self.positions[:n])
