"""Saved sessions: they come back whole, and files that are damaged, foreign or too long change nothing."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf_bytes import f32_tensor, gguf_bytes, key
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import KCacheLayout, session
from engine.errors import SessionError
from engine.gguf_file import GGUFFile, read
from engine.k_cache import KCache

N_VOCAB = 1000


class Held:
    """What session.py asks of a stream."""

    def __init__(self, n_kv: int = 0, n_ctx: int = 64, type_k: str = "f16", seed: int = 0, **model: Any):
        rng = np.random.default_rng(seed)
        layout = KCacheLayout(model.get("n_layer", 3), n_ctx, 32, 16, type_k)
        self.cache = KCache(layout)
        self.model = SimpleNamespace(digest=model.get("digest", bytes(range(32))))
        self.hparams = SimpleNamespace(
            n_vocab=N_VOCAB,
            rope_scaling="yarn",
            rope_freq_base=model.get("rope_freq_base", 10000.0),
            rope_factor=40.0,
            rope_magnitude=1.0,
            n_ctx_orig=4096,
        )
        self.tokens: list[int] = rng.integers(0, N_VOCAB, n_kv).tolist()
        self.first_position = 7 * seed
        self.n_threads = 2
        for rows in self.cache.rows:
            rows[:n_kv] = rng.integers(0, 256, (n_kv, layout.row_stride))
            rows[n_kv:] = 0xEE  # what is never saved
        self.cache.append(n_kv)

    @property
    def n_kv(self) -> int:
        return self.cache.n_kv

    @property
    def n_ctx(self) -> int:
        return self.cache.layout.n_ctx

    def _restore(self, tokens: list[int], first_position: int, rows: list[np.ndarray]) -> None:
        self.cache.restore(rows, first_position)
        self.tokens, self.first_position = tokens, first_position

    def state(self) -> tuple[object, ...]:
        return self.tokens, self.first_position, [rows[: self.n_kv].tobytes() for rows in self.cache.rows]


def run(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, which knows this module."""
    folders = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": folders}, capture_output=True, text=True, check=True)


def load(stream: Held, path: Path) -> dict[str, Any]:
    return session.load(stream, path)  # type: ignore[arg-type]


def save(stream: Held, path: Path, extra: dict[str, Any] | None = None) -> None:
    session.save(stream, path, extra)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chat.session"


@pytest.mark.parametrize("type_k", ["f16", "bf16", "q8"])
@pytest.mark.parametrize("n_kv", [0, 1, 37, 63, 64])
def test_what_was_saved_comes_back(path: Path, type_k: str, n_kv: int) -> None:
    saved, other = Held(n_kv, type_k=type_k, seed=1), Held(5, type_k=type_k, seed=2)
    save(saved, path, {"system": "ü\n", "n": 1})
    assert load(other, path) == {"system": "ü\n", "n": 1}
    assert other.state() == saved.state()


def test_an_extra_is_not_needed(path: Path) -> None:
    save(Held(3), path)
    assert load(Held(), path) == {}


def test_a_session_may_be_longer_or_shorter_than_the_context_it_came_from(path: Path) -> None:
    saved = Held(20, n_ctx=20)
    save(saved, path)
    other = Held(n_ctx=21)
    load(other, path)
    assert other.state() == saved.state()


def test_rows_lie_aligned_in_the_file_as_they_lie_in_the_cache(path: Path) -> None:
    saved = Held(37, type_k="q8")  # 37 rows of 80 bytes: no multiple of 64
    save(saved, path)
    data = path.read_bytes()
    for rows in saved.cache.rows:
        assert data.find(rows[:37].tobytes()) % 64 == 0
    assert b"\xee" * 80 not in data


def test_counts_are_where_the_docstring_draws_them(path: Path) -> None:
    save(Held(37, seed=1), path, {"a": 1})
    data = path.read_bytes()
    assert data[:8] == b"konlyses"
    assert struct.unpack_from("<I", data, 8) == (1,)
    assert data[16:48] == bytes(range(32))
    assert data[48:64].rstrip(b"\0") == b"latent|rope"
    assert struct.unpack_from("<5I4x3q3d", data, 80) == (3, 32, 16, 96, 4096, 37, 7, 7, 10000.0, 40.0, 1.0)
    assert np.frombuffer(data, "<i4", 37, 192).tolist() == Held(37, seed=1).tokens


# ------------------------------------------------------------------------------------------------- refused files


