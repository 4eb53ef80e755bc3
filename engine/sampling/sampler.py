"""Choosing the next token: `Sampler(Sampling(temperature=0.6, seed=1), n_vocab).sample(logits, history)`.

    logits ─ logit_bias, ignore_eos ─ logits processors ─ grammar ─ penalties ─ dry
           ─ top_n_sigma ─ top_k ─ typical_p ─ top_p ─ min_p ─ xtc ─ temperature ─► probabilities ─ draw ─► token id
           or, with mirostat=2:                              temperature ─ mirostat ─► …

Names, defaults and order are llama.cpp's, so all that cuts looks at probabilities *before* the temperature. Two things
differ: with Mirostat, llama.cpp drops the penalties without a word; and what a grammar, a bias or top_n_sigma excludes
is no candidate here, while llama.cpp lets it fill up top_k and min_keep with a probability of 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..errors import EngineError
from .cuts import candidates, cut_tail, greatest, in_falling_order, log_softmax, top_n_sigma, typical, xtc
from .penalties import Breakers, breakers_of, dry, penalise
from .settings import Sampling

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

History = Sequence[int] | np.ndarray
LogitsProcessor = Callable[[Sequence[int], np.ndarray], np.ndarray | None]


class TokenConstraint(Protocol):
    """What a Sampler asks of a grammar's Constraint, or of anything like it."""

    def mask(self, logits: np.ndarray) -> None:
        """Set to -inf what may not come next."""

    def accept(self, token: int) -> None:
        """The token that was chosen."""


