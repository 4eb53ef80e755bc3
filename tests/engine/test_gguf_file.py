"""GGUF files as good writers make them: read without a copy, in parts, and fast."""

from __future__ import annotations

import gc
import os
import sys
import time
import tracemalloc
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import pytest
from gguf_bytes import (
    ARRAY,
    F32,
    F64,
    I8,
    I64,
    STRING,
    U16,
    U32,
    RawTensor,
    array,
    f32_tensor,
    gguf_bytes,
    key,
    raw_key,
    string,
)

from engine.errors import ModelFormatError
from engine.gguf_file import GGUFFile, read
from engine.tensor import KNOWN_TYPES

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
        key("n", 7),
        key("wide", -(2**40), I64),
        key("eps", 0.5),
        key("double", 0.1, F64),
        key("flag", True),
        key("tokens", ["a", b"\xff\xfe", ""]),
        key("scores", [0.5, 1.5]),
        key("types", [1, 3, 6], I8),
        key("flags", [True, False]),
    ],
    [f32_tensor("a", 3, 5), RawTensor("q", (64, 2, 3), 8, bytes(range(204)) + bytes(204)), f32_tensor("z", 1)],
)


def test_values_have_their_python_types(write: Write) -> None:
    metadata = read(write(GOOD)).metadata
    assert metadata["general.architecture"] == "deepseek2"
    assert (metadata["n"], metadata["wide"], metadata["eps"], metadata["double"]) == (7, -(2**40), 0.5, 0.1)
    assert metadata["flag"] is True
    assert metadata["tokens"] == [b"a", b"\xff\xfe", b""]
    assert metadata["scores"].dtype == np.float32 and metadata["scores"].tolist() == [0.5, 1.5]
    assert metadata["types"].dtype == np.int8 and metadata["types"].tolist() == [1, 3, 6]
    assert metadata["flags"].dtype == np.bool_ and metadata["flags"].tolist() == [True, False]


def test_shapes_are_in_numpy_order(write: Write) -> None:
    tensors = read(write(GOOD)).tensors
    assert list(tensors) == ["a", "q", "z"]
    assert tensors["a"].shape == (3, 5) and tensors["a"].data.shape == (3, 20)
    assert tensors["q"].shape == (3, 2, 64) and tensors["q"].data.shape == (3, 2, 68)
    assert tensors["q"].type.name == "Q8_0"


def test_tensor_bytes_are_those_of_the_file(write: Write) -> None:
    tensors = read(write(GOOD)).tensors
    np.testing.assert_array_equal(tensors["a"].f32(), np.arange(15, dtype=np.float32).reshape(3, 5))
    assert tensors["q"].data.tobytes() == bytes(range(204)) + bytes(204)


def test_tensors_are_read_only(write: Write) -> None:
    tensor = read(write(GOOD)).tensors["a"]
    with pytest.raises(ValueError, match="read-only"):
        tensor.data[0, 0] = 1


def test_tensors_outlive_the_file_object(write: Write) -> None:
    tensor = read(write(GOOD)).tensors["a"]
    gc.collect()
    assert tensor.f32()[2, 4] == 14


def test_version_2_is_read(write: Write) -> None:
    assert read(write(gguf_bytes(version=2))).version == 2


def test_padding_after_the_last_tensor_may_be_missing(write: Write) -> None:
    data = gguf_bytes([], [f32_tensor("a", 3), f32_tensor("z", 1)], pad_last=False)
    assert read(write(data)).tensors["z"].shape == (1,)


def test_bytes_after_the_last_tensor_are_ignored(write: Write) -> None:
    assert list(read(write(GOOD + bytes(1000))).tensors) == ["a", "q", "z"]


def test_alignment_of_the_file_is_used(write: Write) -> None:
    tensors = [f32_tensor("a", 3), f32_tensor("b", 3)]
    path = write(gguf_bytes([key("general.alignment", 256)], tensors, alignment=256))
    assert read(path).tensors["b"].f32().tolist() == [0, 1, 2]


