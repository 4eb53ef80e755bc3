"""Raw GGUF bytes, in which any field can be made wrong: the hostile files that a well-behaved writer cannot make.

model = gguf_bytes([key("general.architecture", "deepseek2")], [RawTensor("x", (4, 2), data=bytes(32))])
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}

Value = bool | int | float | str | bytes | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bytes]


@dataclass(frozen=True)
class RawTensor:
    """A tensor info and its data; offset and n_dims are the right ones unless given."""

    name: str | bytes
    dims: Sequence[int]  # as in the file: ne0 first
    type: int = 0  # F32
    data: bytes = b""
    offset: int | None = None
    n_dims: int | None = None


def gguf_bytes(
    keys: Iterable[bytes] = (),
    tensors: Sequence[RawTensor] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_keys: int | None = None,
    alignment: int = 32,
    pad_last: bool = True,
) -> bytes:
    """A whole file; the counts are the right ones unless given."""
    keys = list(keys)
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    n_keys = len(keys) if n_keys is None else n_keys
    head = magic + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join(keys)
    data = b""
    for tensor in tensors:
        offset = len(data) if tensor.offset is None else tensor.offset
        n_dims = len(tensor.dims) if tensor.n_dims is None else tensor.n_dims
        head += string(tensor.name) + struct.pack(f"<I{len(tensor.dims)}Q", n_dims, *tensor.dims)
        head += struct.pack("<IQ", tensor.type, offset)
        data += tensor.data
        if pad_last or tensor is not tensors[-1]:
            data += bytes(-len(data) % alignment)
    return head + bytes(-len(head) % alignment) + data if tensors else head


def key(name: str | bytes, value: Value, kind: int | None = None) -> bytes:
    """A key; int is u32, float f32 and a sequence an array of such, unless `kind` says otherwise (of the elements)."""
    if isinstance(value, (bool, int, float, str, bytes)):
        kind = _kind_of(value) if kind is None else kind
        return raw_key(name, kind, _pack(value, kind))
    kind = _kind_of(value[0]) if kind is None else kind
    return raw_key(name, ARRAY, array(kind, len(value), b"".join(_pack(v, kind) for v in value)))


def raw_key(name: str | bytes, kind: int, payload: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + payload


def array(kind: int, n: int, elements: bytes) -> bytes:
    return struct.pack("<IQ", kind, n) + elements


def string(text: str | bytes, length: int | None = None) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def f32_tensor(name: str, *shape: int) -> RawTensor:
    values = np.arange(np.prod(shape), dtype="<f4")
    return RawTensor(name, tuple(reversed(shape)), data=values.tobytes())


def _kind_of(value: bool | int | float | str | bytes) -> int:
    if isinstance(value, bool):
        return BOOL
    if isinstance(value, int):
        return U32
    return F32 if isinstance(value, float) else STRING


def _pack(value: bool | int | float | str | bytes, kind: int) -> bytes:
    if isinstance(value, (str, bytes)):
        return string(value)
    return struct.pack("<" + _FORMATS[kind], value)
