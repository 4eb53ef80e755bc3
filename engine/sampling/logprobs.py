"""Log-probabilities of what the model said: of its own distribution, before penalties, cuts and temperature."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..errors import EngineError
from .cuts import greatest


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of probabilities; `top` falls, and holds the token itself only if it is among the first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (id, logprob)


def token_logprobs(logits: np.ndarray, token: int, n_top: int = 0) -> TokenLogprobs:
    """The token's log-probability and the n_top most probable tokens; logits (n_vocab,) f32, not changed."""
    if n_top < 0:
        raise EngineError(f"logprobs is {n_top!r}, expected 0 or more")
    peak = float(logits.max())
    if not math.isfinite(peak):
        raise EngineError(f"the greatest logit is {peak}: the model file is damaged, or a kernel failed")
    log_sum = peak + math.log(np.exp(logits - np.float32(peak)).sum(dtype=np.float64))
    top = greatest(logits, n_top).tolist() if n_top else ()
    return TokenLogprobs(
        int(token), float(logits[token]) - log_sum, tuple((i, float(logits[i]) - log_sum) for i in top)
    )
