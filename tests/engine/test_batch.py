"""Several texts at once are the texts of lone streams, bit for bit."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from synthetic import write_model

from engine import Cancelled, Engine, EngineError
from engine.batch import Batch
from engine.generation import Text
from engine.request import Request

PROMPTS = ["Once upon a time,", "One day, a little girl", "The fox said", "Title: The Broken Drum\n\n", "He"]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine()


@pytest.mark.parametrize("n_parallel", [1, 3, 8])
def test_texts_are_those_of_lone_streams(engine: Engine, n_parallel: int) -> None:
    """Of different lengths: some end by themselves, and others take their places."""
    settings = {"max_tokens": 60, "seed": 5, "stop": "."}
    texts = engine.generate_many(PROMPTS * 2, n_parallel=n_parallel, **settings)
    alone = ["".join(engine.stream().generate(prompt, **settings)) for prompt in PROMPTS]
    assert texts == alone * 2


@pytest.mark.parametrize("quant", ["f32", "q4_k_m", "q8_0"])
@pytest.mark.parametrize("type_k", ["f16", "q8"])
def test_logits_of_16_streams_in_a_step_are_the_bits_of_each_alone(tmp_path: Path, quant: str, type_k: str) -> None:
    engine = Engine(write_model(tmp_path / "model.gguf", quant=quant, q_lora_rank=64), type_k=type_k)
    prompts = [list(range(5 + i, 8 + 3 * i)) for i in range(16)]
    batch, texts = Batch(engine, 16), []
    for ids in prompts:
        text = Text(batch._idle.pop(), list(ids), Request())
        text.prepare()
        text.advance(ids, 1)
        text.history.append(9)
        texts.append(text)
    logits = batch._step(texts)
    for ids, row in zip(prompts, logits):
        engine.clear()
        engine.step(ids)
        assert (engine.step([9])[: len(row)] == row).all()


def test_contexts_shift_in_a_batch_as_they_do_alone() -> None:
    engine = Engine(n_ctx=40)
    settings = {"max_tokens": 90, "temperature": 0, "context_shift": True, "ignore_eos": True}
    texts = engine.generate_many(PROMPTS, n_parallel=3, **settings)
    assert texts == ["".join(engine.stream().generate(prompt, **settings)) for prompt in PROMPTS]


def test_a_prefix_that_all_prompts_share_is_computed_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    system = "Once there was a dog who had a red ball and a blue ball and a small green boat. " * 3
    reused: list[int] = []
    prepare = Text.prepare

    def count(text: Text, uncancel: bool) -> None:
        prepare(text, uncancel)
        reused.append(text.stats.n_reused)

    monkeypatch.setattr(Text, "prepare", count)
    engine.generate_many([system + who for who in ("He", "She", "It", "They")], n_parallel=2, max_tokens=2)
    assert reused[0] <= 1 and min(reused[1:]) >= len(engine.tokenize(system)) - 1


def test_the_engine_s_own_stream_is_not_touched(engine: Engine) -> None:
    engine.clear()
    engine.step([5, 6, 7])
    engine.generate_many(PROMPTS[:2], max_tokens=3)
    assert engine.tokens == [5, 6, 7]


def test_no_prompts_give_no_texts(engine: Engine) -> None:
    assert engine.generate_many([]) == []


@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        ("One day", {}, "prompts is a text"),
        (["One day", ""], {"n_parallel": 0}, "n_parallel is 0; expected 1 to 16"),
        (["One day"], {"n_parallel": 17}, "expected 1 to 16"),
        (["One day", [99999]], {}, "token id 99999 is not in the vocabulary"),
        (["One day"], {"temprature": 1}, "unknown sampling fields"),
        (["One day"], {"speculate": True}, "takes neither speculate nor progress"),
    ],
)
def test_wrong_arguments_are_refused(engine: Engine, prompts: list, arguments: dict, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        engine.generate_many(prompts, **arguments)


def test_cancel_stops_it_and_the_engine_goes_on(engine: Engine) -> None:
    threading.Timer(0.2, engine.cancel).start()
    start = time.monotonic()
    with pytest.raises(Cancelled):
        engine.generate_many(PROMPTS * 200, max_tokens=500)
    assert time.monotonic() - start < 10
    assert np.isfinite(engine.step([5])).all()
