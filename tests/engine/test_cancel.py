"""Stopping: at the next tile, from any thread, and what was finished stays usable. Times here are loose on purpose; the
figures come from scripts/bench_streams.py."""

from __future__ import annotations

import asyncio
import signal
import threading
import time

import numpy as np
import pytest
from synthetic import write_model

from engine import Cancelled, Engine, EngineError

TOKENS = np.random.default_rng(7).integers(2, 258, 2000)
PROMPT = "Once upon a time, there was a little girl named Lily. "


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A prompt of 2,000 tokens takes it seconds."""
    path = write_model(
        tmp_path_factory.mktemp("heavy") / "heavy.gguf", q_lora_rank=64, n_embd=1024, n_ff=2048, n_head=16
    )
    engine = Engine(path, n_ctx=4096)
    engine.step(TOKENS[:600])
    engine.step([5])
    return engine


def test_a_cancelled_step_runs_no_tile_after_those_in_work(heavy: Engine) -> None:
    """Each thread finishes the tile it is in, and takes no other: the jobs after it never start."""
    heavy.clear()
    step, tape, _ = heavy._record(512, 0, 1)
    step.fill(slice(0, 512), TOKENS[:512].astype(np.int32), heavy.cache)
    heavy.model.ops.prepare([tape])
    heavy._run.cancel[0] = 0
    timer = threading.Timer(0.02, heavy.cancel)
    timer.start()
    with pytest.raises(heavy.model.ops.Cancelled):
        heavy._run.replay(tape)
    timer.join()
    taken, done, tiles = tape.progress()
    begun = taken.clip(max=tiles)
    assert 0 < begun.sum() < tiles.sum()
    assert (begun - done).sum() == 0  # what was begun was finished before replay() returned
    started = np.flatnonzero(begun)
    assert (begun[: started[-1]] == tiles[: started[-1]]).all()  # and nothing behind the job that was stopped


@pytest.mark.parametrize("when", [0.0, 0.05, 0.2])
def test_a_long_prompt_can_be_cancelled_and_goes_on_where_it_stopped(heavy: Engine, when: float) -> None:
    heavy.clear()
    pieces = heavy.generate(TOKENS.tolist(), max_tokens=3)
    threading.Timer(when, heavy.cancel).start()
    start = time.monotonic()
    assert list(pieces) == []
    assert time.monotonic() - start < when + 2
    assert heavy.stats.finish_reason == "cancelled"
    assert heavy.n_kv % 512 == 0 and heavy.tokens == TOKENS[: heavy.n_kv].tolist()
    held = heavy.n_kv
    list(heavy.generate(TOKENS[:1100].tolist(), max_tokens=1))
    assert heavy.stats.n_reused == min(held, 1100)


def test_the_host_s_threads_go_on_during_a_prompt(heavy: Engine) -> None:
    """The GIL is free while kernels run: another thread is never kept waiting for long."""
    heavy.clear()
    waits: list[float] = []
    over = threading.Event()

    def host() -> None:
        while not over.is_set():
            start = time.monotonic()
            time.sleep(0.001)
            waits.append(time.monotonic() - start)

    thread = threading.Thread(target=host)
    thread.start()
    heavy.step(TOKENS)
    over.set()
    thread.join()
    assert len(waits) > 20 and np.median(waits) < 0.1


def test_closing_the_iterator_stops_the_text() -> None:
    engine = Engine()
    pieces = engine.generate(PROMPT, max_tokens=50)
    next(pieces)
    pieces.close()
    assert engine.stats.finish_reason == "cancelled" and engine.stats.n_generated == 1
    assert engine.tokens == engine.tokenize(PROMPT)


def test_text_comes_asynchronously() -> None:
    engine = Engine()
    expected = "".join(engine.generate(PROMPT, max_tokens=30, temperature=0))

    async def main() -> tuple[str, int]:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        text = "".join([piece async for piece in engine.agenerate(PROMPT, max_tokens=30, temperature=0)])
        task.cancel()
        return text, turns

    text, turns = asyncio.run(main())
    assert text == expected and turns > 10


async def consume(engine: Engine) -> None:
    async for _ in engine.agenerate(TOKENS.tolist(), max_tokens=3):
        pass


def test_a_cancelled_task_stops_the_step(heavy: Engine) -> None:
    heavy.clear()

    async def main() -> None:
        task = asyncio.create_task(consume(heavy))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    start = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - start < 5
    assert heavy.stats.finish_reason == "cancelled" and heavy.n_kv < 2000
    assert np.isfinite(heavy.step([5])).all()


def test_an_async_text_that_is_left_early_stops() -> None:
    engine = Engine()

    async def main() -> None:
        pieces = engine.agenerate(PROMPT, max_tokens=50)
        async for _ in pieces:
            break
        await pieces.aclose()

    asyncio.run(main())
    assert engine.stats.finish_reason == "cancelled" and engine.stats.n_generated <= 2


def test_wrong_arguments_raise_at_the_call_of_agenerate_too() -> None:
    with pytest.raises(EngineError, match="max_tokens is -1"):
        Engine().agenerate(PROMPT, max_tokens=-1)


def test_a_cancelled_step_raises_in_its_own_thread(heavy: Engine) -> None:
    heavy.clear()
    threading.Timer(0.05, heavy.cancel).start()
    with pytest.raises(Cancelled):
        heavy.step(TOKENS)


def test_a_task_that_is_cancelled_twice_ends_as_one_that_is_cancelled(heavy: Engine) -> None:
    heavy.clear()

    async def main() -> None:
        task = asyncio.create_task(consume(heavy))
        await asyncio.sleep(0.1)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert np.isfinite(heavy.step([5])).all()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs signals that come at any moment")
def test_ctrl_c_at_any_moment_leaves_a_stream_that_tells_the_truth() -> None:
    """Many short calls, interrupted anywhere: the lock is free, and tokens are those of the rows."""
    engine = Engine()
    tokens = engine.tokenize(PROMPT)
    truth = Engine()
    for n in (3, 5, 2, 4):  # compiles: an interrupt there is another test's
        engine.step(tokens[:n])
    engine.shift(1, 1)
    n_interrupts = 0

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for i in range(600):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-4 + (i % 97) * 2e-5)
                for n in (3, 5, 2):
                    engine.step(tokens[:n])
                    engine.truncate(n)
                    engine.shift(1, 1)
                while True:
                    engine.clear()
                    engine.step(tokens[:4])
            except KeyboardInterrupt:
                n_interrupts += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert len(engine.tokens) == engine.n_kv
    finally:
        signal.signal(signal.SIGALRM, before)
    assert n_interrupts == 600
    engine.clear()
    assert (engine.step(tokens) == truth.step(tokens)).all()
