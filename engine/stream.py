"""Stream: one conversation with a model: a K-cache, a position, and the buffers of a step. Engine is one, too.

`step(tokens) -> logits` is the whole truth; `generate` is step in a loop with a sampler (generation.py).
"""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from typing import Any, Unpack

import numpy as np

from . import generation
from .errors import Cancelled, ContextFullError, EngineError, UnsupportedModelError
from .generation import Response, Stats
from .k_cache import KCache, KCacheLayout
from .layers.mla import MAX_DECODE_TOKENS
from .layers.rope import fill_cos_sin
from .model import Model
from .prefixes import MIN_TOKENS, End, common
from .request import Arguments
from .step import Buffers, Step

Recording = tuple[Step, Any, np.ndarray | None]  # inputs, tape, logits


class Stream:
    """A K-cache and a position over a shared Model. One thread at a time; other streams may run beside it."""

    def __init__(self, model: Model, n_ctx: int, type_k: str):
        hp = model.hparams
        self.model, self.hparams, self.tokenizer = model, hp, model.tokenizer
        self.cache = KCache(KCacheLayout(hp.n_layer, n_ctx, hp.kv_lora_rank, hp.n_rot, type_k), model.arrays)
        self.stats = Stats()
        self.n_ubatch = min(model.n_ubatch, n_ctx)
        self._tokens: list[int] = []
        self._ends: list[End] = []  # of the last prompts
        self._text: object = None  # the generation that the cache belongs to; nobody's after a step or a truncate()
        self._keeps_prefixes = True
        self._run = model.ops.Run(model.n_threads)
        self._buffers = Buffers(self.n_ubatch, model.arrays, model.min_mha_tokens - 1)
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
            self._buffers, self._run = Buffers(0), self.model.ops.Run(1)
            self._tokens, self._ends, self._text = [], [], None
            self.cache.release()
            self.model.arrays.release()

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
    def tokens(self) -> list[int]:
        """Ids of the tokens in the cache, in order; a copy."""
        return self._tokens[: self.n_kv]

    @property
    def first_position(self) -> int:
        """RoPE position of the first of them: 0 until a shift."""
        return self.cache.first_position

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
            self._text = None
            self._truncate(n)

    def clear(self) -> None:
        """Forget all tokens."""
        self.truncate(0)

    def shift(self, n_keep: int, n_discard: int) -> None:
        """Forget n_discard tokens after the first n_keep, so that new ones fit; nothing is computed again.

        The others stay as they are; the first n_keep move up to them: their rope part is turned (k_cache.py), their
        latent is not touched. EngineError for what is negative, no integer, or more than n_kv in all.
        """
        with self._alone():
            self._text = None
            self._shift(n_keep, n_discard)

    def save(self, path: str | os.PathLike[str], extra: dict[str, Any] | None = None) -> None:
        """Write tokens and rows to a session file, whole or not at all; extra: JSON to keep with them. SessionError."""
        from . import session

        with self._alone():
            session.save(self, path, extra)

    def load(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Go on where save() was called: its extra. SessionError if the file is damaged or foreign; nothing changes."""
        from . import session

        with self._alone():
            self._text = None
            return session.load(self, path)

    # After Ctrl-C between any two lines the first n_kv of _tokens are those of the rows: tokens come before rows.

    def _truncate(self, n: int) -> None:
        self.cache.truncate(n)
        self._ends = [end for end in self._ends if end.n <= self.n_kv]
        del self._tokens[self.n_kv :]

    def _shift(self, n_keep: int, n_discard: int) -> None:
        cache, ops, hp, upload = self.cache, self.model.ops, self.hparams, self.model.arrays.upload
        cache.check_drop(n_keep, n_discard)
        if not n_discard:
            return
        self._ends = []
        run = ops.Run(self.model.n_threads)  # cancel() has to wait: what is half done would have to be thrown away
        try:
            cache.drop(n_keep, n_discard)
            del self._tokens[n_keep : n_keep + n_discard]
            cos_sin = np.empty((n_keep, hp.n_rot), np.float32)
            turns = np.arange(n_keep) + cache.first_position - cache.head.positions
            fill_cos_sin(turns, hp.inv_freq, 1.0, cos_sin)
            cos_sin = upload(cos_sin)
            for il in range(hp.n_layer if n_keep else 0):
                rope = upload(cache.head.rope[il])
                ops.k_shift(run, rope, cos_sin, cache.rows[il], self.type_k, hp.kv_lora_rank, hp.n_rot)
            run.sync()
        except BaseException:  # Ctrl-C between two layers: rows that are half moved are no rows
            self._truncate(0)
            raise

    def _restore(self, tokens: Sequence[int], first_position: int, rows: Sequence[np.ndarray]) -> None:
        """Hold these tokens and their rows, rows[il] (n, row_stride) u8, instead of what there is; checked before."""
        self._truncate(0)
        self._tokens = [int(token) for token in tokens]
        self.cache.restore(rows, first_position)

    def _reuse(self, ids: Sequence[int]) -> int:
        """Hold as many of the first of these tokens as the cache knows, or the model's prefixes; how many that are.

        All of them only if the logits after the last one are known, too. What the cache loses may become a prefix.
        """
        prefixes, held = self.model.prefixes, self.tokens
        n = common(held, ids)
        prefix, n_prefix = prefixes.longest(self.cache, ids, n + MIN_TOKENS)
        if self.n_kv - n >= MIN_TOKENS and self._keeps_prefixes:
            prefixes.keep(self.cache, held, self._ends)
        if prefix is not None:
            n = n_prefix
            self._restore(ids[:n], prefix.first_position, [rows[:n] for rows in prefix.rows])
            self._ends = list(prefix.ends)
        if n == len(ids) and self._end(n) is None:
            n -= 1
        if n == 1 < len(ids):
            n = 0  # BOS alone: an unrelated prompt is computed in one go, and rounds as if nothing had been there
        self._truncate(n)
        return n

    def _end(self, n: int) -> End | None:
        """What is known of the logits after the first n tokens."""
        return next((end for end in self._ends if end.n == n), None)

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
            self._text = None
            self._run.cancel[0] = 0
            rows = self._step(ids, len(ids) if logits == "all" else 1)
            return rows if logits == "all" else rows[0]

    def cancel(self) -> None:
        """Stop a step or generate() that runs in another thread: it raises Cancelled, or ends, at the next tile."""
        self._run.cancel[0] = 1

    def _step(self, ids: np.ndarray, n_logits: int, progress: Callable[[int], None] | None = None) -> np.ndarray:
        """(n_logits, n_vocab): of the last tokens. progress: called with the tokens that are done, nearly."""
        pieces = []
        for start in range(0, len(ids), self.n_ubatch):
            if progress is not None:
                progress(start)
            ubatch = ids[start : start + self.n_ubatch]
            after = len(ids) - start - len(ubatch)
            tell = None if progress is None else _tokens_done(progress, start, len(ubatch))
            out = self._ubatch(ubatch, min(len(ubatch), max(0, n_logits - after)), tell)
            if out is not None:
                pieces.append(out.copy())
        if progress is not None:
            progress(len(ids))
        return np.concatenate(pieces) if len(pieces) > 1 else pieces[0]

    def _ubatch(self, ids: np.ndarray, n_logits: int, tell: Callable[[float], None] | None = None) -> np.ndarray | None:
        """Execute one step of at most n_ubatch tokens; a view of its logits."""
        n_tok = len(ids)
        step, tape, logits = self._recording(n_tok, self.n_kv, n_logits)
        step.fill(slice(0, n_tok), ids, self.cache)
        try:
            self._run.replay(tape, tell)
        except self.model.ops.Cancelled:
            raise Cancelled("the step was cancelled") from None
        self._append(ids.tolist())
        return logits

    def _append(self, ids: list[int]) -> None:
        """The rows of these tokens have been written."""
        self._tokens[self.n_kv :] = ids
        self.cache.append(len(ids))

    def _recording(self, n_tok: int, n_past: int, n_logits: int) -> Recording:
        """The queue of a step, compiled. Short ones read all that changes from memory, so they are kept."""
        key = n_tok, n_logits
        if key in self._recordings:
            return self._recordings[key]
        recording = self._record(n_tok, n_past, n_logits)
        self.model.ops.prepare([recording[1]], self.model.progress)
        if n_tok <= MAX_DECODE_TOKENS and not recording[0].mha:
            self._recordings[key] = recording
        return recording

    def _record(self, n_tok: int, n_past: int, n_logits: int) -> Recording:
        mha = n_tok >= self.model.min_mha_tokens
        parts = [(slice(0, n_tok), self.cache.rows)]
        step = Step(self.model.ops, self._run, self._buffers, self.hparams, parts, self.type_k, n_past, mha)
        return record(self.model, step, n_logits)

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

    def _alone(self) -> threading.Lock:
        """`with self._alone():` one thread at a time, not after close(). The lock itself: Ctrl-C cannot tear it."""
        if self._busy.locked():
            raise EngineError("this stream is in use by another thread; take engine.stream() for a second one")
        if self._closed:
            raise EngineError("this stream is closed")
        return self._busy

    # ----------------------------------------------------------------------------------------------------- text

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids; see Tokenizer.encode."""
        return self.tokenizer.encode(text, add_special=add_special, parse_special=parse_special)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.tokenizer.decode(ids)

    def stream_generate(
        self, prompt: str | Sequence[int], max_tokens: int | None = None, **arguments: Unpack[Arguments]
    ) -> Generator[Response, None, None]:
        """Continue a prompt; an iterator of Responses: pieces of text, each with its token and what it took.

        prompt          text (tokenised with BOS as the file says, control tokens in it are plain text), or token ids.
                        What the cache holds of its beginning is not computed again
        max_tokens      None: until the model ends or the context is full
        stop            strings that end the text; they are not part of it, not even in halves
        sampling        a Sampling, or its fields as keywords: temperature, top_k, top_p, min_p, seed, …
        context_shift   True: when the context is full, forget half of what follows the first n_keep tokens, and go on
        n_keep          None: the BOS token, if the prompt begins with it
        logits_processor   callables (ids so far, logits) that change the logits in place, or return others
        grammar         a Grammar that the text follows
        logprobs        n: each Response carries log probabilities, and the n most probable alternatives
        speculate       True: guess what follows from what came before, and verify many tokens in one step; the text is
                        the same, and comes faster where it repeats itself
        progress        called as progress(done, total) with tokens of the prompt, up to forty times a second; within an
                        ubatch the share of its kernels that are done tells how many that are

        Wrong arguments, and a prompt that does not fit n_ctx, raise at the call, before any work. Closing the iterator
        ends the generation; `stats` tells what it did.
        """
        return generation.start(self, prompt, {"max_tokens": max_tokens, **arguments})

    def generate(
        self, prompt: str | Sequence[int], max_tokens: int | None = None, **arguments: Unpack[Arguments]
    ) -> Generator[str, None, None]:
        """Continue a prompt; an iterator of pieces of text, whole characters each. Arguments as stream_generate has."""
        return generation.texts(self.stream_generate(prompt, max_tokens, **arguments))

    def agenerate(
        self, prompt: str | Sequence[int], max_tokens: int | None = None, **arguments: Unpack[Arguments]
    ) -> AsyncGenerator[str, None]:
        """`async for piece in stream.agenerate(prompt)`: as generate, computed in another thread.

        A cancelled task, or closing the iterator, stops the step that runs.
        """
        return generation.in_thread(generation.text(self, prompt, {"max_tokens": max_tokens, **arguments}))

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: dict[str, Any] | None = None,
        max_tokens: int | None = None,
        **arguments: Unpack[Arguments],
    ) -> Generator[str, None, None]:
        """The answer to messages, [{"role": "user", "content": …}, …], put together by the file's chat template.

        EngineError if the file has none, or the template refuses the messages. Other arguments as generate.
        """
        template = self.model.template
        if template is None:
            raise EngineError("this model has no chat template; use generate(), or put the prompt together yourself")
        ids = template.tokens(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, **(template_kwargs or {})
        )
        return self.generate(ids, max_tokens, **arguments)


def _tokens_done(progress: Callable[[int], None], start: int, n_tok: int) -> Callable[[float], None]:
    return lambda share: progress(start + int(share * n_tok))


def record(model: Model, step: Step, n_logits: int) -> Recording:
    """Queue a step: its inputs, its tape, and where its logits will be, (n_logits, n_vocab)."""
    logits = model.arrays.mirror((n_logits, model.hparams.n_vocab), np.float32) if n_logits else None
    step.run.take()  # what Ctrl-C may have left of an earlier one
    step.mirror.send(step.run)
    try:
        model.weights.forward(step, None if logits is None else logits.here)
    except ValueError as error:
        raise UnsupportedModelError(f"this model has a shape that no kernel runs: {error}") from error
    if logits is None:
        return step, step.run.take(), None
    logits.fetch(step.run)
    return step, step.run.take(), logits.host
