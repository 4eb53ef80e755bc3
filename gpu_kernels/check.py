"""What wrappers ask of arrays (NumPy's or CuPy's) before a kernel gets their addresses; kernels check nothing."""

from __future__ import annotations

from typing import Any

import numpy as np


def array(name: str, a: Any, dtype: type, ndim: int, shape: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The shape of an array of this dtype whose last axis is contiguous; ValueError otherwise."""
    if a.dtype != dtype or a.ndim != ndim or (shape is not None and a.shape != shape):
        expected = shape if shape is not None else f"{ndim} axes"
        raise ValueError(f"{name} is {a.dtype} {a.shape}; expected {np.dtype(dtype)} {expected}")
    if a.ndim and a.shape[-1] > 1 and a.strides[-1] != a.itemsize:
        raise ValueError(f"{name} has strides {a.strides}; its last axis must be contiguous")
    return a.shape


def rows_f32(name: str, a: Any, ndim: int, shape: tuple[int, ...] | None = None) -> tuple[int, ...]:
    return array(name, a, np.float32, ndim, shape)


def steps(name: str, a: Any, multiple: int = 1) -> list[np.int64]:
    """The strides of all axes but the last, in values of four bytes, as a kernel takes them.

    multiple: so many values are loaded at once; ValueError where an address would not allow it.
    """
    unit = 4 * multiple
    if any(s % unit for s in a.strides[:-1]) or address(a) % unit:
        raise ValueError(f"{name} has strides {a.strides}; expected rows that start at multiples of {unit} bytes")
    return [np.int64(s // 4) for s in a.strides[:-1]]


def address(a: Any) -> int:
    """Of the first value, NumPy's or CuPy's."""
    return a.ctypes.data if isinstance(a, np.ndarray) else a.data.ptr
