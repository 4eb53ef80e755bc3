"""Guessed tokens change nothing but speed."""

from __future__ import annotations

import pytest

from engine import Engine
from engine.generation import Response
from engine.speculate import PROBE, Lookup

REPEATING = "The cat sat on the mat. The dog sat on the log. " * 4 + "The cat sat"
STORY = "Once upon a time,"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine()


def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Always draft as much as there is room for."""
    monkeypatch.setattr(Lookup, "_size", lambda self: 15)


@pytest.mark.parametrize("prompt", [REPEATING, STORY])
@pytest.mark.parametrize("settings", [{"temperature": 0}, {"seed": 4}, {"seed": 4, "repeat_penalty": 1.2}])
@pytest.mark.parametrize("type_k", ["f16", "bf16", "q8"])
def test_the_text_is_that_without_it(monkeypatch: pytest.MonkeyPatch, prompt: str, settings: dict, type_k: str) -> None:
    eager(monkeypatch)
    engine = Engine(type_k=type_k)
    plain = "".join(engine.generate(prompt, max_tokens=80, **settings))
    assert "".join(engine.generate(prompt, max_tokens=80, speculate=True, **settings)) == plain
    assert engine.stats.n_drafted > 0 or prompt == STORY


def test_repeated_text_takes_far_fewer_steps(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    eager(monkeypatch)
    steps = []
    step = type(engine)._step
    monkeypatch.setattr(
        type(engine), "_step", lambda self, ids, *more: steps.append(len(ids)) or step(self, ids, *more)
    )
    list(engine.generate(REPEATING, max_tokens=60, temperature=0, speculate=True, ignore_eos=True))
    stats = engine.stats
    assert stats.n_generated == 60
    assert len(steps) - 1 == 59 - stats.n_accepted
    assert all(n <= 16 for n in steps[1:])


def test_a_response_says_whether_its_token_was_guessed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    eager(monkeypatch)
    found: list[Response] = list(engine.stream_generate(REPEATING, max_tokens=40, temperature=0, speculate=True))
    assert sum(response.from_draft for response in found) == engine.stats.n_accepted > 0


def test_the_cache_holds_what_was_chosen_and_no_guess(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    eager(monkeypatch)
    prompt = engine.tokenize(REPEATING)
    tokens = [r.token for r in engine.stream_generate(prompt, max_tokens=33, temperature=0.9, seed=1, speculate=True)]
    text = prompt + tokens[:-1]  # the last response repeats its token
    assert engine.tokens == text[: engine.n_kv] and engine.n_kv >= len(text) - 1


@pytest.mark.parametrize("max_tokens", [1, 2, 7, 16, 17])
def test_max_tokens_is_kept(engine: Engine, monkeypatch: pytest.MonkeyPatch, max_tokens: int) -> None:
    eager(monkeypatch)
    list(engine.generate(REPEATING, max_tokens=max_tokens, temperature=0, speculate=True, ignore_eos=True))
    assert engine.stats.n_generated == max_tokens


def test_a_full_context_ends_the_text_or_shifts(monkeypatch: pytest.MonkeyPatch) -> None:
    eager(monkeypatch)
    engine = Engine(n_ctx=90)
    settings = {"temperature": 0, "speculate": True, "ignore_eos": True}
    list(engine.generate(REPEATING, **settings))
    assert engine.stats.finish_reason == "length" and engine.n_kv == 90
    list(engine.generate(REPEATING, max_tokens=150, context_shift=True, **settings))
    assert engine.stats.n_generated == 150


def test_stop_strings_and_the_end_of_the_text_hold_inside_a_draft(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager(monkeypatch)
    settings = {"max_tokens": 60, "temperature": 0}
    whole = "".join(engine.generate(REPEATING, **settings))
    stop = whole[20:26]
    assert "".join(engine.generate(REPEATING, stop=stop, speculate=True, **settings)) == whole[: whole.index(stop)]


def test_it_switches_itself_off_when_guesses_are_wrong() -> None:
    lookup, ids = Lookup([1, 2, 3] * 5), [1, 2, 3] * 5
    drafted = 0
    for i in range(300):
        draft = lookup.draft(ids, 15)
        drafted += bool(draft)
        lookup.timed(1 + len(draft), 1.0 + 0.3 * len(draft))
        ids += [50 + i, 1, 2, 3]  # never what followed before
    assert drafted < 300 / PROBE * 2 + 20


def test_it_guesses_as_much_as_pays() -> None:
    """Always right: 16 rows at once if rows are cheap, none if a row costs as much as a step."""
    for cost, expected in ((0.1, 15), (1.2, 0)):
        lookup, ids = Lookup([1, 2, 3, 4] * 10), [1, 2, 3, 4] * 10
        for n in (1, 2, 4, 8, 16):
            lookup.timed(n, 1 + cost * (n - 1))
        for _ in range(40):
            draft = lookup.draft(ids, 15)
            ids += [*draft, 1 + (draft or ids)[-1] % 4]
        assert lookup._size() in (expected, 3 if lookup._quiet >= PROBE else expected)


def test_guesses_follow_the_last_place_where_the_text_was_the_same() -> None:
    ids = [1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 1, 2, 3]
    assert Lookup(ids).draft(ids, 1) == [6]
    assert Lookup([1, 2, 3]).draft([1, 2, 3], 15) == []
    assert Lookup([9, 2, 3, 8, 2, 3]).draft([9, 2, 3, 8, 2, 3], 1) == [8]


@pytest.mark.parametrize("options", [{"n_ctx": 9}, {"n_ubatch": 3}])
def test_it_fits_a_short_context_and_a_small_ubatch(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    eager(monkeypatch)
    engine = Engine(**options)
    settings = {"max_tokens": 30, "temperature": 0}
    prompt = engine.tokenize(REPEATING)[:7]
    assert "".join(engine.generate(prompt, speculate=True, **settings)) == "".join(
        engine.stream().generate(prompt, **settings)
    )


def test_a_processor_that_raises_leaves_no_guess_in_the_cache(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    eager(monkeypatch)
    prompt, seen = engine.tokenize(REPEATING), []

    def fail(history: list[int], _: object) -> None:
        seen[:] = history
        if len(history) == len(prompt) + 12:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(engine.generate(prompt, temperature=0, speculate=True, ignore_eos=True, logits_processor=fail))
    assert engine.tokens == seen[: engine.n_kv] and engine.n_kv >= len(seen) - 1
