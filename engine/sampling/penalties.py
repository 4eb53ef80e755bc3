"""Penalties for what was said already: by token (repeat, presence, frequency), and by run of tokens (DRY).

    history … a b c d … a b c        DRY: `d` would make the run of 3 one of 4, and loses
    length of the run ─┘  └─ end     dry_multiplier · dry_base ** (3 - dry_allowed_length)

A run ends at a sequence breaker, so that the fixed parts of a dialogue (names, quotes) may come again and again.

The length of the common suffix of the history with each of its prefixes is found by extending all of them by one
token at a time: the work is the number of matches, and runs longer than the largest exponent are not looked at.

Source: llama.cpp src/llama-sampler.cpp, where DRY is from Koboldcpp, whose author is pi6am; the idea is p-e-w's.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .settings import Sampling

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

MAX_BREAKER_BYTES = 40  # of each, the rest is not looked at
MAX_BREAKER_TAIL = 20  # tokens that complete a breaker after the one that begins it
LOG_F32_MAX = 88.7228391
F32_MAX = float(np.finfo(np.float32).max)

Breakers = dict[int, set[tuple[int, ...]]]  # token that begins one (or holds it: then the tail is empty): tails


def penalise(logits: np.ndarray, history: Sequence[int] | np.ndarray, s: Sampling) -> None:
    """Repeat, presence and frequency penalty on the last repeat_last_n tokens; changes logits (n_vocab,) f32."""
    recent = _last(history, s.repeat_last_n)
    recent = recent[recent < len(logits)]  # a prompt may have ids that the tokenizer has no text for
    if not len(recent):
        return
    ids, counts = np.unique(recent, return_counts=True)
    values = logits[ids]
    values = np.where(values > 0, values / np.float32(s.repeat_penalty), values * np.float32(s.repeat_penalty))
    logits[ids] = values - (
        counts.astype(np.float32) * np.float32(s.frequency_penalty) + np.float32(s.presence_penalty)
    )


def dry(logits: np.ndarray, history: Sequence[int] | np.ndarray, s: Sampling, breakers: Breakers) -> None:
    """Penalty of the tokens that would prolong a repetition; changes logits (n_vocab,) f32."""
    recent = _last(history, s.dry_penalty_last_n)
    n = len(recent)
    if n <= s.dry_allowed_length:
        return
    longest = _since_breaker(recent, breakers)
    if longest < s.dry_allowed_length:
        return
    max_exponent = int(LOG_F32_MAX / math.log(s.dry_base)) if s.dry_base > 1.000001 else 0
    if max_exponent:
        longest = min(longest, s.dry_allowed_length + max_exponent)
    for token, length in _repeats(recent, s.dry_allowed_length, longest).items():
        if token < len(logits) and () not in breakers.get(token, ()):
            power = math.exp(min(math.log(s.dry_base) * (length - s.dry_allowed_length), LOG_F32_MAX))
            logits[token] = max(float(logits[token]) - s.dry_multiplier * power, -F32_MAX)


def _last(history: Sequence[int] | np.ndarray, n: int) -> np.ndarray:
    """The last n of the history, all if n is negative."""
    return np.asarray(history if n < 0 else history[max(0, len(history) - n) :], dtype=np.int64)


def _repeats(tokens: np.ndarray, least: int, longest: int) -> dict[int, int]:
    """{token: length of the longest run, `least` to `longest` tokens, that ends the text and that it once followed}."""
    runs = np.full(len(tokens) - 1, -1)  # longest run that ends here and at the end of the text
    ends = np.arange(len(tokens) - 1)
    for length in range(longest + 1):
        if length:
            ends = ends[np.searchsorted(ends, length - 1) :]
            ends = ends[tokens[ends - (length - 1)] == tokens[-length]]
        if not len(ends):
            break
        runs[ends] = length
    after = np.flatnonzero(runs >= least)
    after = after[np.argsort(runs[after], kind="stable")]  # the longest last: it stays in the dictionary
    return dict(zip(tokens[after + 1].tolist(), runs[after].tolist()))


def _since_breaker(tokens: np.ndarray, breakers: Breakers) -> int:
    """How many tokens follow the last sequence breaker; all if there is none."""
    n = len(tokens)
    for back, token in enumerate(reversed(tokens.tolist())):
        if token in breakers:
            after = tuple(tokens[n - back : n - back + MAX_BREAKER_TAIL].tolist())
            complete = [len(tail) for tail in breakers[token] if after[: len(tail)] == tail]
            if complete:
                return back - max(complete)
    return n


def breakers_of(tokenizer: Tokenizer, texts: Sequence[str]) -> Breakers:
    """Every token that holds one of the texts, or ends with its beginning: then with the tokens of the rest."""
    key = tuple(texts)
    with _lock:
        known = _known.setdefault(tokenizer, {})
        if key not in known:
            words = [tokenizer.token_bytes(i) for i in range(tokenizer.n_vocab)]
            known[key] = {}
            for text in key:
                _add_breaker(known[key], tokenizer, words, text.encode()[:MAX_BREAKER_BYTES])
        return known[key]


def _add_breaker(breakers: Breakers, tokenizer: Tokenizer, words: list[bytes], text: bytes) -> None:
    for token, word in enumerate(words):
        if text in word:
            breakers.setdefault(token, set()).add(())
            continue
        for n in range(1, min(len(text), len(word) + 1)):
            if word.endswith(text[:n]):
                tail = tokenizer.encode(text[n:].decode(errors="replace"), add_special=False)[:MAX_BREAKER_TAIL]
                breakers.setdefault(token, set()).add(tuple(tail))


_lock = threading.Lock()
_known: weakref.WeakKeyDictionary[Tokenizer, dict[tuple[str, ...], Breakers]] = weakref.WeakKeyDictionary()
