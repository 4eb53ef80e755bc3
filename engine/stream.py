"""Stream: one conversation with a model: a K-cache, a position, and the buffers of a step. Engine is one, too.

`step(tokens) -> logits` is the whole truth; `generate` is step in a loop with a sampler.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from .errors import Cancelled, ContextFullError, EngineError, UnsupportedModelError
from .hparams import HParams
from .k_cache import KCache, KCacheLayout
from .layers.mla import MAX_DECODE_TOKENS
from .layers.rope import fill_cos_sin
from .models.deepseek2 import DeepSeek2
from .sampler import Sampler, Sampling
from .step import Buffers, Step
from .stopping import StopStrings
from .tokenizer import Tokenizer

# Query tokens of a step from which K and V are expanded (MHA mode) instead of absorbed. By operations the two are
# equal at 85 (MiniCPM3), 171 (DeepSeek) and 398 (GLM-4.7-Flash) tokens; expanded panels run nearer to the peak.
MIN_MHA_TOKENS = 64

Progress = Callable[[int, int, str], None]
Recording = tuple[Step, Any, np.ndarray | None]  # inputs, tape, logits


@dataclass(frozen=True)
class Model:
    """What streams share, all of it read-only."""

    weights: DeepSeek2
    hparams: HParams
    tokenizer: Tokenizer
    ops: ModuleType
    n_threads: int | None
    n_ubatch: int
    min_mha_tokens: int
    progress: Progress | None


@dataclass
class Stats:
    """Of one generate(). Times in seconds, without compiling, and without what the caller does between pieces.

    The first token comes out of the prompt's logits, so t_generated is that of n_generated - 1 steps.
    """

    n_prompt: int = 0
    t_prompt: float = 0.0
    n_generated: int = 0
    t_generated: float = 0.0
    finish_reason: str | None = None  # 'stop' | 'length' | 'cancelled'; None while it runs, or if it failed


class Stream:
    """A K-cache and a position over a shared Model. One thread at a time; other streams may run beside it."""

    def __init__(self, model: Model, n_ctx: int, type_k: str):
        hp = model.hparams
        self.model, self.hparams, self.tokenizer = model, hp, model.tokenizer
        self.cache = KCache(KCacheLayout(hp.n_layer, n_ctx, hp.kv_lora_rank, hp.n_rot, type_k))
        self.stats = Stats()
        self.n_ubatch = min(model.n_ubatch, n_ctx)
        self._run = model.ops.Run(model.n_threads)
        self._buffers = Buffers(self.n_ubatch)
        self._inv_freq = hp.inv_freq
        self._n_text = min(hp.n_vocab, model.tokenizer.n_vocab)  # some files have more logits than tokens
        self._recordings: dict[tuple[int, int], Recording] = {}
        self._compiled: set[int] = set()
        self._busy = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """Give the cache and the buffers back; the stream cannot be used any more. A second close() does nothing."""
        if self._closed:
            return
        with self._alone():
            self._closed = True
            self._recordings.clear()
            self._buffers = Buffers(0)
            self.cache.release()

    # ------------------------------------------------------------------------------------------------- the cache

    @property
    def n_ctx(self) -> int:
        """Tokens that fit."""
        return self.cache.layout.n_ctx

    @property
    def n_kv(self) -> int:
        """Tokens in the cache."""
        return self.cache.n_kv

    @property
    def type_k(self) -> str:
        return self.cache.layout.type_k

    @property
    def n_threads(self) -> int:
        return int(self._run.n_threads)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the filled rows in all layers."""
        return self.cache.nbytes

    def truncate(self, n: int) -> None:
        """Forget all but the first n tokens. EngineError unless 0 <= n <= n_kv."""
        with self._alone():
            self.cache.truncate(n)

    def clear(self) -> None:
        """Forget all tokens."""
        self.truncate(0)

    # --------------------------------------------------------------------------------------------------- a step

    def step(self, tokens: Sequence[int] | np.ndarray, logits: str = "last") -> np.ndarray:
        """Append tokens to the cache and return logits, f32: 'last' -> (n_vocab,), 'all' -> (n_tokens, n_vocab).

        ContextFullError if they do not fit n_ctx, EngineError for ids outside the vocabulary: both before any work.
        Cancelled after cancel(), KeyboardInterrupt after Ctrl-C: the cache keeps the ubatches that were finished.
        """
        with self._alone():
            ids = self._checked(tokens, self.n_kv)
            if logits not in ("last", "all"):
                raise EngineError(f"logits is {logits!r}; expected 'last' or 'all'")
            self._run.cancel[0] = 0
            return self._step(ids, every=logits == "all")

    def cancel(self) -> None:
        """Stop a step or generate() that runs in another thread: it raises Cancelled, or ends, at the next tile."""
        self._run.cancel[0] = 1

    def _step(self, ids: np.ndarray, every: bool) -> np.ndarray:
        pieces = []
        for start in range(0, len(ids), self.n_ubatch):
            ubatch = ids[start : start + self.n_ubatch]
            last = start + len(ubatch) == len(ids)
            out = self._ubatch(ubatch, len(ubatch) if every else int(last))
            if out is not None:
                pieces.append(out.copy())
        return np.concatenate(pieces) if every else pieces[-1][0]

    def _ubatch(self, ids: np.ndarray, n_logits: int) -> np.ndarray | None:
        """Execute one step of at most n_ubatch tokens; a view of its logits."""
        n_tok, n_past = len(ids), self.cache.n_kv
        step, tape, logits = self._recording(n_tok, n_past, n_logits)
        step.tokens[:] = ids
        step.positions[:] = np.arange(n_past, n_past + n_tok)
        step.n_kv[:] = step.positions + 1
        fill_cos_sin(step.positions, self._inv_freq, self.hparams.rope_magnitude, step.cos_sin)
        try:
            self._run.replay(tape)
        except self.model.ops.Cancelled:
            raise Cancelled("the step was cancelled") from None
        self.cache.append(n_tok)
        return logits

    def _recording(self, n_tok: int, n_past: int, n_logits: int) -> Recording:
        """The queue of a step, compiled. Short ones read all that changes from memory, so they are kept."""
        key = n_tok, n_logits
        if key in self._recordings:
            return self._recordings[key]
        recording = self._record(n_tok, n_past, n_logits)
        self.model.ops.prepare([recording[1]], self.model.progress)
        if n_tok <= MAX_DECODE_TOKENS:
            self._recordings[key] = recording
        return recording

    def _record(self, n_tok: int, n_past: int, n_logits: int) -> Recording:
        hp, ops = self.hparams, self.model.ops
        mha = n_tok >= self.model.min_mha_tokens
        step = Step(ops, self._run, self._buffers, n_tok, n_past, mha, self.type_k, hp.n_rot, hp.n_embd)
        logits = np.empty((n_logits, hp.n_vocab), np.float32) if n_logits else None
        self._run.take()  # what Ctrl-C may have left of an earlier one
        try:
            self.model.weights.forward(step, self.cache.rows, logits)
        except ValueError as error:
            raise UnsupportedModelError(f"this model has a shape that no kernel runs: {error}") from error
        return step, self._run.take(), logits

    def _compile(self, n_prompt: int) -> None:
        """Have all kernels at hand that a prompt of this length, and the tokens after it, need: one wait, not two."""
        sizes = {min(n_prompt, self.n_ubatch), n_prompt % self.n_ubatch, 1} - {0}
        tapes = [self._record(n_tok, 0, 1)[1] for n_tok in sizes - self._compiled]
        self.model.ops.prepare(tapes, self.model.progress)
        self._compiled |= sizes

    def _checked(self, tokens: Sequence[int] | np.ndarray, n_past: int) -> np.ndarray:
        """The tokens as int32, if they are ids of this vocabulary and fit after the n_past in the cache."""
        try:
            ids = np.asarray(tokens)
            if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
                raise ValueError
        except ValueError:
            raise EngineError("tokens: expected one or more integers in one sequence") from None
        if ids.min() < 0 or ids.max() >= self.hparams.n_vocab:
            raise EngineError(f"token id {ids[(ids < 0) | (ids >= self.hparams.n_vocab)][0]} is not in the vocabulary"
                              f" of {self.hparams.n_vocab:,}")  # fmt: skip
        if n_past + len(ids) > self.n_ctx:
            held = f" after the {n_past:,} in the cache" if n_past else ""
            raise ContextFullError(
                f"prompt of {len(ids):,} tokens{held} does not fit n_ctx={self.n_ctx};"
                " raise n_ctx (--ctx-size) or shorten it"
            )
        return ids.astype(np.int32)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise EngineError("this stream is in use by another thread; take engine.stream() for a second one")
        try:
            if self._closed:
                raise EngineError("this stream is closed")
            yield
        finally:
            self._busy.release()

    # ----------------------------------------------------------------------------------------------------- text

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids; see Tokenizer.encode."""
        return self.tokenizer.encode(text, add_special=add_special, parse_special=parse_special)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.tokenizer.decode(ids)

    def generate(
        self,
        prompt: str | Sequence[int],
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        sampling: Sampling | None = None,
        **fields: Any,
    ) -> Generator[str, None, None]:
        """Continue a prompt from an empty cache; an iterator of pieces of text, whole characters each.

        prompt       text (tokenised with BOS as the file says, control tokens in it are plain text), or token ids
        max_tokens   None: until the model ends or the context is full
        stop         strings that end the text; they are not part of it, not even in halves
        sampling     or its fields as keywords: temperature, top_k, top_p, min_p, repeat_penalty, repeat_last_n, seed

        Wrong arguments, and a prompt that does not fit n_ctx, raise at the call, before any work. Closing the iterator
        ends the generation; `stats` tells what it did.
        """
        sampling = _sampling(sampling, fields)
        if max_tokens is not None and (not isinstance(max_tokens, int | np.integer) or max_tokens < 0):
            raise EngineError(f"max_tokens is {max_tokens!r}; expected 0 or more, or None")
        stops = StopStrings([stop] if isinstance(stop, str) else list(stop))
        ids = self._prompt(prompt)
        with self._alone():
            self._checked(ids, 0)
            self.cache.truncate(0)
            self._run.cancel[0] = 0
            self._compile(len(ids))
            self.stats = Stats(n_prompt=len(ids))
        return self._pieces(ids, max_tokens, stops, Sampler(sampling, self._n_text), self.stats)

    def _prompt(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, Sequence | np.ndarray) or isinstance(prompt, bytes):
            raise EngineError(f"prompt is of type {type(prompt).__name__}; expected text or token ids")
        ids = self.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise EngineError("the prompt is empty, and the model has no BOS token to start from")
        return ids

    def _pieces(
        self, history: list[int], max_tokens: int | None, stops: StopStrings, sampler: Sampler, stats: Stats
    ) -> Generator[str, None, None]:
        text = self.tokenizer.stream(at_start=False)
        try:
            start = time.perf_counter()
            logits = self._continue(history, 0, stats)
            stats.t_prompt = time.perf_counter() - start
            while max_tokens is None or stats.n_generated < max_tokens:
                start = time.perf_counter()
                if stats.n_generated:
                    logits = self._continue(history[-1:], len(history) - 1, stats)
                token = sampler.sample(logits[: self._n_text], history)
                stats.n_generated += 1
                stats.t_generated += time.perf_counter() - start
                if token in self.tokenizer.eog_ids:
                    stats.finish_reason = "stop"
                    break
                history.append(token)
                if piece := stops.push(text.push(token)):
                    yield piece
                if stops.found:
                    stats.finish_reason = "stop"
                    return
                if len(history) > self.n_ctx:
                    break
            stats.finish_reason = stats.finish_reason or "length"
        except Cancelled:
            stats.finish_reason = "cancelled"
        except (KeyboardInterrupt, GeneratorExit):
            stats.finish_reason = "cancelled"
            raise
        if piece := stops.push(text.flush()) + stops.flush():
            yield piece

    def _continue(self, tokens: list[int], n_past: int, stats: Stats) -> np.ndarray:
        """A step of the text that `stats` belongs to, if nothing else has used the stream in between."""
        with self._alone():
            if self.stats is not stats or self.n_kv != n_past:
                raise EngineError(
                    "something else used this stream before the text ended; take engine.stream() for a second one"
                )
            return self._step(self._checked(tokens, n_past), every=False)


def _sampling(sampling: Sampling | None, fields: dict[str, Any]) -> Sampling:
    """One Sampling of what generate() was given."""
    if sampling is not None and fields:
        raise EngineError(f"give either sampling or {', '.join(fields)}, not both")
    if unknown := set(fields) - set(Sampling.__dataclass_fields__):
        known = ", ".join(Sampling.__dataclass_fields__)
        raise EngineError(f"unknown sampling fields: {', '.join(sorted(unknown))}; known: {known}")
    return sampling or Sampling(**fields)
