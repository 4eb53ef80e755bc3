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
from engine.sampling import Sampler, Sampling

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
        ("dynatemp_range", -0.1),
        ("dynatemp_exponent", math.inf),
        ("typical_p", 1.1),
        ("top_n_sigma", math.nan),
        ("xtc_probability", -0.1),
        ("xtc_threshold", 2),
        ("dry_multiplier", -1),
        ("dry_base", "1.75"),
        ("dry_allowed_length", -1),
        ("dry_penalty_last_n", -2),
        ("dry_sequence_breakers", "\n"),
        ("dry_sequence_breakers", 5),
        ("presence_penalty", math.inf),
        ("frequency_penalty", None),
        ("mirostat", 1),
        ("mirostat", True),
        ("mirostat_tau", -1.0),
        ("mirostat_eta", "fast"),
        ("logit_bias", [(1, 2.0)]),
        ("ignore_eos", 1),
        ("min_keep", -1),
        ("seed", -1),
        ("seed", 0.5),
        ("seed", False),
    ],
)
def test_nonsense_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(EngineError, match=rf"^{field} is .*, expected "):
        Sampling(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("logit_bias", {-1: 1.0}, "logit_bias is given for -1, expected token ids"),
        ("logit_bias", {"the": 1.0}, "logit_bias is given for 'the', expected token ids"),
        ("logit_bias", {3: math.inf}, "logit_bias of token 3 is inf, expected a number, or -inf for never"),
        ("logit_bias", {3: math.nan}, "logit_bias of token 3 is nan, expected a number, or -inf for never"),
        ("logit_bias", {3: "no"}, "logit_bias of token 3 is 'no', expected a number, or -inf for never"),
        ("dry_sequence_breakers", ["a", ""], "dry_sequence_breakers holds '', expected non-empty strings"),
        ("dry_sequence_breakers", [b"a"], "dry_sequence_breakers holds b'a', expected non-empty strings"),
    ],
)
def test_nonsense_inside_a_field_is_named(field: str, value: object, message: str) -> None:
    with pytest.raises(EngineError) as raised:
        Sampling(**{field: value})  # type: ignore[arg-type]
    assert str(raised.value) == message


def test_settings_are_values() -> None:
    biases = {5: 1.0}
    s = Sampling(logit_bias=biases, dry_sequence_breakers=["."])
    biases[6] = 2.0
    assert s.logit_bias == {5: 1.0}  # the caller's dictionary may change
    assert s == Sampling(logit_bias={5: 1}, dry_sequence_breakers=(".",))
    assert len({s, Sampling(), Sampling()}) == 2
    with pytest.raises(AttributeError):
        s.seed = 1  # type: ignore[misc]


def test_defaults_are_those_of_llama_cpp() -> None:
    s = Sampling()
    assert (s.temperature, s.top_k, s.top_p, s.min_p) == (0.8, 40, 0.95, 0.05)
    assert (s.repeat_penalty, s.repeat_last_n, s.seed) == (1.0, 64, None)
    assert (s.presence_penalty, s.frequency_penalty, s.logit_bias, s.ignore_eos, s.min_keep) == (0, 0, None, False, 0)
    assert (s.typical_p, s.top_n_sigma, s.xtc_probability, s.xtc_threshold) == (1.0, -1.0, 0.0, 0.1)
    assert (s.dynatemp_range, s.dynatemp_exponent) == (0.0, 1.0)
    assert (s.dry_multiplier, s.dry_base, s.dry_allowed_length, s.dry_penalty_last_n) == (0.0, 1.75, 2, -1)
    assert s.dry_sequence_breakers == ("\n", ":", '"', "*")
    assert (s.mirostat, s.mirostat_tau, s.mirostat_eta) == (0, 5.0, 0.1)


# ------------------------------------------------------------------------------- biases, processors, constraints


class Vocabulary:
    """As much of a tokenizer as a sampler needs."""

    eog_ids = frozenset((2, 70))
    n_vocab = 64

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])


def test_a_bias_is_added_and_may_forbid() -> None:
    logits = np.zeros(64, np.float32)
    logits[:3] = 4.0, 3.0, 2.0
    s = {"temperature": 0}
    assert Sampler(Sampling(**s, logit_bias={2: 2.5}), 64).sample(logits) == 2
    assert Sampler(Sampling(**s, logit_bias={0: -math.inf, 1: -1.5}), 64).sample(logits) == 2
    assert logits[:3].tolist() == [4.0, 3.0, 2.0]
    with pytest.raises(EngineError, match="token 64, which is not in the vocabulary of 64"):
        Sampler(Sampling(logit_bias={64: 1.0}), 64)
    with pytest.raises(EngineError, match="^logit_bias excludes every token; expected at least one finite logit"):
        Sampler(Sampling(logit_bias=dict.fromkeys(range(64), -math.inf)), 64).sample(logits)


def test_ignore_eos_forbids_all_ends_of_text() -> None:
    logits = np.zeros(64, np.float32)
    logits[2], logits[9] = 9.0, 8.0
    assert Sampler(Sampling(temperature=0, ignore_eos=True), 64, Vocabulary()).sample(logits) == 9  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="ignore_eos needs the tokenizer"):
        Sampler(Sampling(ignore_eos=True), 64)
    with pytest.raises(EngineError, match="dry_sequence_breakers need the tokenizer"):
        Sampler(Sampling(dry_multiplier=1.0), 64)


