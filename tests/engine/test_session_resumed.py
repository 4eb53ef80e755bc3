"""Sessions of a real model: a text goes on as if nothing had been between, and a killed process leaves them whole."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from engine import Engine, EngineError
from engine.errors import SessionError

TEXT = "Once upon a time there was a small grey cat who lived in a house by the sea. " * 2 + "Every morning she"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(n_ctx=256)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "story.session"


@pytest.mark.parametrize("type_k", ["f16", "bf16", "q8"])
@pytest.mark.parametrize("shifted", [False, True])
def test_the_next_logits_have_the_same_bits(engine: Engine, path: Path, type_k: str, shifted: bool) -> None:
    stream, resumed = engine.stream(type_k=type_k), engine.stream(n_ctx=100, type_k=type_k)
    stream.step(stream.tokenize(TEXT))
    if shifted:
        stream.shift(3, 5)
    stream.save(path, {"a": 1})
    resumed.step([5, 6, 7])
    assert resumed.load(path) == {"a": 1}
    assert resumed.tokens == stream.tokens
    assert resumed.first_position == stream.first_position == (5 if shifted else 0)
    for token in (10, 20):
        np.testing.assert_array_equal(resumed.step([token]), stream.step([token]))


def test_a_prompt_that_the_session_holds_is_not_computed_again(engine: Engine, path: Path) -> None:
    for _ in engine.generate(TEXT, max_tokens=20, temperature=0):
        pass
    engine.save(path)
    n_kv = engine.n_kv
    other = Engine(n_ctx=256)
    other.load(path)
    assert other.n_kv == n_kv
    assert "".join(other.generate(TEXT, max_tokens=20, temperature=0))
    assert other.stats.n_reused >= len(engine.tokenize(TEXT)) - 1


def test_a_refused_session_leaves_a_stream_that_goes_on(engine: Engine, path: Path) -> None:
    stream, short, twin = engine.stream(), engine.stream(n_ctx=8), engine.stream()
    stream.step(stream.tokenize(TEXT))
    stream.save(path)
    for each in (short, twin):
        each.step([5, 6, 7])
    with pytest.raises(SessionError, match="n_ctx is 8; open the model with n_ctx="):
        short.load(path)
    assert short.tokens == [5, 6, 7]
    np.testing.assert_array_equal(short.step([8]), twin.step([8]))


def test_a_closed_stream_neither_saves_nor_loads(engine: Engine, path: Path) -> None:
    stream = engine.stream()
    stream.save(path)
    stream.close()
    for call in (stream.save, stream.load):
        with pytest.raises(EngineError, match="closed"):
            call(path)


def test_streams_save_to_one_path_from_several_threads(engine: Engine, path: Path) -> None:
    streams = [engine.stream() for _ in range(3)]
    for i, stream in enumerate(streams):
        stream.step(list(range(5, 15 + i)))

    def save(stream: object) -> None:
        for _ in range(10):
            stream.save(path)  # type: ignore[attr-defined]

    threads = [threading.Thread(target=save, args=(stream,)) for stream in streams]
    for thread in threads:
        thread.start()
    reader = engine.stream()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            reader.load(path)
            assert reader.tokens in [stream.tokens for stream in streams]
    for thread in threads:
        thread.join()
    assert list(path.parent.iterdir()) == [path]


SAVER = """if True:
    import sys
    from engine import Engine
    stream = Engine(n_ctx=256)
    stream.step(list(range(5, 205 + int(sys.argv[2]))))
    print("ready", flush=True)
    while True:
        stream.save(sys.argv[1], {"n": stream.n_kv})
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_killed_while_saving_the_session_is_whole(engine: Engine, path: Path) -> None:
    reader = engine.stream()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for i in range(6):
        command = [sys.executable, "-c", SAVER, str(path), str(i)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None and process.stdout.readline()
            try:
                process.wait(timeout=0.001 + 0.009 * i)  # not sleep: it fails at once if the saver does
            except subprocess.TimeoutExpired:
                process.kill()
        if path.exists():
            n = reader.load(path)["n"]
            assert reader.tokens == list(range(5, 5 + n))
            assert 200 <= n <= 200 + i
        assert len(list(path.parent.iterdir())) <= 2
    assert path.exists()
    reader.save(path)
    assert list(path.parent.iterdir()) == [path]