@pytest.mark.parametrize("type_id", sorted(KNOWN_TYPES))
def test_every_known_tensor_type_opens(write: Write, type_id: int) -> None:
    ggml_type = KNOWN_TYPES[type_id]
    nbytes = 3 * ggml_type.nbytes
    tensor = read(write(gguf_bytes([], [RawTensor("x", (ggml_type.block, 3), type_id, bytes(nbytes))]))).tensors["x"]
    assert tensor.type == ggml_type and tensor.nbytes == nbytes


def test_text_which_is_not_utf8_is_shown_with_replacements(write: Write) -> None:
    assert read(write(gguf_bytes([key("general.name", b"a\xff")]))).metadata["general.name"] == "a�"


def test_the_shipped_model_is_read() -> None:
    with as_file(files("engine") / "data" / "tiny-mla-tales-Q8_0.gguf") as path:
        file = read(path)
        assert file.get("general.architecture", str) == "deepseek2"
        assert len(file.tensors) == 88
        assert len(file.get("tokenizer.ggml.tokens", list)) == 4096


def test_what_the_gguf_package_writes_is_read(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "deepseek2")
    writer.add_block_count(3)
    writer.add_token_list(["a", "ä"])
    writer.add_array("empty.numbers", [1])
    writer.add_tensor("x", np.ones((2, 3), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read(path)
    assert file.get("deepseek2.block_count", int) == 3
    assert file.get("tokenizer.ggml.tokens", list) == [b"a", "ä".encode()]
    assert file.tensors["x"].f32().tolist() == [[1, 1, 1], [1, 1, 1]]


def test_arrays_may_be_empty(write: Write) -> None:
    keys = [raw_key("a", ARRAY, array(F32, 0, b"")), raw_key("b", ARRAY, array(STRING, 0, b""))]
    file = read(write(gguf_bytes(keys)))
    assert file.get("a", np.ndarray).shape == (0,) and file.get("b", list) == []


# typed access


def test_a_missing_key_gives_the_default(write: Write) -> None:
    assert read(write(GOOD)).get("absent", int, 3) == 3


def test_a_missing_key_without_default_is_an_error(write: Write) -> None:
    with pytest.raises(ModelFormatError, match=r"model\.gguf: key 'absent' is missing; expected an integer"):
        read(write(GOOD)).get("absent", int)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("eps", int, "type f32, expected an integer"),
        ("flag", int, "type bool, expected an integer"),
        ("n", bool, "type u32, expected a bool"),
        ("n", float, "type u32, expected a float"),
        ("n", str, "type u32, expected a string"),
        ("scores", list, "type array of f32, expected an array of strings"),
        ("tokens", np.ndarray, "type array of strings, expected an array of numbers"),
    ],
)
def test_a_key_of_another_type_is_an_error(write: Write, name: str, kind: type, message: str) -> None:
    with pytest.raises(ModelFormatError, match=f"key '{name}' has {message}"):
        read(write(GOOD)).get(name, kind, None)


# size and speed


