"""launch(): one kernel on a stream, by CUDA's driver: cuLaunchKernelEx through ctypes.

CuPy launches kernels, too, but not so that one may begin while the one before it is ending (from Hopper on): its blocks
take their places and wait at AFTER_PREVIOUS, which _compile.py puts at the beginning of every kernel. H100, V2-Lite, a
token's 805 kernels in one graph: 3.09 -> 2.58 ms.

Arguments are packed as C lays out a struct: None and arrays are addresses, a Python int has 32 bits, a float is an f32,
and `wide` has 64 bits, which strides in values or bytes take.

Source: CUDA driver API, cuLaunchKernelEx, CU_LAUNCH_PARAM_BUFFER_POINTER, programmatic stream serialization.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from .check import address

wide = np.int64
OVERLAPS = 90  # compute capability from which a kernel may begin before the end of the one before
_SERIALIZATION, _BUFFER, _SIZE, _END = 6, 1, 2, 0
_CODES = {int: "i", float: "f", wide: "q"}


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("n_attributes", ctypes.c_uint),
    )


def packed(args: Sequence[Any]) -> bytes:
    """The arguments of a kernel as the bytes of a struct."""
    codes, values = [], []
    for arg in args:
        code = _CODES.get(type(arg), "P")
        codes.append(code)
        values.append(arg if code != "P" else 0 if arg is None else address(arg))
    return _struct("@" + "".join(codes)).pack(*values)


@functools.cache
def _struct(codes: str) -> struct.Struct:
    return struct.Struct(codes)


@functools.cache
def _library() -> Any:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


_overlap = _Attribute(_SERIALIZATION, 0, (ctypes.c_int * 16)(1))


def launch(
    function: int, grid: tuple[int, ...], threads: int, shared: int, stream: int, args: Sequence[Any], overlaps: bool
) -> None:
    """function and stream: the driver's handles. RuntimeError with the driver's number if it refuses."""
    arguments = packed(args)
    size = ctypes.c_size_t(len(arguments))
    buffer = ctypes.create_string_buffer(arguments, len(arguments))
    extra = (ctypes.c_void_p * 5)(_BUFFER, ctypes.addressof(buffer), _SIZE, ctypes.addressof(size), _END)
    config = _Config(
        (ctypes.c_uint * 3)(*(*grid, 1, 1)[:3]), (ctypes.c_uint * 3)(threads, 1, 1), shared, stream,
        ctypes.pointer(_overlap), int(overlaps),
    )  # fmt: skip
    error = _library().cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(function), None, extra)
    if error:
        raise RuntimeError(f"CUDA refused to launch a kernel: error {error}")
