"""GGUF files: `read(path)` gives metadata and zero-copy tensors, or a ModelFormatError.

    "GGUF" u32 version, u64 n_tensors, u64 n_kv │ n_kv × (key, u32 type, value) │ n_tensors × (name, u32 n_dims,
    u64 dims[], u32 type, u64 offset) │ padding to the alignment │ tensor data, each padded to the alignment

A file is untrusted: sizes and counts are checked against what is left of the file, and against caps, before anything is
allocated, and all arithmetic is on Python ints, which do not wrap. Tensors must lie one after another without gaps or
overlaps, as every writer lays them out. Weights are never copied: a tensor is a view of the read-only mapping.

Source: ggml/src/gguf.cpp of llama.cpp (layout and checks); the caps are ours.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, overload

import numpy as np

from .errors import ModelFormatError
from .tensor import KNOWN_TYPES, REMOVED_TYPES, GGMLType, QuantTensor

MIB = 1 << 20
MAX_KEYS = 4096
MAX_TENSORS = 65536
MAX_PARTS = 1024
MAX_KEY_BYTES = 1024
MAX_STRING_BYTES = 16 * MIB
MAX_TEMPLATE_BYTES = MIB
MAX_ARRAY_BYTES = 512 * MIB
MAX_METADATA_BYTES = 1024 * MIB
MAX_ARRAY_STRINGS = 1 << 23  # of all arrays together: a list entry costs more memory than its bytes in the file
MAX_NAME_BYTES = 63
MAX_DIMS = 4
MAX_DIM = 1 << 31
MIN_ALIGNMENT = 8

_T = TypeVar("_T")
_D = TypeVar("_D")
_REQUIRED: Any = object()

_u32 = struct.Struct("<I").unpack_from
_u64 = struct.Struct("<Q").unpack_from

_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS = {  # GGUF type id: (name, layout)
    0: ("u8", struct.Struct("<B")),
    1: ("i8", struct.Struct("<b")),
    2: ("u16", struct.Struct("<H")),
    3: ("i16", struct.Struct("<h")),
    4: ("u32", struct.Struct("<I")),
    5: ("i32", struct.Struct("<i")),
    6: ("f32", struct.Struct("<f")),
    _BOOL: ("bool", struct.Struct("<B")),
    10: ("u64", struct.Struct("<Q")),
    11: ("i64", struct.Struct("<q")),
    12: ("f64", struct.Struct("<d")),
}
_KIND_NAMES: dict[type, str] = {
    int: "an integer",
    float: "a float",
    bool: "a bool",
    str: "a string",
    list: "an array of strings",
    np.ndarray: "an array of numbers",
}


def read(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF file, all its parts if it is split. Raises ModelFormatError and nothing else."""
    first = _read_part(Path(path))
    if first.get("split.count", int, 1) == 1:
        return first
    return _read_other_parts(first)


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """What a GGUF file holds; of a split file all parts' tensors, and the first part's metadata."""

    path: Path
    version: int
    nbytes: int  # of all parts on disk
    metadata: dict[str, Any]  # int, float, bool, str, list[bytes] (array of strings) or np.ndarray (of numbers)
    metadata_types: dict[str, str]  # GGUF's type of each value: "u32", "string", "array of f32", …
    tensors: dict[str, QuantTensor]

    @overload
    def get(self, key: str, kind: type[_T]) -> _T: ...

    @overload
    def get(self, key: str, kind: type[_T], default: _D) -> _T | _D: ...

    def get(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """The value of `key`, which must be of `kind`: int, float, bool, str, list (of bytes) or np.ndarray.

        Without a default the key is required. Any width of integer is an int; a bool or a float is not.
        """
        value = self.metadata.get(key, _REQUIRED)
        if value is _REQUIRED:
            if default is _REQUIRED:
                raise ModelFormatError(f"{self.path}: key {key!r} is missing; expected {_KIND_NAMES[kind]}")
            return default
        if type(value) is not kind:
            raise ModelFormatError(
                f"{self.path}: key {key!r} has type {self.metadata_types[key]}, expected {_KIND_NAMES[kind]}"
            )
        return value


def _read_part(path: Path) -> GGUFFile:
    reader = _Reader(path, _map_file(path))
    version, n_tensors, n_kv = reader.header()
    metadata, types = reader.metadata(n_kv)
    alignment = reader.alignment(metadata, types)
    tensors = reader.tensors(n_tensors, alignment)
    return GGUFFile(path, version, reader.size, metadata, types, tensors)


def _map_file(path: Path) -> mmap.mmap:
    try:
        # Before open(): opening a pipe would wait for a writer.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ModelFormatError(f"{path}: is a directory or a device, expected a GGUF file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise ModelFormatError(f"{path}: the file is empty, expected a GGUF file")
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ModelFormatError(f"{path}: no such file") from None
    except OSError as error:
        raise ModelFormatError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, OverflowError) as error:  # a NUL in the path; a file larger than the address space
        raise ModelFormatError(f"{str(path)!r}: cannot be opened: {error}") from error


