"""What one step over n_tok tokens works on: its inputs, its intermediate arrays, the queue that it fills.

A step is recorded (ops queue jobs on `run`) and then executed. Inputs that change from step to step (token ids,
positions, n_kv, angles) are arrays that kernels read, so the recording of a short step serves for all later ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from types import ModuleType
from typing import Any

import numpy as np

from . import host
from .hparams import HParams
from .k_cache import KCache
from .layers.rope import fill_cos_sin

Part = tuple[slice, list[np.ndarray]]


class Buffers:
    """Arrays of one stream by name, for up to n_rows tokens; later steps reuse them.

    arrays     where they lie
    n_absorbed tokens of the longest step that absorbs; None: n_rows. What only such steps need has no more rows
    """

    def __init__(self, n_rows: int, arrays: ModuleType = host, n_absorbed: int | None = None):
        self.n_rows, self.arrays = n_rows, arrays
        self.n_absorbed = n_rows if n_absorbed is None else min(n_absorbed, n_rows)
        self._known: dict[str, Any] = {}
        self._inputs: Any = None

    def get(self, name: str, width: int, dtype: Any, n_rows: int) -> Any:
        array = self._known.get(name)
        if array is None or array.shape[1] < width:
            array = self._known[name] = self.arrays.zeros((n_rows, width), dtype)
        return array

    def inputs(self, n_tok: int, width: int) -> Any:
        """A mirror of (n_tok * width,) int32."""
        if self._inputs is None:
            self._inputs = self.arrays.mirror((self.n_rows * width,), np.int32)
        return self._inputs.first(n_tok * width)

    @property
    def nbytes(self) -> int:
        inputs = 0 if self._inputs is None else self._inputs.host.nbytes
        return inputs + sum(int(array.nbytes) for array in self._known.values())


class Inputs:
    """What changes from step to step, views of one array of int32 words, so that one copy brings it to a card.

    tokens, positions, n_kv   (n_tok,) int32
    cos_sin                   (n_tok, n_rot) f32
    """

    def __init__(self, words: Any, n_tok: int, n_rot: int):
        self.cos_sin = words[: n_tok * n_rot].view(np.float32).reshape(n_tok, n_rot)
        self.tokens, self.positions, self.n_kv = words[n_tok * n_rot :].reshape(3, n_tok)


class Step:
    """One step of n_tok tokens.

    parts   (slice of the tokens, rows by layer) for each cache that takes part: one, or one for each stream of a batch
    n_past  tokens of that one cache before the step; part of the recording in MHA mode
    mha     attention in MHA mode (expanded K and V) rather than absorbed
    tokens, positions, n_kv   (n_tok,) int32; positions are rows of the cache
    cos_sin (n_tok, n_rot) f32      x (n_tok, n_embd) f32
    """

    def __init__(
        self, ops: ModuleType, run: Any, buffers: Buffers, hp: HParams, parts: Sequence[Part], type_k: str,
        n_past: int = 0, mha: bool = False,
    ):  # fmt: skip
        self.ops, self.run, self.type_k = ops, run, type_k
        self.parts, self.n_past, self.mha = parts, n_past, mha
        self.n_tok = parts[-1][0].stop
        self._buffers = buffers
        self._inv_freq, self._magnitude = hp.inv_freq, hp.rope_magnitude
        self.mirror = buffers.inputs(self.n_tok, hp.n_rot + 3)
        self._filled = Inputs(self.mirror.host, self.n_tok, hp.n_rot)
        inputs = Inputs(self.mirror.here, self.n_tok, hp.n_rot)
        self.tokens, self.positions, self.n_kv, self.cos_sin = (
            inputs.tokens, inputs.positions, inputs.n_kv, inputs.cos_sin
        )  # fmt: skip
        self.x = self.array("x", hp.n_embd)

    def fill(self, some: slice, tokens: np.ndarray, cache: KCache) -> None:
        """What one part of the step is to be: tokens that go to the end of a cache."""
        to = self._filled
        to.tokens[some] = tokens
        rows = cache.n_kv + np.arange(len(tokens))
        to.positions[some] = rows
        to.n_kv[some] = rows + 1
        fill_cos_sin(rows + cache.first_position, self._inv_freq, self._magnitude, to.cos_sin[some])

    def array(self, name: str, *shape: int, dtype: Any = np.float32) -> np.ndarray:
        """(n_tok, *shape), contents undefined; the same memory for the same name in every layer."""
        return self._array(name, shape, dtype, self._buffers.n_rows)

    def absorbed(self, name: str, *shape: int) -> np.ndarray:
        """The same, for what steps in MHA mode do not need."""
        return self._array(name, shape, np.float32, self._buffers.n_absorbed)

    def _array(self, name: str, shape: tuple[int, ...], dtype: Any, n_rows: int) -> np.ndarray:
        flat = self._buffers.get(f"{name}{shape}", prod(shape), dtype, n_rows)[: self.n_tok]
        return flat.reshape(self.n_tok, *shape)
