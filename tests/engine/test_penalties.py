"""Penalties against their definitions, written out in Python; test_sampler_against_llama_cpp.py has llama.cpp's."""

from __future__ import annotations

import time

import numpy as np
from compare import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling import Sampling
from engine.sampling.penalties import Breakers, breakers_of, dry, penalise

histories = st.lists(st.integers(0, 5), max_size=40)


class Letters:
    """A tokenizer of a to j and of some pairs of them."""

    words = [*"abcdefghij", "ab", "bc", "xbc", "ca"]
    n_vocab = len(words)

    def token_bytes(self, token: int) -> bytes:
        return self.words[token].encode()

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        return [self.words.index(letter) for letter in text]


def plain_dry(logits: np.ndarray, history: list[int], s: Sampling, breakers: set[int]) -> np.ndarray:
    """By definition: for each place, the longest run that ends both there and at the end, since the last breaker."""
    history = history if s.dry_penalty_last_n < 0 else history[max(0, len(history) - s.dry_penalty_last_n) :]
    n = len(history)
    since = next((i for i in range(n) if history[n - 1 - i] in breakers), n)
    longest: dict[int, int] = {}
    for end in range(n - 1):
        run = 0
        while run <= end and history[end - run] == history[n - 1 - run]:
            run += 1
        run = min(run, since)
        longest[history[end + 1]] = max(run, longest.get(history[end + 1], 0))
    out = logits.astype(np.float64)
    if n > s.dry_allowed_length and since >= s.dry_allowed_length:
        for token, run in longest.items():
            if run >= s.dry_allowed_length and token not in breakers:
                out[token] -= s.dry_multiplier * s.dry_base ** (run - s.dry_allowed_length)
    return out


@settings(deadline=None, max_examples=300)
@given(histories, st.integers(0, 3), st.sampled_from([-1, 1, 7, 30]), st.sets(st.integers(0, 5), max_size=2))
def test_dry_penalises_what_prolongs_the_longest_run(
    history: list[int], allowed: int, last_n: int, single: set[int]
) -> None:
    s = Sampling(dry_multiplier=0.7, dry_base=1.5, dry_allowed_length=allowed, dry_penalty_last_n=last_n)
    logits = np.arange(6, dtype=np.float32)
    expected = plain_dry(logits, history, s, single)
    breakers: Breakers = {token: {()} for token in single}
    dry(logits, history, s, breakers)
    assert_close(logits, expected, rtol=1e-6)


def test_a_run_reaches_back_to_a_breaker_of_several_tokens_at_most() -> None:
    breakers = breakers_of(Letters(), ["cde"])  # type: ignore[arg-type]
    s = Sampling(dry_multiplier=1.0, dry_base=2.0, dry_allowed_length=1)
    a, b, c, d, e, f = range(6)
    logits = np.zeros(14, np.float32)
    dry(logits, [a, b, c, d, e, a, b, f, a, b, c, d, e, a, b], s, breakers)
    assert logits[[c, f]].tolist() == [-2.0, -2.0]  # after `a b`; `e a b` and more would be 4, 8, …
    dry(logits := np.zeros(14, np.float32), [a, b, f, a, b], s, breakers)
    assert logits[f] == -2.0
    assert np.count_nonzero(logits) == 1


def test_breakers_are_found_inside_and_across_tokens() -> None:
    found = breakers_of(Letters(), ["bc"])  # type: ignore[arg-type]
    b, c, ab, bc, xbc = 1, 2, 10, 11, 12
    assert found == {b: {(c,)}, ab: {(c,)}, bc: {()}, xbc: {()}}


def test_a_long_repetitive_text_takes_little_time() -> None:
    s = Sampling(dry_multiplier=0.8)
    logits = np.zeros(100, np.float32)
    for text in ([7] * 16_000, list(range(100)) * 160):
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            dry(logits, text, s, {})
            best = min(best, time.perf_counter() - start)
        assert best < 0.1  # 4 ms and 2 ms on an idle core; no more than 160 lengths are looked at


def test_a_run_beyond_the_largest_exponent_is_penalised_with_the_largest_finite_power() -> None:
    for base in (1.75, 1e300):
        logits = np.zeros(10, np.float32)
        for _ in range(3):
            dry(logits, [7] * 500, Sampling(dry_multiplier=0.8, dry_base=base), {})
        assert np.isfinite(logits).all()
        assert logits[7] < -1e37


@settings(deadline=None, max_examples=200)
@given(histories, st.sampled_from([0, 1, 5, -1]), st.sampled_from([1.0, 1.3, 0.7]), st.sampled_from([0.0, 0.5, -0.2]))
def test_repeat_presence_and_frequency_penalties_by_definition(
    history: list[int], last_n: int, repeat: float, other: float
) -> None:
    s = Sampling(repeat_penalty=repeat, presence_penalty=other, frequency_penalty=other / 2, repeat_last_n=last_n)
    logits = np.array([-2.0, -1.0, 0.0, 1.0, 2.0, 3.0], np.float32)
    expected = logits.astype(np.float64)
    recent = history if last_n < 0 else history[max(0, len(history) - last_n) :]
    for token in set(recent):
        expected[token] *= 1 / repeat if expected[token] > 0 else repeat
        expected[token] -= recent.count(token) * other / 2 + other
    penalise(logits, history, s)
    assert_close(logits, expected, rtol=1e-6, atol=1e-6)
