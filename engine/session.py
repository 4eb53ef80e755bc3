"""Sessions on disk: `save(stream, path)` writes what a stream holds, `load(stream, path)` puts it into another.

    little-endian; every part begins at a multiple of 64 bytes, so that rows can be used where they lie (mmap)

        0  magic "konlyses" │ u32 version │ u32 crc of all before the rows, this field as 0 │ model digest (32)
       48  row layout tag (16) │ type_k (8) │ rope scaling (8)
       80  u32 n_layer, kv_lora_rank, n_rot, row_stride, n_ctx_orig, 0
      104  i64 n_kv, first position, bytes of the extra │ f64 rope base, factor, magnitude │ zeros
      192  token ids (n_kv) i32 │ crc of each layer (n_layer) u32 │ extra, JSON │ zeros up to the next 64
        …  rows of layer 0 (n_kv, row_stride) u8 │ zeros │ rows of layer 1 │ …      as KCacheLayout draws a row

Rows are the bytes of the K-cache, so a session that one backend wrote opens on another. The file takes the place of an
older one at once or not at all (atomic_file.py). Nothing in a file is believed: its size follows from its counts, and
both are checked before anything is allocated; nothing reaches the stream before the last check has passed.

Checksums are zlib's crc32, one for each layer, on as many threads as the stream has (it lets go of the GIL). On one
core of an AMD EPYC, cached data: crc32 1.7-3.9 GB/s, blake2b 0.45, sha256 0.8; a 64-bit polynomial in NumPy lanes
reaches 5, but the copy into a fresh cache is slower than either (1.5), so a hash of our own would gain little.

Source: the fields of llama.cpp's session file, and what it lacks: model, layout, rope, checksums.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import stat
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from .atomic_file import replacing
from .errors import SessionError
from .gguf_file import GGUFFile

if TYPE_CHECKING:
    from .stream import Stream

MAGIC = b"konlyses"
VERSION = 1
LAYOUT_TAG = "latent|rope"  # changes when the bytes of a row do
ALIGNMENT = 64
MAX_EXTRA_BYTES = 16 << 20
MAX_LAYERS, MAX_TOKENS = 512, 1 << 24  # as hparams.py and engine.py have them
MAX_POSITION = 1 << 31
PIECE = 16 << 20  # bytes of one write: Ctrl-C comes between two
SAMPLE = 64  # bytes of each tensor that go into the digest

_HEAD = struct.Struct("<8sII32s 16s8s8s 5I4x 3q 3d")
_CRC_AT = 12
_HEAD_NBYTES = 192


def save(stream: Stream, path: str | os.PathLike[str], extra: dict[str, Any] | None = None) -> None:
    """Write the stream's rows, tokens and position, and `extra` (whatever JSON can hold, up to 16 MiB), to a file.

    SessionError if it cannot be written: the path is then as it was.
    """
    _require_little_endian()
    path = _path(path)
    json_bytes = _to_json(path, extra)
    head = _Head.of(stream, len(json_bytes))
    tokens = np.array(stream.tokens, "<i4")
    assert len(tokens) == head.n_kv
    try:
        with replacing(path) as file, ThreadPoolExecutor(stream.n_threads) as pool:
            sums = []
            offset = head.rows_at
            for il in range(head.n_layer):
                layer = stream.cache.layer(il, head.n_kv)
                sums.append(pool.submit(_checksum, layer))
                file.seek(offset)
                _write(file, layer.reshape(-1).data)
                offset += _aligned(layer.nbytes)
            file.truncate(offset)
            file.seek(0)
            _write(
                file,
                head.pack(tokens.tobytes() + np.array([one.result() for one in sums], "<u4").tobytes() + json_bytes),
            )
    except OSError as error:
        raise _cannot_write(path, head.nbytes, error) from error


def load(stream: Stream, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Replace what the stream holds by a saved session; the `extra` that was saved with it.

    SessionError, with the stream unchanged, if the file is damaged, of another model, or does not fit n_ctx.
    """
    _require_little_endian()
    path = _path(path)
    data = np.frombuffer(_map(path), np.uint8)  # keeps the mapping, as its views do
    head, body = _Head.unpack(path, data)
    head.check_belongs_to(path, stream)
    sums_at, extra_at = 4 * head.n_kv, 4 * head.n_kv + 4 * head.n_layer
    tokens, sums = np.frombuffer(body, "<i4", head.n_kv), np.frombuffer(body, "<u4", head.n_layer, sums_at)
    if head.n_kv and not 0 <= tokens.min() <= tokens.max() < stream.hparams.n_vocab:
        raise SessionError(f"{path}: token ids from {tokens.min():,} to {tokens.max():,} are outside the vocabulary of"
                           f" {stream.hparams.n_vocab:,}; save the session again")  # fmt: skip
    extra = _from_json(path, body[extra_at : extra_at + head.extra_nbytes])
    layers = data[head.rows_at :].reshape(head.n_layer, -1)
    rows = [layer[: head.n_kv * head.row_stride].reshape(head.n_kv, head.row_stride) for layer in layers]
    with ThreadPoolExecutor(stream.n_threads) as pool:
        for il, found in enumerate(pool.map(_checksum, layers)):
            if found != sums[il]:
                raise SessionError(f"{path}: is damaged: the rows of layer {il} have checksum {found:08x}, expected"
                                   f" {sums[il]:08x}; save the session again")  # fmt: skip
    stream._restore(tokens.tolist(), head.first_position, rows)
    return extra


