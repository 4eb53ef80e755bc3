"""The sampler against a plain float64 version of llama.cpp's chain, and its draws against the probabilities."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from compare import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import EngineError
from engine.sampler import Sampler, Sampling

OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def reference(logits: np.ndarray, history: list[int], s: Sampling) -> tuple[list[int], np.ndarray]:
    """(ids, probabilities) left to draw from, most probable first: every step on all, sorted, in float64."""
    values = logits.astype(np.float64)
    recent = history if s.repeat_last_n < 0 else history[len(history) - min(s.repeat_last_n, len(history)) :]
    for token in set(recent):
        values[token] = values[token] / s.repeat_penalty if values[token] > 0 else values[token] * s.repeat_penalty
    ids = sorted(range(len(values)), key=lambda i: (-values[i], i))
    if s.top_k:
        ids = ids[: s.top_k]
    weights = np.exp(values[ids] - values[ids[0]])
    if s.top_p < 1.0:
        n = next((i + 1 for i, p in enumerate(np.cumsum(weights / weights.sum())) if p >= s.top_p), len(ids))
        ids, weights = ids[:n], weights[:n]
    n = max(1, sum(weights >= s.min_p))
    ids = ids[:n]
    weights = np.exp((values[ids] - values[ids[0]]) / s.temperature)
    return ids, weights / weights.sum()


def logits_of(n_vocab: int, spread: float, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(n_vocab) * spread).astype(np.float32)


CASES = [
    dict(zip(("top_k", "top_p", "min_p", "temperature"), case))
    for case in itertools.product((0, 1, 40, 5000), (0.0, 0.5, 0.95, 1.0), (0.0, 0.05, 1.0), (0.3, 1.7))
]


@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
@pytest.mark.parametrize("n_vocab", [1, 37, 4096])
def test_candidates_are_those_of_the_plain_chain(n_vocab: int, spread: float) -> None:
    history = [0, n_vocab - 1, n_vocab // 2, 0]
    for i, case in enumerate(CASES):
        sampling = Sampling(**case, repeat_penalty=1.3)
        logits = logits_of(n_vocab, spread, seed=i)
        ids, probabilities = Sampler(sampling, n_vocab).candidates(logits, history)
        expected_ids, expected = reference(logits, history, sampling)
        order = np.argsort(-probabilities, kind="stable") if len(ids) == n_vocab else slice(None)
        assert ids[order].tolist() == expected_ids, case
        assert_close(probabilities[order], expected, rtol=1e-5)  # a penalised logit of 30 is rounded to f32


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=200), st.integers(0, 60))
def test_equal_logits_are_taken_in_the_order_of_ids(values: list[int], top_k: int) -> None:
    logits = np.array(values, dtype=np.float32)
    sampling = Sampling(top_k=top_k, top_p=0.9, min_p=0.01, temperature=1.0)
    assert Sampler(sampling, len(values)).candidates(logits)[0].tolist() == reference(logits, [], sampling)[0]


def test_draws_follow_the_probabilities() -> None:
    sampling = Sampling(temperature=1.5, top_k=6, top_p=0.98, min_p=0.0, seed=7)
    logits = logits_of(300, 2.0, seed=3)
    sampler = Sampler(sampling, 300)
    n = 20_000
    drawn = np.bincount([sampler.sample(logits) for _ in range(n)], minlength=300)
    ids, probabilities = reference(logits, [], sampling)
    assert drawn[ids].sum() == n
    assert 3 <= len(ids) <= 6
    # each count within 4.5 standard deviations; a shift by one candidate, or no temperature, is off by dozens
    spread = np.sqrt(n * probabilities * (1 - probabilities))
    assert (abs(drawn[ids] - n * probabilities) < 4.5 * spread).all()


def test_same_seed_same_ids() -> None:
    logits = [logits_of(1000, 1.0, seed=i) for i in range(50)]

    def ids(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(seed=seed), 1000)
        return [sampler.sample(row) for row in logits]

    assert ids(5) == ids(5)
    assert ids(5) != ids(6)
    assert ids(None) != ids(None)


def test_temperature_0_takes_the_lowest_id_of_the_greatest() -> None:
    logits = logits_of(5000, 1.0, seed=0)
    logits[[77, 4000]] = 50.0
    assert Sampler(Sampling(temperature=0), 5000).sample(logits) == 77


def test_repeat_penalty_counts_for_temperature_0_too() -> None:
    logits = np.array([-1.0, 2.0, 1.5, -3.0], dtype=np.float32)
    sampler = Sampler(Sampling(temperature=0, repeat_penalty=2.0), 4)
    assert sampler.sample(logits, [1]) == 2
    assert sampler.sample(logits, [1, 2]) == 1  # 1.0 against 0.75: how often a token occurs does not matter
    assert sampler.sample(np.array([-1.0, -1.5], dtype=np.float32).repeat(2), [0, 1]) == 2
    assert logits.tolist() == [-1.0, 2.0, 1.5, -3.0]  # not the caller's array


@pytest.mark.parametrize(("last_n", "expected"), [(2, 0), (3, 1), (-1, 1), (0, 0)])
def test_repeat_penalty_looks_back_repeat_last_n_tokens(last_n: int, expected: int) -> None:
    logits = np.array([1.0, 0.9, 0.1, 0.1], dtype=np.float32)
    sampler = Sampler(Sampling(temperature=0, repeat_penalty=1.5, repeat_last_n=last_n), 4)
    assert sampler.sample(logits, [0, 2, 3]) == expected


def test_excluded_tokens_are_never_drawn() -> None:
    logits = np.full(64, -np.inf, dtype=np.float32)
    logits[[5, 9]] = [1.0, 0.5]
    for cut in (OFF, {}, {"top_k": 3}):
        sampler = Sampler(Sampling(temperature=2.0, seed=1, **cut), 64)
        assert {sampler.sample(logits) for _ in range(50)} == {5, 9}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_broken_logits_are_an_error(value: float, temperature: float) -> None:
    logits = np.zeros(10, dtype=np.float32) if value != -math.inf else np.full(10, value, dtype=np.float32)
    logits[3] = value
    with pytest.raises(EngineError, match="greatest logit"):
        Sampler(Sampling(temperature=temperature), 10).sample(logits)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 1.01),
        ("top_p", -0.1),
        ("min_p", 2),
        ("min_p", None),
        ("repeat_penalty", 0.0),
        ("repeat_penalty", -1.0),
        ("repeat_last_n", -2),
        ("seed", -1),
        ("seed", 0.5),
        ("seed", False),
    ],
)
def test_nonsense_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(EngineError, match=rf"^{field} is .*, expected "):
        Sampling(**{field: value})  # type: ignore[arg-type]


def test_defaults_are_those_of_llama_cpp() -> None:
    s = Sampling()
    assert (s.temperature, s.top_k, s.top_p, s.min_p) == (0.8, 40, 0.95, 0.05)
    assert (s.repeat_penalty, s.repeat_last_n, s.seed) == (1.0, 64, None)


def test_a_large_vocabulary_takes_no_noticeable_time() -> None:
    logits = logits_of(160_000, 3.0, seed=0)
    for cut in ({}, {"top_k": 0}):
        sampler = Sampler(Sampling(seed=1, **cut), 160_000)
        best = math.inf
        for _ in range(20):
            start = time.perf_counter()
            sampler.sample(logits)
            best = min(best, time.perf_counter() - start)
        assert best < 2e-3  # 0.1 to 0.2 ms on an idle core; sorting them all would take 17
