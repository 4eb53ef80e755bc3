"""A prompt pays only for what nobody has computed before it."""

from __future__ import annotations

import numpy as np
import pytest
from compare import assert_relative_rms

from engine import Engine, EngineError
from engine.stream import Stream

SYSTEM = {
    "a": "Once upon a time, there was a little girl named Lily who lived in a big house with her cat and her dog. " * 3,
    "b": "One day, a boy named Tim went to the park with his ball. He saw a bird, a tree and a big red slide. " * 3,
}


def ask(stream: Stream, prompt: str, n: int = 3) -> int:
    """Tokens of the prompt that were not computed again."""
    for _ in stream.generate(prompt, max_tokens=n, temperature=0):
        pass
    return stream.stats.n_reused


def n_common(engine: Engine, one: str, two: str) -> int:
    pairs = zip(engine.tokenize(one), engine.tokenize(two))
    return next(i for i, (a, b) in enumerate(pairs) if a != b)


def test_what_the_cache_holds_of_a_prompt_is_not_computed_again() -> None:
    engine = Engine()
    assert ask(engine, SYSTEM["a"] + "She") == 0
    assert ask(engine, SYSTEM["a"] + "Her dog") == n_common(engine, SYSTEM["a"] + "She", SYSTEM["a"] + "Her dog") > 60


def test_to_ask_again_computes_nothing_and_gives_the_same_text() -> None:
    """Also after another prompt. A long prompt is not computed as its last token alone would be."""
    engine = Engine()
    settings = {"max_tokens": 50, "seed": 3}
    texts = ["".join(engine.generate(SYSTEM[name], **settings)) for name in "aaba"]
    "".join(engine.generate([*engine.tokenize(SYSTEM["a"]), 5, 6], **settings))  # that goes on from there
    texts[1] = "".join(engine.generate(SYSTEM["a"], **settings))
    assert texts[0] == texts[1] == texts[3] == "".join(Engine().generate(SYSTEM["a"], **settings))
    assert engine.stats.n_reused == engine.stats.n_prompt


def test_a_prompt_that_was_stepped_computes_its_last_token_alone() -> None:
    engine = Engine()
    engine.step(engine.tokenize(SYSTEM["a"]))
    assert ask(engine, SYSTEM["a"]) == len(engine.tokenize(SYSTEM["a"])) - 1


def test_an_answer_is_a_prefix_of_the_next_prompt() -> None:
    engine = Engine()
    ids = engine.tokenize(SYSTEM["a"])
    list(engine.generate(ids, max_tokens=8, temperature=0))
    next_prompt = engine.tokens + engine.tokenize(" Then", add_special=False)
    list(engine.generate(next_prompt, max_tokens=1))
    assert engine.stats.n_reused == len(ids) + 7


def test_who_alternates_between_two_system_prompts_pays_for_each_once() -> None:
    engine = Engine()
    reused = [
        ask(engine, SYSTEM[name] + question)
        for name, question in zip("abababab", "She He It We You They I Who".split())
    ]
    assert reused[:2] == [0, 0]
    assert all(n >= len(engine.tokenize(SYSTEM[name])) - 1 for name, n in zip("ababab", reused[2:]))


def test_streams_of_one_engine_share_prefixes() -> None:
    engine = Engine()
    ask(engine, SYSTEM["a"])
    ask(engine, SYSTEM["b"])
    assert ask(engine.stream(), SYSTEM["a"] + "She") >= len(engine.tokenize(SYSTEM["a"])) - 1


def test_rows_of_another_type_k_are_no_prefix() -> None:
    engine = Engine()
    ask(engine, SYSTEM["a"])
    ask(engine, SYSTEM["b"])
    assert ask(engine.stream(type_k="bf16"), SYSTEM["a"]) == 0


@pytest.mark.parametrize("type_k", ["f16", "bf16", "q8"])
def test_with_a_prefix_the_logits_are_those_without(type_k: str) -> None:
    """To rounding: a shorter step multiplies in another order, or in int8 where a longer one has panels."""
    engine = Engine(type_k=type_k)
    for name in "aba":
        ask(engine, SYSTEM[name])
    assert engine.stats.n_reused > 60
    ids = engine.tokenize(SYSTEM["a"])
    engine.truncate(len(ids))
    assert_relative_rms(engine.step([500]), Engine(type_k=type_k).step([*ids, 500]), 1e-1)


def test_the_budget_is_kept_and_the_least_recently_used_goes_first() -> None:
    probe = Engine()
    n, per_token = len(probe.tokenize(SYSTEM["a"])) + 3, probe.cache.layout.bytes_per_token + 4
    engine = Engine(prefix_bytes=int(2.5 * n * per_token))
    prompts = [SYSTEM["a"], SYSTEM["b"], SYSTEM["a"][5:], SYSTEM["b"][4:]]
    for prompt in prompts:
        ask(engine, prompt)
        assert engine.model.prefixes.nbytes <= engine.model.prefixes.budget
    assert ask(engine, prompts[0]) == 0  # gone
    assert ask(engine, prompts[2]) > 60


def test_without_a_budget_nothing_is_kept() -> None:
    engine = Engine(prefix_bytes=0)
    assert [ask(engine, SYSTEM[name]) for name in "aba"] == [0, 0, 0]
    with pytest.raises(EngineError, match="prefix_bytes is -1; expected an integer, 0 or more"):
        Engine(prefix_bytes=-1)


def test_a_prefix_is_a_copy() -> None:
    engine = Engine()
    ask(engine, SYSTEM["a"])
    rows = engine.cache.rows[0][:60].copy()
    ask(engine, SYSTEM["b"])
    for layer in engine.cache.rows:
        layer[:] = 0
    ask(engine, SYSTEM["a"])
    assert (engine.cache.rows[0][:60] == rows).all()


def test_a_shifted_stream_keeps_its_positions_in_a_prefix() -> None:
    engine = Engine()
    ids = engine.tokenize(SYSTEM["a"])
    engine.step(ids)
    engine.shift(4, 10)
    held = engine.tokens
    ask(engine, SYSTEM["b"])
    assert engine.first_position == 0
    list(engine.generate([*held, 7], max_tokens=1))
    assert engine.stats.n_reused == len(held) and engine.first_position == 10
    assert np.isfinite(engine.step([5])).all()


def test_a_prefix_longer_than_the_budget_leaves_the_others_alone() -> None:
    engine = Engine()
    n, per_token = len(engine.tokenize(SYSTEM["a"])) + 3, engine.cache.layout.bytes_per_token + 4
    engine = Engine(prefix_bytes=n * per_token)
    ask(engine, SYSTEM["b"] * 4)
    ask(engine, SYSTEM["a"])
    assert 0 < engine.model.prefixes.nbytes <= engine.model.prefixes.budget


def test_texts_of_a_batch_push_no_prefix_out() -> None:
    engine = Engine(prefix_bytes=400_000)
    ask(engine, SYSTEM["a"])
    ask(engine, SYSTEM["b"])
    engine.generate_many(
        [f"{i} little dogs went to the park to play with a ball. " * 4 for i in range(8)], max_tokens=2
    )
    assert ask(engine, SYSTEM["a"]) > 60


def test_a_closed_engine_gives_its_prefixes_back() -> None:
    engine = Engine()
    ask(engine, SYSTEM["a"])
    ask(engine, SYSTEM["b"])
    engine.close()
    assert engine.model.prefixes.nbytes == 0