class Sampler:
    """A Sampling with the state of its random numbers (and of Mirostat): one for each text.

    tokenizer   needed by ignore_eos and by the sequence breakers of DRY
    processors  called with (history, logits view (n_vocab,) f32), which they change, or return another array for
    constraint  asked for the tokens that may come next, and told which one came
    """

    def __init__(
        self,
        sampling: Sampling,
        n_vocab: int,
        tokenizer: Tokenizer | None = None,
        processors: LogitsProcessor | Sequence[LogitsProcessor] = (),
        constraint: TokenConstraint | None = None,
    ) -> None:
        s = sampling
        self.sampling = s
        self.n_vocab = n_vocab
        self._processors = (processors,) if callable(processors) else tuple(processors)
        if wrong := [p for p in self._processors if not callable(p)]:
            raise EngineError(f"logits_processor holds {wrong[0]!r}, expected callables of (history, logits)")
        self._constraint = constraint
        self._bias_ids, self._biases = self._biased(tokenizer)
        some = (s.repeat_penalty, s.presence_penalty, s.frequency_penalty) != (1.0, 0.0, 0.0)
        self._penalise = some and s.repeat_last_n != 0
        self._breakers = self._dry_breakers(tokenizer)
        self._edits = bool(len(self._bias_ids) or self._processors or constraint is not None or self._penalise) or (
            self._breakers is not None
        )
        self._xtc = s.xtc_probability > 0.0 and s.xtc_threshold <= 0.5
        self._greedy = s.temperature == 0.0 and (
            s.mirostat == 2 or not (self._xtc or s.typical_p < 1.0 or s.dynatemp_range > 0.0)
        )
        self._mu = 2.0 * s.mirostat_tau  # largest surprise that Mirostat lets through, bits
        self._random = np.random.Generator(np.random.PCG64(s.seed))

    def sample(self, logits: np.ndarray, history: History = ()) -> int:
        """The id of the next token.

        logits   (n_vocab,) f32; -inf excludes a token; not changed
        history  ids of the tokens so far, prompt included: the penalties'
        """
        logits = self._edited(logits, history)
        token = int(np.argmax(logits)) if self._greedy else self._draw(*self._left(logits))
        if self._constraint is not None:
            self._constraint.accept(token)
        return token

    def candidates(self, logits: np.ndarray, history: History = ()) -> tuple[np.ndarray, np.ndarray]:
        """(ids, probabilities) of the tokens left to draw from, float64, after the temperature.

        The most probable comes first, the lower id of equals; in the order of ids if nothing is cut off.
        """
        return self._left(self._edited(logits, history))

    def _draw(self, ids: np.ndarray, probabilities: np.ndarray) -> int:
        reached = np.cumsum(probabilities)
        drawn = int(np.searchsorted(reached, self._random.random() * reached[-1], side="right"))
        drawn = min(drawn, len(ids) - 1)
        if self.sampling.mirostat == 2:
            surprise = -math.log2(probabilities[drawn])
            self._mu -= self.sampling.mirostat_eta * (surprise - self.sampling.mirostat_tau)
        return int(ids[drawn])

    # ------------------------------------------------------------------------------------------ before the cuts

    def _edited(self, logits: np.ndarray, history: History) -> np.ndarray:
        """The logits with biases, processors, grammar and penalties: a copy if there are any."""
        assert logits.shape == (self.n_vocab,), (logits.shape, self.n_vocab)
        _check_model(logits)
        if not self._edits:
            return logits
        logits = logits.astype(np.float32)
        if len(self._bias_ids):
            logits[self._bias_ids] += self._biases
            _check_some(logits, "logit_bias")
        for processor in self._processors:
            logits = _processed(logits, processor, history)
        if self._constraint is not None:
            self._constraint.mask(logits)
            _check_some(logits, "the grammar, after logit_bias, ignore_eos and the logits processors,")
        if self._penalise:
            penalise(logits, history, self.sampling)
        if self._breakers is not None:
            dry(logits, history, self.sampling, self._breakers)
        return logits

    def _biased(self, tokenizer: Tokenizer | None) -> tuple[np.ndarray, np.ndarray]:
        """(ids, biases) of logit_bias and ignore_eos."""
        biases = dict(self.sampling.logit_bias or {})
        if self.sampling.ignore_eos:
            if tokenizer is None:
                raise EngineError(
                    "ignore_eos needs the tokenizer, which knows the end-of-text tokens; give the Sampler one"
                )
            biases |= dict.fromkeys(tokenizer.eog_ids, -math.inf)
        if foreign := [i for i in self.sampling.logit_bias or () if i >= self.n_vocab]:
            raise EngineError(
                f"logit_bias is given for token {foreign[0]}, which is not in the vocabulary of {self.n_vocab:,}"
            )
        ids = np.array([i for i in biases if i < self.n_vocab], dtype=np.int64)
        return ids, np.array([biases[i] for i in ids.tolist()], dtype=np.float32)

    def _dry_breakers(self, tokenizer: Tokenizer | None) -> Breakers | None:
        """None: DRY is off."""
        s = self.sampling
        if s.dry_multiplier == 0.0 or s.dry_base < 1.0 or s.dry_penalty_last_n == 0:
            return None
        if not s.dry_sequence_breakers:
            return {}
        if tokenizer is None:
            raise EngineError("dry_sequence_breakers need the tokenizer; give the Sampler one, or no breakers")
        return breakers_of(tokenizer, s.dry_sequence_breakers)

    # ------------------------------------------------------------------------------------------------- the cuts

    def _left(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        s = self.sampling
        if s.mirostat == 2:
            return self._mirostat(logits)
        if s.top_n_sigma > 0.0:
            logits = top_n_sigma(logits, s.top_n_sigma)
        ids = None  # all of them
        if 0 < s.top_k < self.n_vocab:
            ids = greatest(logits, s.top_k)
        top = logits.max() if ids is None else logits[ids[0]]
        if s.typical_p < 1.0:
            ids = typical(logits, ids, s.typical_p, s.min_keep)
            top = logits[ids[0]]
        if s.top_p < 1.0 or s.min_p > 0.0:
            ids = cut_tail(logits, ids, top, s.top_p, s.min_p, s.min_keep)
        if self._xtc:
            if ids is None:
                ids = in_falling_order(logits, candidates(logits))
            if len(ids) > 1 and self._random.random() <= s.xtc_probability:
                ids = xtc(logits, ids, s.xtc_threshold, s.min_keep)
                top = logits[ids[0]]
        if ids is None:
            ids = candidates(logits)
        temperature = s.temperature if s.dynatemp_range == 0.0 else self._dynamic_temperature(logits[ids])
        if temperature == 0.0:
            return ids[[np.argmax(logits[ids])]], np.ones(1)
        weights = np.exp((logits[ids].astype(np.float64) - top) / temperature)
        return ids, weights / weights.sum()

    def _dynamic_temperature(self, logits: np.ndarray) -> float:
        """temperature - range to temperature + range, by the entropy of the candidates as a share of the possible."""
        s = self.sampling
        if len(logits) == 1:
            return s.temperature
        low, high = max(0.0, s.temperature - s.dynatemp_range), s.temperature + s.dynatemp_range
        log_p = log_softmax(logits)
        entropy = -float((np.exp(log_p) * log_p).sum()) / math.log(len(logits))
        return low + (high - low) * max(0.0, entropy) ** s.dynatemp_exponent

    def _mirostat(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mirostat 2.0 (arXiv 2007.14966): the tokens whose surprise is at most mu, or else the most probable one."""
        if self.sampling.temperature == 0.0:
            return np.array([np.argmax(logits)]), np.ones(1)
        scaled = (logits - logits.max()) / np.float32(self.sampling.temperature)
        log_sum = math.log(np.exp(scaled).sum(dtype=np.float64))
        kept = np.flatnonzero(scaled >= log_sum - self._mu * math.log(2.0))
        ids = in_falling_order(logits, kept) if len(kept) else np.array([np.argmax(logits)])
        weights = np.exp(scaled[ids].astype(np.float64))
        return ids, weights / weights.sum()


def _processed(logits: np.ndarray, processor: LogitsProcessor, history: History) -> np.ndarray:
    name = getattr(processor, "__qualname__", type(processor).__qualname__)
    returned = processor(history, logits)  # type: ignore[arg-type]
    if returned is None:
        returned = logits
    found = f"{returned.dtype} {returned.shape}" if isinstance(returned, np.ndarray) else type(returned).__name__
    if not isinstance(returned, np.ndarray) or returned.shape != logits.shape or returned.dtype.kind != "f":
        raise EngineError(
            f"logits processor {name} returned {found}, expected None or an array of floats of shape {logits.shape}"
        )
    logits = returned.astype(np.float32, copy=returned is not logits)
    _check_some(logits, f"logits processor {name}")
    return logits


def _check_some(logits: np.ndarray, who: str) -> None:
    """One token, at least, must be left."""
    top = logits.max()
    if not np.isfinite(top):
        left = "excludes every token" if top == -np.inf else "leaves a logit of " + ("NaN" if np.isnan(top) else "inf")
        raise EngineError(f"{who} {left}; expected at least one finite logit, and -inf for what may not come")


def _check_model(logits: np.ndarray) -> None:
    top = logits.max()
    if not np.isfinite(top):
        what = "NaN" if np.isnan(top) else str(top)
        raise EngineError(f"the greatest logit is {what}: the model file is damaged, or a kernel failed")