def test_processors_see_the_history_and_change_or_replace_the_logits() -> None:
    logits = np.zeros(64, np.float32)
    logits[2] = 9.0
    seen: list[object] = []

    def change(history: list[int], view: np.ndarray) -> None:
        seen.append(list(history))
        view[2] = -np.inf
        view[5] = 1.0

    def replace(history: list[int], view: np.ndarray) -> np.ndarray:
        seen.append(view[5])
        return view.astype(np.float64) * -1.0

    greedy = Sampling(temperature=0, logit_bias={2: 1.0})
    assert Sampler(greedy, 64, processors=change).sample(logits, [7, 8]) == 5
    assert seen == [[7, 8]]
    assert logits[2] == 9.0
    lowest = Sampler(Sampling(temperature=0), 64, processors=[lambda _, view: view.__setitem__(9, -3.0), replace])
    assert lowest.sample(logits) == 9


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        (np.zeros(63, np.float32), r"returned float32 \(63,\), expected None or an array of floats of shape \(64,\)"),
        (np.zeros((1, 64), np.float32), r"returned float32 \(1, 64\), expected"),
        (np.zeros(64, np.int32), r"returned int32 \(64,\), expected"),
        ([0.0] * 64, "returned list, expected"),
        (np.full(64, -np.inf), "excludes every token; expected at least one finite logit"),
        (np.full(64, np.nan), "leaves a logit of NaN; expected"),
        (np.full(64, np.inf), "leaves a logit of inf; expected"),
    ],
)
def test_what_a_processor_may_not_return_is_named(returned: object, found: str) -> None:
    def mine(history: object, logits: object) -> object:
        return returned

    with pytest.raises(EngineError, match="^logits processor .*mine " + found):
        Sampler(Sampling(), 64, processors=[mine]).sample(np.zeros(64, np.float32))  # type: ignore[list-item]


def test_processors_must_be_callable() -> None:
    with pytest.raises(EngineError, match="logits_processor holds 5, expected callables"):
        Sampler(Sampling(), 64, processors=[5])  # type: ignore[list-item]


class Even:
    """A constraint: even tokens only; none at all once it is over."""

    def __init__(self) -> None:
        self.accepted: list[int] = []
        self.over = False

    def mask(self, logits: np.ndarray) -> None:
        logits[:: 1 if self.over else 2] = -np.inf

    def accept(self, token: int) -> None:
        self.accepted.append(token)


@pytest.mark.parametrize("cut", [{}, OFF, {"top_k": 3}, {"temperature": 0}, {"mirostat": 2}])
def test_a_constraint_excludes_and_is_told(cut: dict[str, float]) -> None:
    even = Even()
    sampler = Sampler(Sampling(seed=3, **cut), 64, constraint=even)  # type: ignore[arg-type]
    drawn = [sampler.sample(logits_of(64, 1.0, seed=i)) for i in range(40)]
    assert even.accepted == drawn
    assert all(token % 2 for token in drawn)
    even.over = True
    with pytest.raises(EngineError, match="^the grammar, after logit_bias.* excludes every token"):
        sampler.sample(logits_of(64, 1.0, seed=0))


# ----------------------------------------------------------------------------------------- draws of the new cuts


def test_xtc_drops_the_first_as_often_as_asked() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(Sampling(**OFF, temperature=1.0, xtc_probability=0.25, xtc_threshold=0.1, seed=5), 4)
    kept = [len(sampler.candidates(logits)[0]) for _ in range(4000)]
    assert set(kept) == {2, 4}  # of three with 0.1 or more, the last stays
    assert abs(kept.count(2) / 4000 - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)


def test_mirostat_keeps_the_surprise_near_tau() -> None:
    for tau in (2.0, 4.0):
        sampler = Sampler(Sampling(mirostat=2, mirostat_tau=tau, temperature=1.0, seed=1), 2000)
        surprise = []
        for i in range(600):
            logits = logits_of(2000, 3.0, seed=i % 7)
            ids, probabilities = sampler.candidates(logits)
            surprise.append(-math.log2(probabilities[ids == sampler.sample(logits)][0]))
        assert abs(np.mean(surprise[100:]) - tau) < 0.15  # measured: 0.01


def test_seeded_choices_repeat_with_every_option_on() -> None:
    options = {"xtc_probability": 0.5, "xtc_threshold": 0.05, "typical_p": 0.95, "dynatemp_range": 0.5, "top_k": 200}
    for s in (Sampling(seed=9, **options), Sampling(seed=9, mirostat=2)):  # type: ignore[arg-type]
        runs = []
        for _ in range(2):
            sampler = Sampler(s, 1000)
            runs.append([sampler.sample(logits_of(1000, 2.0, seed=i)) for i in range(40)])
        assert runs[0] == runs[1]


def test_a_large_vocabulary_takes_no_noticeable_time() -> None:
    logits = logits_of(160_000, 3.0, seed=0)
    for cut in ({}, {"top_k": 0}, {"repeat_penalty": 1.1}):
        sampler = Sampler(Sampling(seed=1, **cut), 160_000)
        best = math.inf
        for _ in range(20):
            start = time.perf_counter()
            sampler.sample(logits)
            best = min(best, time.perf_counter() - start)
        assert best < 2e-3  # 0.1 to 0.2 ms on an idle core; sorting them all would take 17