class _Reader:
    """A cursor over the mapped file which knows what it is reading, for the error messages."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.pos = 0
        self.where = "header"
        self.n_strings = 0

    def fail(self, what: str) -> NoReturn:
        raise ModelFormatError(f"{self.path}: {self.where} (at byte {self.pos:,}): {what}")

    def take(self, n: int, what: str) -> int:
        """Step over n bytes; the position where they begin."""
        start = self.pos
        if n > self.size - start:
            self.fail(f"{what} needs {n:,} bytes, but only {self.size - start:,} are left in the file")
        self.pos = start + n
        return start

    def u32(self, what: str) -> int:
        return int(_u32(self.data, self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_u64(self.data, self.take(8, what))[0])

    def string(self, limit: int, what: str) -> bytes:
        n = self.u64(f"the length of {what}")
        if n > limit:
            self.fail(f"{what} says it is {n:,} bytes long, expected at most {limit:,}")
        start = self.take(n, what)
        return self.data[start : start + n]

    def name(self, limit: int, what: str) -> str:
        raw = self.string(limit, what)
        if not raw:
            self.fail(f"{what} is empty")
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.fail(f"{what} {raw!r} is not UTF-8")

    def header(self) -> tuple[int, int, int]:
        magic = self.data[:4]
        if magic != b"GGUF":
            self.fail(f"found {magic!r} where a GGUF file begins with b'GGUF'")
        self.take(4, "the magic")
        version = self.u32("the version")
        if version & 0xFFFF == 0:
            self.fail("the file is big-endian; only little-endian GGUF files are read")
        if version not in (2, 3):
            self.fail(f"GGUF version {version}, expected 2 or 3; convert the model again")
        n_tensors = self.u64("the number of tensors")
        if n_tensors > MAX_TENSORS:
            self.fail(f"{n_tensors:,} tensors, expected at most {MAX_TENSORS:,}")
        n_kv = self.u64("the number of keys")
        if n_kv > MAX_KEYS:
            self.fail(f"{n_kv:,} keys, expected at most {MAX_KEYS:,}")
        return version, n_tensors, n_kv

    def metadata(self, n_kv: int) -> tuple[dict[str, Any], dict[str, str]]:
        metadata: dict[str, Any] = {}
        types: dict[str, str] = {}
        begin = self.pos
        for i in range(n_kv):
            self.where = f"key {i + 1} of {n_kv}"
            key = self.name(MAX_KEY_BYTES, "the key")
            if key in metadata:
                self.fail(f"the key {key!r} is there twice")
            self.where = f"key {key!r}"
            types[key], metadata[key] = self.value(key)
            if self.pos - begin > MAX_METADATA_BYTES:
                self.fail(f"the metadata is larger than {MAX_METADATA_BYTES // MIB} MiB")
        return metadata, types

    def value(self, key: str) -> tuple[str, Any]:
        """(type in words, value) of a key."""
        kind = self.u32("the type")
        if kind == _STRING:
            limit = MAX_TEMPLATE_BYTES if key.startswith("tokenizer.chat_template") else MAX_STRING_BYTES
            return "string", self.string(limit, "the string").decode(errors="replace")
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            self.fail(f"value type {kind}, expected 0 to 12")
        name, layout = _SCALARS[kind]
        value = layout.unpack_from(self.data, self.take(layout.size, "the value"))[0]
        if kind == _BOOL:
            if value > 1:
                self.fail(f"a bool of value {value}, expected 0 or 1")
            value = bool(value)
        return name, value

    def array(self) -> tuple[str, list[bytes] | np.ndarray]:
        kind = self.u32("the element type")
        n = self.u64("the number of elements")
        if kind == _STRING:
            return "array of strings", self.strings(n)
        if kind == _ARRAY:
            self.fail("an array of arrays, which GGUF writers do not make")
        if kind not in _SCALARS:
            self.fail(f"array element type {kind}, expected 0 to 12")
        name, layout = _SCALARS[kind]
        nbytes = n * layout.size
        if nbytes > MAX_ARRAY_BYTES:
            self.fail(f"an array of {n:,} {name} values, expected at most {MAX_ARRAY_BYTES // MIB} MiB")
        start = self.take(nbytes, f"an array of {n:,} {name} values")
        values = np.frombuffer(self.data[start : start + nbytes], np.uint8 if kind == _BOOL else layout.format)
        if kind == _BOOL:
            if n and values.max() > 1:
                self.fail(f"a bool of value {values.max()}, expected 0 or 1")
            values = values.view(np.bool_)
        return f"array of {name}", values

    def strings(self, n: int) -> list[bytes]:
        self.n_strings += n
        if self.n_strings > MAX_ARRAY_STRINGS:
            self.fail(f"arrays of {self.n_strings:,} strings in all, expected at most {MAX_ARRAY_STRINGS:,}")
        if n * 8 > self.size - self.pos:
            self.fail(f"an array of {n:,} strings, but only {self.size - self.pos:,} bytes are left in the file")
        # The loop of 300,000 rounds in every start: hence local names, and one comparison for all that can be wrong.
        data, pos, u64 = self.data, self.pos, _u64
        end = min(self.size, pos + MAX_ARRAY_BYTES)
        last = end - 8
        out: list[bytes] = []
        append = out.append
        for _ in range(n):
            if pos > last:
                break
            begin = pos + 8
            pos = begin + u64(data, pos)[0]
            if pos > end:
                pos = begin - 8
                break
            append(data[begin:pos])
        self.pos = pos
        if len(out) < n:
            self.fail(
                f"string {len(out):,} of an array of {n:,} ends beyond the file, or beyond {MAX_ARRAY_BYTES // MIB} MiB"
            )
        return out

    def alignment(self, metadata: dict[str, Any], types: dict[str, str]) -> int:
        self.where = "key 'general.alignment'"
        if types.get("general.alignment", "u32") != "u32":
            self.fail(f"type {types['general.alignment']}, expected u32")
        alignment: int = metadata.get("general.alignment", 32)
        if alignment < MIN_ALIGNMENT or alignment & (alignment - 1):
            self.fail(f"value {alignment}, expected a power of two of at least {MIN_ALIGNMENT}")
        return alignment

    def tensors(self, n_tensors: int, alignment: int) -> dict[str, QuantTensor]:
        # (name, type, shape, offset, nbytes) first: where the data begins is known only after the last of them
        infos: dict[str, tuple[GGMLType, tuple[int, ...], int, int]] = {}
        expected_offset = 0
        for i in range(n_tensors):
            self.where = f"tensor {i + 1} of {n_tensors}"
            name = self.name(MAX_NAME_BYTES, "the name")
            if name in infos:
                self.fail(f"the tensor {name!r} is there twice")
            self.where = f"tensor {name!r}"
            ggml_type, shape, nbytes = self.type_and_shape()
            offset = self.u64("the offset")
            if offset != expected_offset:
                self.fail(f"offset {offset:,}, expected {expected_offset:,} (one tensor after another, aligned)")
            infos[name] = ggml_type, shape, offset, nbytes
            expected_offset += -(-nbytes // alignment) * alignment
        begin = -(-self.pos // alignment) * alignment
        data = np.frombuffer(self.data, np.uint8)  # keeps the mapping alive, as do its views
        tensors = {}
        for name, (ggml_type, shape, offset, nbytes) in infos.items():
            start = begin + offset
            if start + nbytes > self.size:
                self.where = f"tensor {name!r}"
                self.fail(
                    f"its data ends at byte {start + nbytes:,}, but the file ends at {self.size:,}: "
                    "the file is cut off; download it again"
                )
            rows = data[start : start + nbytes].reshape(*shape[:-1], ggml_type.row_bytes(shape[-1]))
            tensors[name] = QuantTensor(name, ggml_type, shape, rows)
        return tensors

    def type_and_shape(self) -> tuple[GGMLType, tuple[int, ...], int]:
        """(type, shape in numpy order, bytes) of a tensor info."""
        n_dims = self.u32("the number of dimensions")
        if not 1 <= n_dims <= MAX_DIMS:
            self.fail(f"{n_dims} dimensions, expected 1 to {MAX_DIMS}")
        dims = [self.u64("a dimension") for _ in range(n_dims)]
        n_values = 1
        for n in dims:
            if not 1 <= n <= MAX_DIM:
                self.fail(f"dimensions {dims}, expected each from 1 to {MAX_DIM:,}")
            n_values *= n
        type_id = self.u32("the type")
        if type_id in REMOVED_TYPES:
            self.fail(f"tensor type {type_id}, which ggml has removed; convert the model again")
        if type_id not in KNOWN_TYPES:
            self.fail(f"tensor type {type_id}, which is not known here (known: 0 to {max(KNOWN_TYPES)})")
        ggml_type = KNOWN_TYPES[type_id]
        if dims[0] % ggml_type.block:
            self.fail(f"rows of {dims[0]:,} values, expected a multiple of {ggml_type.block} for {ggml_type.name}")
        nbytes = n_values // ggml_type.block * ggml_type.nbytes
        if max(n_values, nbytes) >= 1 << 63:
            self.fail(f"dimensions {dims} make more than 2**63 values or bytes")
        return ggml_type, tuple(reversed(dims)), nbytes


def _read_other_parts(first: GGUFFile) -> GGUFFile:
    """The whole of a split file; the names of its parts are made from the first one's, in the same folder."""
    path = first.path
    count = first.get("split.count", int)
    if not 1 < count <= MAX_PARTS:
        raise ModelFormatError(f"{path}: key 'split.count' is {count}, expected 1 to {MAX_PARTS}")
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name, re.DOTALL)
    if match is None or int(match[3]) != count:
        raise ModelFormatError(
            f"{path}: is part of a model of {count} files, expected a name like model-00001-of-{count:05}.gguf"
        )
    names = [f"{match[1]}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]
    if path.name != names[0]:
        raise ModelFormatError(f"{path}: is part {int(match[2])} of {count}; open the first part, {names[0]}")
    parts = [first] + [_read_part(path.with_name(name)) for name in names[1:]]
    tensors: dict[str, QuantTensor] = {}
    for i, part in enumerate(parts):
        _check_split_key(part, "split.no", i)
        _check_split_key(part, "split.count", count)
        for name in part.tensors.keys() & tensors.keys():
            raise ModelFormatError(f"{part.path}: tensor {name!r} is also in an earlier part")
        tensors |= part.tensors
    _check_split_key(first, "split.tensors.count", len(tensors))
    return GGUFFile(path, first.version, sum(p.nbytes for p in parts), first.metadata, first.metadata_types, tensors)


def _check_split_key(part: GGUFFile, key: str, expected: int) -> None:
    found = part.get(key, int)
    if found != expected:
        raise ModelFormatError(f"{part.path}: key {key!r} is {found}, expected {expected}")