@pytest.mark.skipif(sys.platform == "win32", reason="a sparse file would be written out")
def test_a_large_file_opens_at_once_and_its_weights_are_not_copied(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    n_rows, row = 1 << 18, 1 << 13  # 8 GiB of F32, a hole on the disk
    path.write_bytes(gguf_bytes([], [RawTensor("x", (row, n_rows))]))
    os.truncate(path, path.stat().st_size + n_rows * row * 4)
    tracemalloc.start()
    try:
        begin = time.perf_counter()
        file = read(path)
        seconds = time.perf_counter() - begin
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert seconds < 0.5
    assert file.tensors["x"].nbytes == 8 << 30 and file.nbytes > 8 << 30
    assert file.tensors["x"].f32()[-1, -1] == 0


def test_a_vocabulary_of_150k_tokens_is_read_fast(write: Write) -> None:
    tokens = raw_key("tokens", ARRAY, array(STRING, 150_000, b"".join(string(f"t{i}") for i in range(150_000))))
    merges = raw_key("merges", ARRAY, array(STRING, 150_000, b"".join(string(f"a{i} b") for i in range(150_000))))
    path = write(gguf_bytes([tokens, merges]))

    def seconds() -> float:
        begin = time.perf_counter()
        assert read(path).metadata["merges"][-1] == b"a149999 b"
        return time.perf_counter() - begin

    assert min(seconds() for _ in range(5)) < 0.3


# split files


def split_keys(no: int, count: int = 2, n_tensors: int = 2) -> list[bytes]:
    return [key("split.no", no, U16), key("split.count", count, U16), key("split.tensors.count", n_tensors, U32)]


def write_split(write: Write, first: bytes | None = None, second: bytes | None = None) -> Path:
    first = first or gguf_bytes([key("general.name", "x"), *split_keys(0)], [f32_tensor("a", 3)])
    second = second or gguf_bytes(split_keys(1), [f32_tensor("b", 2, 2)])
    write(second, "m-00002-of-00002.gguf")
    return write(first, "m-00001-of-00002.gguf")


def test_a_split_file_gives_the_tensors_of_all_parts(write: Write) -> None:
    path = write_split(write)
    file: GGUFFile = read(path)
    assert file.path == path
    assert file.tensors["a"].f32().tolist() == [0, 1, 2]
    assert file.tensors["b"].f32().tolist() == [[0, 1], [2, 3]]
    assert file.get("general.name", str) == "x"
    assert file.nbytes == sum(p.stat().st_size for p in path.parent.iterdir())


def test_the_first_part_may_hold_no_tensor(write: Write) -> None:
    assert list(read(write_split(write, first=gguf_bytes(split_keys(0, n_tensors=1)))).tensors) == ["b"]


def test_a_split_of_one_part_is_an_ordinary_file(write: Write) -> None:
    assert list(read(write(gguf_bytes(split_keys(0, count=1), [f32_tensor("a", 1)]), "any name")).tensors) == ["a"]


def test_another_part_than_the_first_names_the_first(write: Write) -> None:
    path = write_split(write)
    with pytest.raises(ModelFormatError, match=r"part 2 of 2; open the first part, m-00001-of-00002\.gguf"):
        read(path.with_name("m-00002-of-00002.gguf"))


def test_a_missing_part_is_named(write: Write) -> None:
    path = write_split(write)
    path.with_name("m-00002-of-00002.gguf").unlink()
    with pytest.raises(ModelFormatError, match=r"m-00002-of-00002\.gguf: no such file"):
        read(path)


@pytest.mark.parametrize("name", ["renamed.gguf", "m-00001-of-00003.gguf", "m-1-of-2.gguf"])
def test_a_part_whose_name_does_not_say_so_is_refused(write: Write, name: str) -> None:
    data = write_split(write).read_bytes()
    with pytest.raises(ModelFormatError, match=r"expected a name like model-00001-of-00002\.gguf"):
        read(write(data, name))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (gguf_bytes(split_keys(0), [f32_tensor("b", 1)]), "'split.no' is 0, expected 1"),
        (gguf_bytes(split_keys(1, count=3), [f32_tensor("b", 1)]), "'split.count' is 3, expected 2"),
        (gguf_bytes([], [f32_tensor("b", 1)]), "'split.no' is missing"),
        (gguf_bytes(split_keys(1), [f32_tensor("a", 1)]), "tensor 'a' is also in an earlier part"),
        (gguf_bytes(split_keys(1), []), "'split.tensors.count' is 2, expected 1"),
        (b"GGUF", "header"),
    ],
)
def test_a_wrong_second_part_is_refused(write: Write, second: bytes, message: str) -> None:
    with pytest.raises(ModelFormatError, match=message):
        read(write_split(write, second=second))


@pytest.mark.parametrize("count", [0, 1025, 65535])
def test_a_wrong_number_of_parts_is_refused(write: Write, count: int) -> None:
    with pytest.raises(ModelFormatError, match=f"'split.count' is {count}, expected 1 to 1024"):
        read(write(gguf_bytes(split_keys(0, count=count)), f"m-00001-of-{count:05}.gguf"))
