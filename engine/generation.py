"""Generation: step in a loop with a sampler, from the prompt to the end of the text.

    prompt ─ what the cache holds of it is skipped ─ step ─► logits ─ sampler ─► token ─ bytes ─ stop strings ─► piece
                                                       ▲                          │
                                                       └──── drafts (speculate) ◄─┘

A draft is verified in the step that its first token needs anyway: of up to 16 rows, each has the bits that it would
have alone, so the text is that of one token at a time.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import speculate
from .errors import Cancelled, EngineError
from .layers.mla import MAX_DECODE_TOKENS
from .prefixes import End
from .request import Request, prompt_ids
from .sampler import Sampler, TokenLogprobs, token_logprobs
from .stopping import StopStrings

if TYPE_CHECKING:
    from .stream import Stream


@dataclass
class Stats:
    """Of one generate(). Times in seconds, without compiling, and without what the caller does between pieces.

    The first token comes out of the prompt's logits, so t_generated is that of n_generated - 1 steps.
    """

    n_prompt: int = 0
    n_reused: int = 0  # tokens of the prompt that were not computed again
    t_prompt: float = 0.0
    n_generated: int = 0
    t_generated: float = 0.0
    n_drafted: int = 0  # tokens that speculation guessed
    n_accepted: int = 0  # of them, those that were right
    finish_reason: str | None = None  # 'stop' | 'length' | 'cancelled'; None while it runs, or if it failed


@dataclass(frozen=True, slots=True)
class Response:
    """A piece of text with its token; the names are those of mlx_lm's GenerationResponse.

    The last one has the finish_reason, and perhaps text that was held back; its token may be one that ends texts.
    """

    text: str
    token: int
    logprobs: TokenLogprobs | None  # of the model's own distribution, if asked for
    from_draft: bool
    prompt_tokens: int
    prompt_tps: float  # tokens per second, of those that were computed
    generation_tokens: int
    generation_tps: float
    peak_memory: float  # GB (1e9 bytes) of this process
    finish_reason: str | None = None


def start(stream: Stream, prompt: str | Sequence[int], arguments: Mapping[str, Any]) -> Generator[Response, None, None]:
    """Check everything, compile, and drop what the prompt does not share with the cache; then the Responses."""
    text = Text(stream, prompt_ids(stream, prompt), Request.of(arguments))
    stream._run.cancel[0] = 0
    text.prepare()
    return text.responses()


class Text:
    """One text in the making: its tokens so far, and what decides on the next one and on the end.

    history   the prompt and what was generated; all but its last token are in the cache, or were until a shift
    held      tokens that the cache holds if nobody else has used it
    last      the token that was chosen last, even if it ended the text
    """

    def __init__(self, stream: Stream, ids: list[int], request: Request):
        tokenizer = stream.tokenizer
        self.stream, self.request, self.history = stream, request, ids
        self.held, self.last = 0, ids[-1]
        self.stats = Stats(n_prompt=len(ids))
        self.n_vocab = min(stream.hparams.n_vocab, tokenizer.n_vocab)  # some files have more logits than tokens
        self.stops = StopStrings(request.stops)
        self.bytes = tokenizer.stream(at_start=False)
        constraint = request.grammar.constraint(tokenizer, self.n_vocab) if request.grammar is not None else None
        self.constraint = constraint
        self.sampler = Sampler(
            request.sampling,
            self.n_vocab,
            tokenizer=tokenizer,
            processors=request.logits_processor,
            constraint=constraint,
        )
        n_keep = request.n_keep
        self.n_keep = int(ids[0] == tokenizer.bos_id) if n_keep is None else min(n_keep, len(ids))

    def prepare(self) -> None:
        """Take the stream: compile, and drop from the cache what is not of this text."""
        stream, request, ids = self.stream, self.request, self.history
        with stream._alone():
            stream._checked(ids, 0)
            if request.context_shift and request.n_keep is not None and request.n_keep >= stream.n_ctx:
                raise EngineError(f"n_keep is {request.n_keep}; expected less than n_ctx = {stream.n_ctx}")
            self.stats.n_reused = self.held = stream._reuse(ids)
            stream._compile(len(ids) - self.held)
            for n in speculate.ROWS if request.speculate else ():
                stream._recording(n, 0, n)
            stream.stats = self.stats

    def responses(self) -> Generator[Response, None, None]:
        stats = self.stats
        lookup = speculate.Lookup(self.history) if self.request.speculate else None
        draft: list[int] = []
        try:
            began = time.perf_counter()
            rows = self.prompt()
            stats.t_prompt = time.perf_counter() - began
            began = time.perf_counter()
            while not self.over():
                responses = self.choose(rows, draft)
                self.settle(len(draft) - sum(response.from_draft for response in responses))
                stats.t_generated += time.perf_counter() - began
                yield from responses
                if self.over():
                    break
                began = time.perf_counter()
                draft = lookup.draft(self.history, self.room()) if lookup is not None else []
                rows = self.advance(self.history[-1:] + draft, 1 + len(draft))
                if lookup is not None:
                    lookup.timed(1 + len(draft), time.perf_counter() - began)
        except Cancelled:
            stats.finish_reason = "cancelled"
        except (KeyboardInterrupt, GeneratorExit):
            stats.finish_reason = "cancelled"
            raise
        yield self.finish()

    def prompt(self) -> np.ndarray:
        """Logits (1, n_vocab) after the prompt, of which the cache holds the first tokens."""
        stream, n = self.stream, len(self.history)
        if self.held == n:
            assert stream._end is not None and stream._end.n == n
            return stream._end.logits[None].copy()
        tell, reused = self.request.progress, self.held
        progress = None if tell is None else lambda done: tell(reused + done, n)
        rows = self.advance(self.history[reused:], 1, progress)
        stream._end = End(n, rows[0].copy())
        return rows

    def finish(self) -> Response:
        """The last one: what was held back, and why the text ends."""
        self.stats.finish_reason = self.stats.finish_reason or "length"
        rest = "" if self.stops.found else self.stops.push(self.bytes.flush()) + self.stops.flush()
        return self._response(rest, self.last, None, False, self.stats.finish_reason)

    def over(self) -> bool:
        """Whether no other token is wanted, or fits."""
        stats, limit = self.stats, self.request.max_tokens
        full = stats.n_generated > 0 and self.stream.n_kv == self.stream.n_ctx and not self.request.context_shift
        return stats.finish_reason is not None or full or (limit is not None and stats.n_generated >= limit)

    def room(self) -> int:
        """Tokens that may be drafted."""
        stats, limit, stream = self.stats, self.request.max_tokens, self.stream
        left = MAX_DECODE_TOKENS if limit is None else limit - stats.n_generated
        return max(0, min(left, MAX_DECODE_TOKENS, stream.n_ctx - stream.n_kv) - 1)

    def advance(self, tokens: list[int], n_logits: int, progress: Callable[[int], None] | None = None) -> np.ndarray:
        """Logits (n_logits, n_vocab) of the last tokens: a step of this text, if nothing else has used the stream."""
        stream = self.stream
        with stream._alone():
            if stream.stats is not self.stats or stream.n_kv != self.held:
                raise EngineError(
                    "something else used this stream before the text ended; take engine.stream() for a second one"
                )
            try:
                self._make_room(len(tokens))
                rows = stream._step(stream._checked(tokens, stream.n_kv), n_logits, progress)
            finally:
                self.held = stream.n_kv
            return rows[:, : self.n_vocab]

    def make_room(self, n: int) -> None:
        """Shift the context, if that is wanted and n more tokens would not fit."""
        with self.stream._alone():
            self._make_room(n)

    def _make_room(self, n: int) -> None:
        stream = self.stream
        if self.request.context_shift and self.held + n > stream.n_ctx:
            n_keep = min(self.n_keep, self.held - 1)
            stream._shift(n_keep, max(1, (self.held - n_keep) // 2))
            self.held = stream.n_kv

    def choose(self, rows: np.ndarray, draft: list[int]) -> list[Response]:
        """The next tokens: one for each row of logits, as long as the draft says what is chosen."""
        stats, wanted, found = self.stats, self.request.logprobs, []
        for i, logits in enumerate(rows):
            own = logits.copy() if wanted is not None else None  # the sampler may change them
            token = self.last = self.sampler.sample(logits, self.history)
            stats.n_generated += 1
            if token in self.stream.tokenizer.eog_ids:
                stats.finish_reason = "stop"
                break
            self.history.append(token)
            piece = self.stops.push(self.bytes.push(token))
            logprobs = token_logprobs(own, token, wanted) if own is not None and wanted is not None else None
            right = i < len(draft) and token == draft[i]
            found.append(self._response(piece, token, logprobs, right, None))
            if self.stops.found or (self.constraint is not None and self.constraint.finished):
                stats.finish_reason = "stop"
            if not right or self.over():
                break
        stats.n_drafted += len(draft)
        stats.n_accepted += sum(response.from_draft for response in found)
        return found

    def settle(self, n_wrong: int) -> None:
        """Take back the rows of drafted tokens that were not chosen."""
        if n_wrong:
            with self.stream._alone():
                self.stream._truncate(self.stream.n_kv - n_wrong)
                self.held = self.stream.n_kv

    def _response(
        self, text: str, token: int, logprobs: TokenLogprobs | None, from_draft: bool, finish_reason: str | None
    ) -> Response:
        stats = self.stats
        n_computed, n_steps = stats.n_prompt - stats.n_reused, stats.n_generated - 1
        return Response(
            text, token, logprobs, from_draft, stats.n_prompt, _rate(n_computed, stats.t_prompt), stats.n_generated,
            _rate(n_steps, stats.t_generated), peak_memory(), finish_reason,
        )  # fmt: skip


def _rate(n: int, seconds: float) -> float:
    return n / seconds if n > 0 and seconds > 0 else 0.0


def peak_memory() -> float:
    """GB (1e9 bytes) that this process has held at most, the mapped file included; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def texts(responses: Generator[Response, None, None]) -> Generator[str, None, None]:
    """Their pieces of text, without the empty ones."""
    try:
        for response in responses:
            if response.text:
                yield response.text
    finally:
        responses.close()


async def in_thread(stream: Stream, pieces: Generator[str, None, None]) -> AsyncGenerator[str, None]:
    """The pieces, each computed in another thread. To close this, or to cancel the task, stops the step that runs."""
    loop = asyncio.get_running_loop()
    end = object()
    try:
        while True:
            waiting = loop.run_in_executor(None, next, pieces, end)
            try:
                piece = await asyncio.shield(waiting)
            except asyncio.CancelledError:
                stream.cancel()
                await waiting
                raise
            if piece is end:
                return
            yield piece  # type: ignore[misc]
    finally:
        pieces.close()