def digest(file: GGUFFile) -> bytes:
    """(32 bytes) What tells a model from others: its metadata, names, types and shapes of tensors, and a few weights.

    The first bytes of each tensor are there for fine-tunes of one model, which differ in nothing else.
    """
    state = hashlib.blake2b(digest_size=32)

    def add(*parts: bytes) -> None:
        for part in parts:
            state.update(struct.pack("<Q", len(part)))
            state.update(part)

    for key, value in sorted(file.metadata.items()):
        add(key.encode(), file.metadata_types[key].encode())
        if isinstance(value, np.ndarray):
            add(value.tobytes())
        elif isinstance(value, list):
            add(np.array([len(item) for item in value], "<u8").tobytes(), b"".join(value))
        else:
            add(repr(value).encode(errors="surrogatepass"))
    for name, tensor in sorted(file.tensors.items()):
        sample = tensor.data.reshape(-1)[:SAMPLE].tobytes()
        add(name.encode(), tensor.type.name.encode(), repr(tuple(tensor.shape)).encode(), sample)
    return state.digest()


class _Head(NamedTuple):
    """What the file begins with, after magic, version and checksum; all sizes and offsets follow from it."""

    model: bytes
    layout_tag: str
    type_k: str
    rope_scaling: str
    n_layer: int
    kv_lora_rank: int
    n_rot: int
    row_stride: int
    n_ctx_orig: int
    n_kv: int
    first_position: int
    extra_nbytes: int
    rope_freq_base: float
    rope_factor: float
    rope_magnitude: float

    @classmethod
    def of(cls, stream: Stream, extra_nbytes: int = 0) -> _Head:
        layout, hp = stream.cache.layout, stream.hparams
        return cls(
            model=stream.model.digest,
            layout_tag=LAYOUT_TAG,
            type_k=layout.type_k,
            rope_scaling=hp.rope_scaling,
            n_layer=layout.n_layer,
            kv_lora_rank=layout.kv_lora_rank,
            n_rot=layout.n_rot,
            row_stride=layout.row_stride,
            n_ctx_orig=hp.n_ctx_orig,
            n_kv=stream.n_kv,
            first_position=stream.first_position,
            extra_nbytes=extra_nbytes,
            rope_freq_base=hp.rope_freq_base,
            rope_factor=hp.rope_factor,
            rope_magnitude=hp.rope_magnitude,
        )

    @property
    def rows_at(self) -> int:
        return _aligned(_HEAD_NBYTES + 4 * self.n_kv + 4 * self.n_layer + self.extra_nbytes)

    @property
    def nbytes(self) -> int:
        """Of the whole file."""
        return self.rows_at + self.n_layer * _aligned(self.n_kv * self.row_stride)

    def pack(self, body: bytes) -> bytes:
        """Everything before the rows: this head, and the body (tokens, checksums of the layers, extra)."""
        fields = [field.encode() if isinstance(field, str) else field for field in self]
        packed = bytearray(_HEAD.pack(MAGIC, VERSION, 0, *fields).ljust(_HEAD_NBYTES, b"\0") + body)
        packed += bytes(self.rows_at - len(packed))
        struct.pack_into("<I", packed, _CRC_AT, zlib.crc32(packed))
        return bytes(packed)

    @classmethod
    def unpack(cls, path: Path, data: np.ndarray) -> tuple[_Head, bytes]:
        """(head, body) of a file, (nbytes,) u8, whose size and checksum are right."""
        start = data[:_HEAD_NBYTES].tobytes()
        if start[: len(MAGIC)] != MAGIC:
            raise SessionError(f"{path}: begins with {start[: len(MAGIC)]!r}, expected {MAGIC!r}; not a saved session")
        if len(start) < _HEAD_NBYTES:
            raise SessionError(f"{path}: is cut off: {len(start)} bytes, expected at least {_HEAD_NBYTES}")
        _, version, crc, model, *fields = _HEAD.unpack_from(start)
        if version != VERSION:
            raise SessionError(f"{path}: has format version {version}, expected {VERSION}; save the session again")
        fields = [f.rstrip(b"\0").decode("latin1") if isinstance(f, bytes) else f for f in fields]
        head = cls._make([model, *fields])
        head._check_counts(path, len(data))
        packed = bytearray(data[: head.rows_at].tobytes())
        struct.pack_into("<I", packed, _CRC_AT, 0)
        if (found := zlib.crc32(packed)) != crc:
            raise SessionError(f"{path}: is damaged: its head has checksum {found:08x}, expected {crc:08x};"
                               " save the session again")  # fmt: skip
        return head, bytes(packed[_HEAD_NBYTES:])

    def _check_counts(self, path: Path, size: int) -> None:
        limits = (
            ("n_layer", self.n_layer, 1, MAX_LAYERS),
            ("n_kv", self.n_kv, 0, MAX_TOKENS),
            ("first position", self.first_position, 0, MAX_POSITION),
            ("bytes of extra", self.extra_nbytes, 0, MAX_EXTRA_BYTES),
        )
        for name, value, low, high in limits:
            if not low <= value <= high:
                raise SessionError(f"{path}: is damaged: {name} is {value:,}, expected {low} to {high:,}")
        if size != self.nbytes:
            raise SessionError(f"{path}: is damaged or cut off: {size:,} bytes, expected {self.nbytes:,} for"
                               f" {self.n_kv:,} tokens in {self.n_layer} layers")  # fmt: skip

    def check_belongs_to(self, path: Path, stream: Stream) -> None:
        mine = _Head.of(stream)
        if self.model != mine.model:
            raise SessionError(f"{path}: was saved with another model (digest {self.model.hex()[:12]}, expected"
                               f" {mine.model.hex()[:12]}); open the one it was saved with")  # fmt: skip
        if self.layout_tag != mine.layout_tag:
            raise SessionError(f"{path}: has rows of layout {self.layout_tag!r}, expected {mine.layout_tag!r};"
                               " open it with the version of konly that wrote it")  # fmt: skip
        if self.type_k != mine.type_k:
            raise SessionError(f"{path}: has rows of type_k {self.type_k!r}, but the stream's is {mine.type_k!r};"
                               f" open the model with type_k {self.type_k!r}")  # fmt: skip
        for name in (
            "n_layer", "kv_lora_rank", "n_rot", "row_stride", "rope_scaling", "rope_freq_base", "rope_factor",
            "rope_magnitude", "n_ctx_orig",
        ):  # fmt: skip
            found, expected = getattr(self, name), getattr(mine, name)
            if found != expected:
                raise SessionError(f"{path}: was saved with {name} {found}, but the model is open with {expected}")
        if self.n_kv > stream.n_ctx:
            raise SessionError(f"{path}: holds {self.n_kv:,} tokens, but n_ctx is {stream.n_ctx:,}; open the model"
                               f" with n_ctx={self.n_kv} (--ctx-size) or more")  # fmt: skip


