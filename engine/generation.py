"""Generation: step in a loop with a sampler, from the prompt to the end of the text.

    prompt ─ what the cache holds of it is skipped ─ step ─► logits ─ sampler ─► token ─ bytes ─ stop strings ─► piece
                                                       ▲                          │
                                                       └──── drafts (speculate) ◄─┘

A draft is verified in the step that its first token needs anyway: of up to 16 rows, each has the bits that it would
have alone, so the text is that of one token at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
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
from .sampling import Sampler, TokenLogprobs, token_logprobs
from .stopping import StopStrings

if TYPE_CHECKING:
    from .stream import Stream


MAX_ENDS = 4  # prompts whose logits a stream remembers


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


def text(stream: Stream, prompt: str | Sequence[int], arguments: Mapping[str, Any]) -> Text:
    """A text that has not begun; everything about it is checked."""
    request = Request.of(arguments)
    ids = prompt_ids(stream, prompt)
    if request.context_shift and request.n_keep is not None and request.n_keep >= stream.n_ctx:
        raise EngineError(f"n_keep is {request.n_keep}; expected less than n_ctx = {stream.n_ctx}")
    return Text(stream, ids, request)


def start(stream: Stream, prompt: str | Sequence[int], arguments: Mapping[str, Any]) -> Generator[Response, None, None]:
    """Check everything, compile, and drop what the prompt does not share with the cache; then the Responses."""
    begun = text(stream, prompt, arguments)
    begun.prepare()
    return begun.responses()


class Text:
    """One text in the making: its tokens so far, and what decides on the next one and on the end.

    history   the prompt and what was generated; all but its last token are in the cache, or were until a shift
    n_right   drafted tokens that were chosen, of the last step
    last      the token that was chosen last, even if it ended the text
    """

    def __init__(self, stream: Stream, ids: list[int], request: Request):
        tokenizer = stream.tokenizer
        self.stream, self.request, self.history = stream, request, ids
        self.n_right, self.last = 0, ids[-1]
        self._known: np.ndarray | None = None  # the prompt's logits, if it was all there
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

    def prepare(self, uncancel: bool = True) -> None:
        """Take the stream: compile, and drop from the cache what is not of this text."""
        stream, ids = self.stream, self.history
        with stream._alone():
            if uncancel:
                stream._run.cancel[0] = 0
            stream._text = None
            self.stats.n_reused = n = stream._reuse(ids)
            if n == len(ids):
                end = stream._end(n)
                assert end is not None
                self._known = end.logits[None].copy()
            stream._compile(len(ids) - n)
            for rows in speculate.ROWS if self.request.speculate else ():
                if rows <= stream.n_ubatch:
                    stream._recording(rows, 0, rows)
            stream.stats, stream._text = self.stats, self

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
                try:
                    responses = self.choose(rows, draft)
                finally:  # a processor may have raised
                    self.settle(len(draft) - self.n_right)
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
            stats.finish_reason = stats.finish_reason or "cancelled"
        except (KeyboardInterrupt, GeneratorExit):
            stats.finish_reason = stats.finish_reason or "cancelled"
            raise
        yield self.finish()

    def prompt(self) -> np.ndarray:
        """Logits (1, n_vocab) after the prompt, of which the cache holds the first tokens."""
        if self._known is not None:
            with self.stream._alone():
                self._must_own()
            return self._known
        n, reused, tell = len(self.history), self.stats.n_reused, self.request.progress
        progress = None if tell is None else lambda done: tell(reused + done, n)
        return self.advance(self.history[reused:], 1, progress, keep_end=True)

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
        return max(0, min(left, MAX_DECODE_TOKENS, stream.n_ubatch, stream.n_ctx - stream.n_kv) - 1)

    def advance(
        self, tokens: list[int], n_logits: int, progress: Callable[[int], None] | None = None, keep_end: bool = False
    ) -> np.ndarray:
        """Logits (n_logits, n_vocab) of the last tokens: a step of this text, if nothing else has used the stream.

        keep_end: the stream is to know the last ones, should the same be asked again
        """
        stream = self.stream
        with stream._alone():
            self._must_own()
            self._make_room(len(tokens))
            rows = stream._step(stream._checked(tokens, stream.n_kv), n_logits, progress)[:, : self.n_vocab]
            if keep_end:
                stream._ends = [*stream._ends[1 - MAX_ENDS :], End(stream.n_kv, rows[-1].copy())]
            return rows

    def make_room(self, n: int) -> None:
        """Shift the context, if that is wanted and n more tokens would not fit."""
        with self.stream._alone():
            self._must_own()
            self._make_room(n)

    def _make_room(self, n: int) -> None:
        stream = self.stream
        if self.request.context_shift and stream.n_kv + n > stream.n_ctx:
            n_keep = min(self.n_keep, stream.n_kv - 1)
            stream._shift(n_keep, max(1, (stream.n_kv - n_keep) // 2))

    def _must_own(self) -> None:
        if self.stream._text is not self:
            raise EngineError(
                "something else used this stream before the text ended; take engine.stream() for a second one"
            )

    def choose(self, rows: np.ndarray, draft: list[int]) -> list[Response]:
        """The next tokens: one for each row of logits, as long as the draft says what is chosen."""
        stats, wanted, found = self.stats, self.request.logprobs, []
        stats.n_drafted += len(draft)
        self.n_right = 0
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
            self.n_right += right
            stats.n_accepted += right
            found.append(self._response(piece, token, logprobs, right, None))
            if self.stops.found or (self.constraint is not None and self.constraint.finished):
                stats.finish_reason = "stop"
            if not right or self.over():
                break
        return found

    def settle(self, n_wrong: int) -> None:
        """Take back the rows of drafted tokens that were not chosen."""
        if n_wrong:
            with self.stream._alone():
                self._must_own()
                self.stream._truncate(self.stream.n_kv - n_wrong)

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


async def in_thread(text: Text) -> AsyncGenerator[str, None]:
    """The pieces, each computed in another thread. To close this, or to cancel the task, stops the step that runs."""

    async def elsewhere(function: Callable[..., Any], *arguments: Any) -> Any:
        waiting = asyncio.get_running_loop().run_in_executor(None, function, *arguments)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            while not waiting.done():  # however often it is cancelled: the stream is in use until then
                text.stream.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([waiting], timeout=0.1)
            raise

    await elsewhere(text.prepare)
    pieces = texts(text.responses())
    try:
        while (piece := await elsewhere(next, pieces, None)) is not None:
            yield piece
    finally:
        pieces.close()