def refused(path: Path, stream: Held, match: str) -> None:
    """load() raises, in one sentence that names the file, and leaves the stream alone."""
    before = stream.state()
    with pytest.raises(SessionError, match=match) as caught:
        load(stream, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert stream.state() == before


def test_too_many_tokens_say_which_n_ctx_is_needed(path: Path) -> None:
    save(Held(1500, n_ctx=2000), path)
    refused(path, Held(5, n_ctx=1499), r"holds 1,500 tokens, but n_ctx is 1,499; open the model with n_ctx=1500")


def test_another_type_k_is_named_and_so_is_ours(path: Path) -> None:
    save(Held(5, type_k="q8"), path)
    refused(path, Held(2), r"type_k 'q8', but the stream's is 'f16'; open the model with type_k 'q8'")


def test_another_model_is_refused(path: Path) -> None:
    save(Held(5, digest=b"\1" * 32), path)
    refused(path, Held(2), r"another model \(digest 010101010101, expected 000102030405\)")


def test_the_same_model_with_other_rope_parameters_is_refused(path: Path) -> None:
    save(Held(5, rope_freq_base=1e6), path)
    refused(path, Held(2), r"saved with rope_freq_base 1000000.0, but the model is open with 10000.0")


def test_another_layout_of_rows_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(session, "LAYOUT_TAG", "rope|latent")
        save(Held(5), path)
    refused(path, Held(2), r"layout 'rope\|latent', expected 'latent\|rope'")


def test_tokens_outside_the_vocabulary_are_refused(path: Path) -> None:
    foreign = Held(5)
    foreign.tokens[3] = N_VOCAB
    save(foreign, path)
    refused(path, Held(2), "token ids from [0-9]+ to 1,000 are outside the vocabulary of 1,000")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "is empty"),
        (b"GGUF\3\0\0\0" + bytes(500), r"begins with b'GGUF.*not a saved session"),
        (b"konly", "not a saved session"),
        (b"konlyses" + bytes(20), "cut off: 28 bytes, expected at least 192"),
        (b"konlyses\2\0\0\0" + bytes(300), "format version 2, expected 1"),
    ],
)
def test_other_files_are_refused(path: Path, data: bytes, match: str) -> None:
    path.write_bytes(data)
    refused(path, Held(2), match)


def test_folders_and_missing_files_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, Held(2), "is a folder or a device")
    refused(tmp_path / "none", Held(2), "no such file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_without_waiting_for_a_writer(path: Path) -> None:
    os.mkfifo(path)
    refused(path, Held(2), "is a folder or a device")


@pytest.mark.parametrize("path", [None, 3, "", "a\0b"])
def test_paths_that_are_none_are_refused(path: Any) -> None:
    for call in (load, save):
        with pytest.raises(SessionError, match="expected the path of a session file"):
            call(Held(2), path)


def test_big_endian_hosts_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "byteorder", "big")
    for call in (load, save):
        with pytest.raises(SessionError, match="little-endian"):
            call(Held(2), path)


def with_field(data: bytes, offset: int, layout: str, value: int) -> bytes:
    """The file with another value in its head, and the checksum that belongs to it if its size were right."""
    changed = bytearray(data)
    struct.pack_into(layout, changed, offset, value)
    struct.pack_into("<I", changed, 12, 0)
    struct.pack_into("<I", changed, 12, zlib.crc32(changed[: 192 + 64 * 5]))
    return bytes(changed)


@pytest.mark.parametrize("value", [-1, 1 << 40, (1 << 63) - 1, 6, 4])
@pytest.mark.parametrize(("offset", "layout"), [(104, "<q"), (120, "<q")])
def test_counts_are_checked_against_the_file_before_memory_is_taken(
    path: Path, offset: int, layout: str, value: int
) -> None:
    stream = Held(2)
    save(Held(5), path)
    path.write_bytes(with_field(path.read_bytes(), offset, layout, value))
    tracemalloc.start()
    try:
        refused(path, stream, "is damaged")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("value", [0, 513, 0xFFFFFFFF])
def test_layer_counts_are_bounded(path: Path, value: int) -> None:
    save(Held(5), path)
    path.write_bytes(with_field(path.read_bytes(), 80, "<I", value))
    refused(path, Held(2), "n_layer is")