def _map(path: Path) -> mmap.mmap:
    """The file, read-only. Its pages are asked for at once."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # before open(): opening a pipe would wait for a writer
            raise SessionError(f"{path}: is a folder or a device, expected a saved session")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise SessionError(f"{path}: is empty, expected a saved session")
            data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise SessionError(f"{path}: no such file") from None
    except OSError as error:
        raise SessionError(f"{path}: cannot be read: {error.strerror or error}") from error
    if hasattr(mmap, "MADV_WILLNEED"):
        data.madvise(mmap.MADV_WILLNEED)
    return data


def _checksum(rows: np.ndarray) -> int:
    """Of a layer's rows and the zeros after them."""
    return zlib.crc32(bytes(-rows.nbytes % ALIGNMENT), zlib.crc32(rows.data))


def _write(file: BinaryIO, data: bytes | memoryview) -> None:
    """All of it, in pieces: a raw file may take less than it was given."""
    view = memoryview(data)
    while view:
        view = view[file.write(view[:PIECE]) :]


def _cannot_write(path: Path, nbytes: int, error: OSError) -> SessionError:
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        size = f"{nbytes / 2**20:,.1f} MiB"
        return SessionError(f"{path}: no space for a session of {size} ({error.strerror}); nothing was saved")
    return SessionError(f"{path}: cannot be written: {error.strerror or error}")


def _to_json(path: Path, extra: dict[str, Any] | None) -> bytes:
    if not isinstance(extra, dict | None):
        raise SessionError(f"{path}: extra is of type {type(extra).__name__}, expected a dict")
    try:
        text = json.dumps(extra or {}, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise SessionError(f"{path}: extra cannot be written as JSON: {error}") from None
    if len(text) > MAX_EXTRA_BYTES:
        raise SessionError(f"{path}: extra takes {len(text):,} bytes as JSON, expected at most {MAX_EXTRA_BYTES:,}")
    return text


def _from_json(path: Path, text: bytes) -> dict[str, Any]:
    try:
        extra = json.loads(text)
        if isinstance(extra, dict):
            return extra
        problem = f"a {type(extra).__name__}"
    except (ValueError, RecursionError) as error:
        problem = str(error)
    raise SessionError(f"{path}: is damaged: its extra is no JSON object ({problem})")


def _path(path: str | os.PathLike[str]) -> Path:
    try:
        name = os.fsdecode(path)
    except TypeError:
        raise SessionError(f"path is {path!r}; expected the path of a session file") from None
    if not name or "\0" in name:
        raise SessionError(f"path is {name!r}; expected the path of a session file")
    return Path(name)


def _aligned(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def _require_little_endian() -> None:
    if sys.byteorder != "little":
        raise SessionError("sessions are little-endian, and this machine is not; they cannot be used here")
