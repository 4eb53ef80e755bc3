"""Log-probabilities against a plain softmax in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from compare import assert_close

from engine.errors import EngineError
from engine.sampling import token_logprobs


@pytest.mark.parametrize("n_vocab", [1, 5, 37, 5000])
@pytest.mark.parametrize("n_top", [0, 1, 4, 20])
def test_logprobs_are_those_of_the_softmax(n_vocab: int, n_top: int) -> None:
    logits = (np.random.default_rng(n_vocab).standard_normal(n_vocab) * 4).astype(np.float32)
    x = logits.astype(np.float64)
    expected = x - x.max() - math.log(np.exp(x - x.max()).sum())
    found = token_logprobs(logits, n_vocab // 2, n_top)
    assert found.token == n_vocab // 2
    assert_close(np.array(found.logprob), expected[n_vocab // 2], rtol=1e-6, atol=1e-6)
    order = np.argsort(-expected, kind="stable")[:n_top]
    assert [token for token, _ in found.top] == order.tolist()
    assert_close(np.array([logprob for _, logprob in found.top]), expected[order], rtol=1e-6, atol=1e-6)
    assert all(type(token) is int and type(logprob) is float for token, logprob in found.top)


def test_the_lower_id_of_equals_comes_first() -> None:
    logits = np.zeros(300, np.float32)
    assert [token for token, _ in token_logprobs(logits, 7, 3).top] == [0, 1, 2]


def test_excluded_tokens_have_no_place_among_the_first() -> None:
    logits = np.full(100, -np.inf, np.float32)
    logits[[4, 9]] = 1.0
    found = token_logprobs(logits, 5, 4)
    assert [token for token, _ in found.top] == [4, 9]
    assert found.logprob == -math.inf


def test_nonsense_is_refused() -> None:
    with pytest.raises(EngineError, match="logprobs is -1, expected 0 or more"):
        token_logprobs(np.zeros(5, np.float32), 0, -1)
    with pytest.raises(EngineError, match="the greatest logit is nan"):
        token_logprobs(np.full(5, np.nan, np.float32), 0)
