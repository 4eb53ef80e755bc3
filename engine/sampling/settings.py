"""Sampling: the settings of a Sampler, frozen and checked. Names and defaults are llama.cpp's."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import EngineError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose among the next tokens, in the order in which the settings take effect.

    'Recent tokens' are those of the prompt and the answer so far. Where all tokens but one would go, one stays.
    """

    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)  # added to logits by id; -inf: never
    ignore_eos: bool = False  # never end by an end-of-text token

    repeat_penalty: float = 1.0  # positive logits of recent tokens are divided by it, negative ones multiplied; 1: off
    presence_penalty: float = 0.0  # taken from the logits of recent tokens; 0: off
    frequency_penalty: float = 0.0  # taken from them once for each time that they occurred; 0: off
    repeat_last_n: int = 64  # how many tokens are recent for these three; 0: none, -1: all

    dry_multiplier: float = 0.0  # penalty of a token that makes a repetition of dry_allowed_length + 1 tokens; 0: off
    dry_base: float = 1.75  # times this for each token more; below 1: off
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1  # how many recent tokens are searched; 0: none, -1: all
    dry_sequence_breakers: Sequence[str] = ("\n", ":", '"', "*")  # no repetition reaches back beyond one of these

    top_n_sigma: float = -1.0  # keep logits within n standard deviations of the greatest; 0 or less: all
    top_k: int = 40  # keep the k most probable; 0: all
    typical_p: float = 1.0  # keep those nearest to the expected surprise until they reach this sum; 1: all
    top_p: float = 0.95  # keep the fewest whose probabilities reach this sum; 1: all
    min_p: float = 0.05  # keep those with at least this share of the greatest probability; 0: all
    xtc_probability: float = 0.0  # how often to drop all but the last of those with xtc_threshold or more; 0: never
    xtc_threshold: float = 0.1  # more than 0.5: never
    min_keep: int = 0  # typical_p, top_p, min_p and xtc leave at least this many

    temperature: float = 0.8  # 0: always the most probable token, the lowest id among equals
    dynatemp_range: float = 0.0  # temperature - range where the model is sure, + range where it is not; 0: off
    dynatemp_exponent: float = 1.0  # of the normalised entropy between these two

    mirostat: int = 0  # 2: the temperature and Mirostat 2.0 in the place of all from top_n_sigma on; 0: off
    mirostat_tau: float = 5.0  # surprise to keep to, in bits
    mirostat_eta: float = 0.1  # learning rate

    seed: int | None = None  # same seed, same choices; None: another one each time

    def __post_init__(self) -> None:
        for name, low, high in _NUMBERS:
            self._check_number(name, low, high)
        for name, low in _INTEGERS:
            self._check_integer(name, low)
        if self.repeat_penalty == 0.0:
            raise EngineError("repeat_penalty is 0, expected more than 0 (1: off)")
        if self.mirostat not in (0, 2):
            raise EngineError(f"mirostat is {self.mirostat!r}, expected 0 (off) or 2")
        if not isinstance(self.ignore_eos, bool):
            raise EngineError(f"ignore_eos is {self.ignore_eos!r}, expected True or False")
        if self.seed is not None:
            self._check_integer("seed", 0)
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        object.__setattr__(self, "dry_sequence_breakers", _breakers(self.dry_sequence_breakers))

    def _check_number(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if not isinstance(value, int | float | np.number) or isinstance(value, bool):
            raise EngineError(f"{name} is {value!r}, expected a number")
        if not (low <= value <= high and math.isfinite(value)):
            expected = (
                "a finite number" if low == -math.inf else f"{low:g} {f'to {high:g}' if high < math.inf else 'or more'}"
            )
            raise EngineError(f"{name} is {value!r}, expected {expected}")

    def _check_integer(self, name: str, low: int) -> None:
        value = getattr(self, name)
        try:
            if isinstance(value, bool) or operator.index(value) < low:
                raise EngineError(f"{name} is {value!r}, expected an integer, {low} or more")
        except TypeError:
            raise EngineError(f"{name} is {value!r}, expected an integer, {low} or more") from None


_NUMBERS = (
    ("temperature", 0.0, math.inf),
    ("dynatemp_range", 0.0, math.inf),
    ("dynatemp_exponent", 0.0, math.inf),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("typical_p", 0.0, 1.0),
    ("top_n_sigma", -math.inf, math.inf),
    ("xtc_probability", 0.0, 1.0),
    ("xtc_threshold", 0.0, 1.0),
    ("dry_multiplier", 0.0, math.inf),
    ("dry_base", 0.0, math.inf),
    ("repeat_penalty", 0.0, math.inf),
    ("presence_penalty", -math.inf, math.inf),
    ("frequency_penalty", -math.inf, math.inf),
    ("mirostat_tau", 0.0, math.inf),
    ("mirostat_eta", 0.0, math.inf),
)
_INTEGERS = (
    ("top_k", 0),
    ("min_keep", 0),
    ("repeat_last_n", -1),
    ("dry_allowed_length", 0),
    ("dry_penalty_last_n", -1),
    ("mirostat", 0),
)


def _biases(given: object) -> dict[int, float] | None:
    """A copy of logit_bias with plain integers and floats."""
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise EngineError(f"logit_bias is of type {type(given).__name__}, expected a mapping from token ids to numbers")
    biases = {}
    for token, bias in given.items():
        if not isinstance(token, int | np.integer) or isinstance(token, bool) or token < 0:
            raise EngineError(f"logit_bias is given for {token!r}, expected token ids")
        if not isinstance(bias, int | float | np.number) or isinstance(bias, bool) or not bias < math.inf:
            raise EngineError(f"logit_bias of token {token} is {bias!r}, expected a number, or -inf for never")
        biases[int(token)] = float(bias)
    return biases


def _breakers(given: object) -> tuple[str, ...]:
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise EngineError(f"dry_sequence_breakers is {given!r}, expected a sequence of strings")
    if wrong := [text for text in given if not isinstance(text, str) or not text]:
        raise EngineError(f"dry_sequence_breakers holds {wrong[0]!r}, expected non-empty strings")
    return tuple(given)
