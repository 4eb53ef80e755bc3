"""What one step over n_tok tokens works on: its inputs, its intermediate arrays, the queue that it fills.

A step is recorded (ops queue jobs on `run`) and then executed. Inputs that change from step to step (token ids,
positions, n_kv, angles) are arrays that kernels read, so the recording of a short step serves for all later ones.
"""

from __future__ import annotations

from math import prod
from types import ModuleType
from typing import Any

import numpy as np


class Buffers:
    """Arrays of one stream by name, for up to n_rows tokens; later steps reuse them."""

    def __init__(self, n_rows: int):
        self.n_rows = n_rows
        self._arrays: dict[str, np.ndarray] = {}

    def get(self, name: str, width: int, dtype: Any) -> np.ndarray:
        array = self._arrays.get(name)
        if array is None or array.shape[1] < width:
            array = self._arrays[name] = np.zeros((self.n_rows, width), dtype)
        return array


class Step:
    """One step of n_tok tokens after n_past.

    mha       attention in MHA mode (expanded K and V) rather than absorbed; n_past is then part of the recording
    tokens, positions, n_kv   (n_tok,) int32      cos_sin   (n_tok, n_rot) f32      x   (n_tok, n_embd) f32
    """

    def __init__(
        self, ops: ModuleType, run: Any, buffers: Buffers, n_tok: int, n_past: int, mha: bool, type_k: str, n_rot: int,
        n_embd: int,
    ):  # fmt: skip
        self.ops, self.run, self.type_k = ops, run, type_k
        self.n_tok, self.n_past, self.mha = n_tok, n_past, mha
        self._buffers = buffers
        self.tokens, self.positions, self.n_kv = (
            buffers.get(name, 1, np.int32)[:n_tok, 0] for name in ("tokens", "positions", "n_kv")
        )
        self.cos_sin = self.array("cos_sin", n_rot)
        self.x = self.array("x", n_embd)

    def array(self, name: str, *shape: int, dtype: Any = np.float32) -> np.ndarray:
        """(n_tok, *shape), contents undefined; the same memory for the same name in every layer."""
        width = prod(shape)
        flat = self._buffers.get(f"{name}{shape}", width, dtype)[: self.n_tok]
        return flat.reshape(self.n_tok, *shape)