@pytest.mark.parametrize("text", [b"[1]     ", b"{       ", b"\xff\xff\xff\xff\xff\xff\xff\xff"])
def test_an_extra_that_is_no_object_is_refused(path: Path, text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(session, "_to_json", lambda path, extra: text)
        save(Held(5), path)
    refused(path, Held(2), "its extra is no JSON object")


def test_an_extra_of_a_million_brackets_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(session, "_to_json", lambda path, extra: b"[" * 1_000_000)
        save(Held(5), path)
    refused(path, Held(2), "its extra is no JSON object")


SAVED = Held(9, seed=3)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("session") / "good"
    save(SAVED, path, {"a": [1, 2, 3]})
    return path.read_bytes()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_file_is_refused_and_changes_nothing(path: Path, good: bytes, data: st.DataObject) -> None:
    how = data.draw(st.sampled_from(["flip", "overwrite", "cut", "extend", "insert", "swap"]))
    at = data.draw(st.integers(0, len(good) - 1))
    if how == "flip":
        changed = good[:at] + bytes([good[at] ^ 1 << data.draw(st.integers(0, 7))]) + good[at + 1 :]
    elif how == "overwrite":
        noise = data.draw(st.binary(min_size=1, max_size=64))
        changed = (good[:at] + noise + good[at + len(noise) :])[: len(good)]
    elif how == "cut":
        changed = good[:at]
    elif how == "extend":
        changed = good + bytes(at + 1)
    elif how == "insert":
        changed = good[:at] + data.draw(st.binary(min_size=1, max_size=64)) + good[at:]
    else:
        half = at // 2
        changed = good[half:at] + good[:half] + good[at:]
    path.write_bytes(changed)
    stream = Held(4, seed=4)
    before = stream.state()
    if changed == good:
        load(stream, path)
        return
    with pytest.raises(SessionError):
        load(stream, path)
    assert stream.state() == before


def test_every_part_of_the_file_counts(path: Path) -> None:
    save(Held(9, seed=3), path, {"a": 1})
    good = np.fromfile(path, np.uint8)
    stream = Held(4, seed=4)
    for at in range(0, len(good), 3):
        changed = good.copy()
        changed[at] ^= 1 << at % 8
        changed.tofile(path)
        with pytest.raises(SessionError):
            load(stream, path)


# ------------------------------------------------------------------------------------------------ refused extras


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        ([1], "extra is of type list, expected a dict"),
        ({"a": object()}, "cannot be written as JSON"),
        ({"a": {1, 2}}, "cannot be written as JSON"),
        ({"a": "x" * (16 << 20)}, "expected at most 16,777,216"),
    ],
)
def test_an_extra_that_json_cannot_hold_is_refused_before_writing(path: Path, extra: Any, match: str) -> None:
    with pytest.raises(SessionError, match=match):
        save(Held(2), path, extra)
    assert list(path.parent.iterdir()) == []


def test_an_extra_may_be_large_and_strange(path: Path) -> None:
    extra = {"text": "\ud800 ü \0" * 1000, "n": 1 << 200, "nested": [[[{"": None}]]]}
    save(Held(2), path, extra)
    assert load(Held(), path) == extra


# ------------------------------------------------------------------------------------------------- failed writes


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("n_writes", [1, 2, 4])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    path: Path, code: int, n_writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Held(3, seed=1)
    save(old, path)
    calls = []

    def failing(*args: Any) -> None:
        calls.append(args)
        if len(calls) == n_writes:
            raise OSError(code, os.strerror(code))
        write(*args)

    write = session._write
    with monkeypatch.context() as patch:
        patch.setattr(session, "_write", failing)
        with pytest.raises(SessionError, match=r"no space for a session of 0\.0 MiB .*nothing was saved"):
            save(Held(9, seed=2), path)
    assert list(path.parent.iterdir()) == [path]
    other = Held()
    load(other, path)
    assert other.state() == old.state()


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
def test_a_write_beyond_the_limit_of_a_process_leaves_nothing(path: Path) -> None:
    code = """if True:
        import resource, sys
        from pathlib import Path
        from test_session import Held, save
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save(Held(2000, n_ctx=2000), Path(sys.argv[1]))
        except Exception as error:
            print(type(error).__name__, error)"""
    done = run(code, path)
    assert done.stdout.startswith(f"SessionError {path}: no space for a session of 0.6 MiB")
    assert list(path.parent.iterdir()) == []


def test_short_writes_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "PIECE", 1000)
    saved, other = Held(40), Held()
    save(saved, path)
    load(other, path)
    assert other.state() == saved.state()


@pytest.mark.parametrize("name", [".", "no/such/folder", "x" * 300])
def test_paths_that_cannot_be_written_are_session_errors(tmp_path: Path, name: str) -> None:
    with pytest.raises(SessionError, match="cannot be written: "):
        save(Held(2), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------- digests


def gguf(
    tmp_path: Path, name: str = "a", rank: int = 512, n_rows: int = 2, tokens: tuple[str, ...] = ("a", "b")
) -> GGUFFile:
    path = tmp_path / "model.gguf"
    keys = [
        key("general.architecture", "deepseek2"),
        key("general.name", name),
        key("rank", rank),
        key("t", list(tokens)),
    ]
    path.write_bytes(gguf_bytes(keys, [f32_tensor("w", 8, n_rows)]))
    return read(path)


def test_a_digest_does_not_depend_on_the_order_of_keys_or_the_path(tmp_path: Path) -> None:
    file = gguf(tmp_path)
    turned = replace(file, path=Path("other"), metadata=dict(reversed(file.metadata.items())))
    assert session.digest(file) == session.digest(turned)
    assert len(session.digest(file)) == 32


@pytest.mark.parametrize(
    "change", [{"name": "b"}, {"rank": 256}, {"n_rows": 3}, {"tokens": ("ab", "")}, {"tokens": ("a", "b", "")}]
)
def test_a_digest_depends_on_metadata_and_weights(tmp_path: Path, change: dict[str, Any]) -> None:
    assert session.digest(gguf(tmp_path)) != session.digest(gguf(tmp_path, **change))
