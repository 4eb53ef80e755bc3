"""Missing, damaged and hostile files: each ends in a ModelFormatError which says where and why, and in nothing else."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf_bytes import ARRAY, BOOL, STRING, U8, U64, RawTensor, array, f32_tensor, gguf_bytes, key, raw_key, string
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import gguf_file
from engine.errors import ModelFormatError
from engine.gguf_file import read

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(data: bytes, name: str = "model.gguf") -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


GOOD = gguf_bytes(
    [
        key("general.architecture", "deepseek2"),
        key("general.alignment", 32),
        key("flags", [True, False]),
        key("tokens", ["a", b"\xff\xfe", ""]),
        key("scores", [0.5, 1.5]),
    ],
    [f32_tensor("a", 3, 5), RawTensor("q", (64, 2, 3), 8, bytes(408)), f32_tensor("z", 1)],
)


# files which cannot be opened


def test_a_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"absent\.gguf: no such file"):
        read(tmp_path / "absent.gguf")


def test_a_folder_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="expected a GGUF file"):
        read(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelFormatError, match="expected a GGUF file"):
        read(tmp_path / "pipe.gguf")


def test_an_unreadable_file_is_a_clear_error(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(GOOD)

    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch, pytest.raises(ModelFormatError, match="cannot be read: Permission denied"):
        patch.setattr("builtins.open", refuse)
        read(path)


@pytest.mark.parametrize("path", ["nul\0byte", "x" * 5000, ""])
def test_a_path_which_cannot_exist_is_a_clear_error(path: str) -> None:
    with pytest.raises(ModelFormatError):
        read(path)


# hostile files


def _deep(depth: int) -> bytes:
    return raw_key("deep", ARRAY, struct.pack("<IQ", ARRAY, 1) * depth + array(U8, 1, b"\0"))


ONE = bytes(4)
HOSTILE = {
    "empty": (b"", "the file is empty"),
    "one byte": (b"G", "found b'G' where a GGUF file begins"),
    "another format": (b"PK\3\4" + bytes(100), "where a GGUF file begins"),
    "header cut": (GOOD[:20], "only"),
    "version 1": (gguf_bytes(version=1), "GGUF version 1, expected 2 or 3"),
    "version 4": (gguf_bytes(version=4), "GGUF version 4, expected 2 or 3"),
    "big-endian": (gguf_bytes(version=3 << 24), "big-endian"),
    "2^64-1 keys": (gguf_bytes(n_keys=2**64 - 1), "keys, expected at most 4,096"),
    "2^63 tensors": (gguf_bytes(n_tensors=2**63), "tensors, expected at most 65,536"),
    "more keys than there are": (gguf_bytes([key("a", 1)], n_keys=2), "key 2 of 2"),
    "more tensors than there are": (gguf_bytes(n_tensors=1), "tensor 1 of 1"),
    "empty key": (gguf_bytes([key("", 1)]), "the key is empty"),
    "key of 2 KiB": (gguf_bytes([key("k" * 2048, 1)]), "2,048 bytes long, expected at most 1,024"),
    "key of 2^64-1 bytes": (gguf_bytes([string("a", 2**64 - 1)]), "expected at most 1,024"),
    "key not UTF-8": (gguf_bytes([key(b"\xff", 1)]), "is not UTF-8"),
    "key twice": (gguf_bytes([key("a", 1), key("a", 2)]), "'a' is there twice"),
    "value type 13": (gguf_bytes([raw_key("a", 13, bytes(8))]), "value type 13, expected 0 to 12"),
    "value cut": (gguf_bytes([raw_key("a", U64, bytes(7))]), "needs 8 bytes, but only 7 are left"),
    "bool 2": (gguf_bytes([raw_key("a", BOOL, b"\2")]), "bool of value 2, expected 0 or 1"),
    "bool array 7": (gguf_bytes([raw_key("a", ARRAY, array(BOOL, 2, b"\1\7"))]), "bool of value 7"),
    "string of 2^62 bytes": (gguf_bytes([raw_key("a", STRING, string("x", 2**62))]), "expected at most 16,777,216"),
    "string beyond the file": (gguf_bytes([raw_key("a", STRING, string("x", 100))]), "only 1 are left"),
    "template of 2 MiB": (gguf_bytes([key("tokenizer.chat_template", "x" * 2**21)]), "expected at most 1,048,576"),
    "array type 13": (gguf_bytes([raw_key("a", ARRAY, array(13, 1, ONE))]), "array element type 13"),
    "array of arrays": (gguf_bytes([_deep(1)]), "an array of arrays"),
    "nested 2000 deep": (gguf_bytes([_deep(2000)]), "an array of arrays"),
    "array of 2^28 in a tiny file": (gguf_bytes([raw_key("a", ARRAY, array(U8, 2**28, ONE))]), "only 4 are left"),
    "array of 2^64-1": (gguf_bytes([raw_key("a", ARRAY, array(U8, 2**64 - 1, ONE))]), "expected at most 512 MiB"),
    "array wraps": (gguf_bytes([raw_key("a", ARRAY, array(U64, 2**61, bytes(8)))]), "expected at most 512 MiB"),
    "2^22 strings in a tiny file": (gguf_bytes([raw_key("a", ARRAY, array(STRING, 2**22, ONE))]), "4,194,304 strings"),
    "2^61 strings": (gguf_bytes([raw_key("a", ARRAY, array(STRING, 2**61, ONE))]), "strings in all, expected at most"),
    "string in array too long": (
        gguf_bytes([raw_key("a", ARRAY, array(STRING, 2, string("x") + string("y", 2**63)))]),
        "string 1 of an array of 2 ends beyond the file",
    ),
    "alignment 0": (gguf_bytes([key("general.alignment", 0)]), "value 0, expected a power of two"),
    "alignment 48": (gguf_bytes([key("general.alignment", 48)]), "value 48, expected a power of two"),
    "alignment 1": (gguf_bytes([key("general.alignment", 1)]), "expected a power of two of at least 8"),
    "alignment is u64": (gguf_bytes([key("general.alignment", 32, U64)]), "type u64, expected u32"),
    "alignment 2^31": (
        gguf_bytes([key("general.alignment", 2**31)], [RawTensor("x", (1,), data=ONE)]),
        "the file is cut off",
    ),
    "empty name": (gguf_bytes([], [RawTensor("", (1,), data=ONE)]), "the name is empty"),
    "name of 64 bytes": (gguf_bytes([], [RawTensor("n" * 64, (1,), data=ONE)]), "64 bytes long, expected at most 63"),
    "name not UTF-8": (gguf_bytes([], [RawTensor(b"\x80", (1,), data=ONE)]), "is not UTF-8"),
    "tensor twice": (gguf_bytes([], [RawTensor("x", (1,), data=ONE)] * 2), "'x' is there twice"),
    "no dimensions": (gguf_bytes([], [RawTensor("x", (), data=ONE)]), "0 dimensions, expected 1 to 4"),
    "5 dimensions": (gguf_bytes([], [RawTensor("x", (1,) * 5, data=ONE)]), "5 dimensions, expected 1 to 4"),
    "200 dimensions": (gguf_bytes([], [RawTensor("x", (1,), n_dims=200)]), "200 dimensions, expected 1 to 4"),
    "zero dimension": (gguf_bytes([], [RawTensor("x", (4, 0))]), r"dimensions \[4, 0\], expected each from 1"),
    "dimension 2^64-1": (gguf_bytes([], [RawTensor("x", (2**64 - 1,))]), "expected each from 1 to 2,147,483,648"),
    "product wraps to 0": (gguf_bytes([], [RawTensor("x", (2**31, 2**31, 4))]), r"more than 2\*\*63"),
    "bytes wrap": (gguf_bytes([], [RawTensor("x", (2**31, 2**31))]), r"more than 2\*\*63"),
    "type 99": (gguf_bytes([], [RawTensor("x", (32,), 99, ONE)]), "tensor type 99, which is not known"),
    "removed type 4": (gguf_bytes([], [RawTensor("x", (32,), 4, ONE)]), "tensor type 4, which ggml has removed"),
    "half a block": (gguf_bytes([], [RawTensor("x", (33,), 8, bytes(34))]), "rows of 33 .*a multiple of 32"),
    "offset wraps": (gguf_bytes([], [RawTensor("x", (1,), data=ONE, offset=2**64 - 64)]), "expected 0"),
    "offset unaligned": (gguf_bytes([], [RawTensor("x", (1,), data=ONE, offset=4)]), "offset 4, expected 0"),
    "gap": (gguf_bytes([], [RawTensor("x", (1,), data=ONE, offset=64)]), "offset 64, expected 0"),
    "overlap": (
        gguf_bytes([], [RawTensor("x", (16,), data=bytes(64)), RawTensor("y", (1,), data=ONE, offset=32)]),
        "tensor 'y' .*offset 32, expected 64",
    ),
    "same offset": (
        gguf_bytes([], [RawTensor("x", (1,), data=ONE), RawTensor("y", (1,), data=ONE, offset=0)]),
        "offset 0, expected 32",
    ),
    "data cut": (GOOD[:-32], "tensor 'z' .*the file is cut off; download it again"),
    "no data": (gguf_bytes([], [RawTensor("x", (1000,))]), "tensor 'x' .*the file is cut off"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_with_file_and_reason(write: Write, case: str) -> None:
    data, message = HOSTILE[case]
    with pytest.raises(ModelFormatError, match=rf"(?s)model\.gguf: .*{message}"):
        read(write(data))


def test_an_error_names_the_key_and_the_byte(write: Write) -> None:
    data = gguf_bytes([key("fine", 1), raw_key("broken", BOOL, b"\2")])
    with pytest.raises(ModelFormatError, match=rf"key 'broken' \(at byte {len(data)}\)"):
        read(write(data))


def test_control_characters_of_a_name_are_escaped(write: Write) -> None:
    with pytest.raises(ModelFormatError) as caught:
        read(write(gguf_bytes([key("\x1b[2J\n", 1)] * 2)))
    assert "\\x1b[2J\\n" in str(caught.value) and "\x1b" not in str(caught.value)


def test_strings_of_many_arrays_are_counted_together(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "MAX_ARRAY_STRINGS", 5)
    with pytest.raises(ModelFormatError, match=r"key 'b' .*6 strings in all, expected at most 5"):
        read(write(gguf_bytes([key("a", ["x"] * 3), key("b", ["x"] * 3)])))


def test_the_metadata_of_all_keys_is_bounded(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "MAX_METADATA_BYTES", 1 << 20)
    blob = [0] * 300_000
    with pytest.raises(ModelFormatError, match=r"key 'd' .*metadata is larger than 1 MiB"):
        read(write(gguf_bytes([key(name, blob, U8) for name in "abcd"])))


def test_hostile_counts_allocate_nothing(write: Write) -> None:
    paths = [write(data, f"{i}.gguf") for i, (data, _) in enumerate(HOSTILE.values()) if len(data) < 10_000]
    tracemalloc.start()
    try:
        for path in paths:
            with pytest.raises(ModelFormatError):
                read(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


# fuzz


def _mutated(data: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    out = bytearray(data)
    for what, at, payload in edits:
        at %= len(out) + 1
        if what == "overwrite":
            out[at : at + len(payload)] = payload
        elif what == "insert":
            out[at:at] = payload
        elif what == "delete":
            del out[at : at + len(payload)]
        else:
            del out[at:]
    return bytes(out)


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["overwrite", "overwrite", "insert", "delete", "truncate"]),
        st.integers(0, len(GOOD)),
        st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff" * 8, bytes(8), b"\0\0\0\0\0\0\0\x80"])),
    ),
    min_size=1,
    max_size=4,
)


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(edits=EDITS)
def test_a_damaged_file_is_read_or_refused_and_nothing_else(write: Write, edits: list[tuple[str, int, bytes]]) -> None:
    tracemalloc.start()
    try:
        file = read(write(_mutated(GOOD, edits)))
    except ModelFormatError:
        pass
    else:
        for tensor in file.tensors.values():
            assert tensor.data.sum() >= 0  # every byte can be reached
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("stop", range(0, len(GOOD) - 28, 7))  # the last 28 bytes are padding
def test_a_truncated_file_is_refused(write: Write, stop: int) -> None:
    with pytest.raises(ModelFormatError):
        read(write(GOOD[:stop]))
