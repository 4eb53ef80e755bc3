"""Random quantised weights as the kernels take them, with their values; and random activations."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
from gguf import GGMLQuantizationType, quants
from synthetic import quantise

F32, Q8_0, Q4_K, Q6_K, BF16 = 0, 8, 12, 14, 30


@dataclass
class Weight:
    data: np.ndarray
    type: SimpleNamespace
    shape: tuple[int, ...]
    values: np.ndarray  # float64, dequantised


def weight(type_id: int, *shape: int, seed: int = 0) -> Weight:
    kind = GGMLQuantizationType(type_id)
    x = np.random.default_rng(seed).standard_normal((int(np.prod(shape[:-1])), shape[-1])) / np.sqrt(shape[-1])
    data = quantise(x.astype(np.float32), kind).view(np.uint8).reshape(len(x), -1)
    values = quants.dequantize(data, kind).astype(np.float64).reshape(shape)
    return Weight(data.reshape(*shape[:-1], -1), SimpleNamespace(id=type_id), shape, values)


def rows(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
