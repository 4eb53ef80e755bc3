"""What wrappers ask of arrays before compiled code, which has no bounds checks, gets their addresses."""

from __future__ import annotations

import numpy as np


def array(name: str, a: np.ndarray, dtype: type, ndim: int, shape: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The shape of an array of this dtype whose last axis is contiguous; ValueError otherwise."""
    if a.dtype != dtype or a.ndim != ndim or (shape is not None and a.shape != shape):
        expected = shape if shape is not None else f"{ndim} axes"
        raise ValueError(f"{name} is {a.dtype} {a.shape}; expected {np.dtype(dtype)} {expected}")
    if a.ndim and a.shape[-1] > 1 and a.strides[-1] != a.itemsize:
        raise ValueError(f"{name} has strides {a.strides}; its last axis must be contiguous")
    return a.shape


def rows_f32(name: str, a: np.ndarray, ndim: int, shape: tuple[int, ...] | None = None) -> tuple[int, ...]:
    return array(name, a, np.float32, ndim, shape)
