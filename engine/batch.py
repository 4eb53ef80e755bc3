"""generate_many: several texts at once, each step one pass over the weights for all of them.

Prompts are computed one after the other, each in a stream of its own; then every step takes a token of each stream. All
ops have for up to 16 rows the arithmetic of one, and attention runs stream by stream on its own rows: each text is bit
for bit the one that its stream would give alone. What the beginnings of prompts share is computed once, and the rest of
such a prompt then rounds as a shorter one does. When a text ends, the next prompt takes its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import Cancelled, EngineError
from .generation import Text
from .layers.mla import MAX_DECODE_TOKENS
from .prefixes import MIN_TOKENS, common
from .request import Request, prompt_ids
from .step import Buffers, Step
from .stream import Recording, Stream, record

if TYPE_CHECKING:
    from .engine import Engine


def generate_many(
    engine: Engine, prompts: Sequence[str | Sequence[int]], n_parallel: int, arguments: Mapping[str, Any]
) -> list[str]:
    """The texts that continue the prompts, in their order."""
    request = Request.of(arguments)
    if request.speculate or request.progress is not None:
        raise EngineError("generate_many takes neither speculate nor progress")
    if not isinstance(n_parallel, int | np.integer) or not 1 <= n_parallel <= MAX_DECODE_TOKENS:
        raise EngineError(f"n_parallel is {n_parallel!r}; expected 1 to {MAX_DECODE_TOKENS}")
    if isinstance(prompts, str):
        raise EngineError("prompts is a text; expected a list of them")
    ids = [prompt_ids(engine, prompt) for prompt in prompts]
    batch = Batch(engine, min(n_parallel, len(ids)))
    engine._batches.append(batch)
    try:
        return batch.run(ids, request)
    finally:
        engine._batches.remove(batch)
        batch.close()


class Batch:
    """n streams of one engine that step together; cancelled with it."""

    def __init__(self, engine: Engine, n: int):
        self.model = engine.model
        self._run = engine.model.ops.Run(engine.model.n_threads)
        self._buffers = Buffers(MAX_DECODE_TOKENS, engine.model.arrays)
        self._recordings: dict[tuple[int, ...], Recording] = {}
        self._idle = [engine.stream() for _ in range(n)]
        self._streams = list(self._idle)
        for stream in self._streams:
            stream._run.cancel = self._run.cancel
            stream._keeps_prefixes = False  # texts of a batch are not asked for again

    def cancel(self) -> None:
        self._run.cancel[0] = 1

    def close(self) -> None:
        for stream in self._streams:
            stream.close()

    def run(self, prompts: list[list[int]], request: Request) -> list[str]:
        pieces: list[list[str]] = [[] for _ in prompts]
        shared = min((common(prompts[0], ids) for ids in prompts[1:]), default=0)
        waiting = list(enumerate(prompts))[::-1]
        active: list[tuple[int, Text, np.ndarray]] = []  # (which, text, its logits)
        while waiting or active:
            while waiting and self._idle:
                which, ids = waiting.pop()
                text = Text(self._idle.pop(), list(ids), request)
                text.prepare(uncancel=False)
                active.append((which, text, text.prompt()))
                if shared >= MIN_TOKENS and which == 0:
                    self.model.prefixes.keep(text.stream.cache, ids[:shared])
            for which, text, rows in active:
                if not text.over():
                    pieces[which] += [response.text for response in text.choose(rows, [])]
                if text.over():
                    pieces[which].append(text.finish().text)
                    self._idle.append(text.stream)
            going_on = [(which, text) for which, text, _ in active if not text.over()]
            going_on.sort(key=lambda one: self._streams.index(one[1].stream))  # few orders, few recordings
            rows = self._step([text for _, text in going_on])
            active = [(which, text, row[None]) for (which, text), row in zip(going_on, rows)]
        return ["".join(text) for text in pieces]

    def _step(self, texts: list[Text]) -> np.ndarray:
        """Logits (n, n_vocab) after the last token of each text."""
        if not texts:
            return np.zeros((0, 0), np.float32)
        if self._run.cancel[0]:
            raise Cancelled("generate_many was cancelled")
        streams = [text.stream for text in texts]
        for text in texts:
            text.make_room(1)
        with ExitStack() as stack:
            for stream in streams:
                stack.enter_context(stream._alone())
            step, tape, logits = self._recording(streams)
            for i, (stream, text) in enumerate(zip(streams, texts)):
                step.fill(slice(i, i + 1), np.array(text.history[-1:], np.int32), stream.cache)
            try:
                self._run.replay(tape)
            except self.model.ops.Cancelled:
                raise Cancelled("generate_many was cancelled") from None
            for stream, text in zip(streams, texts):
                stream._append(text.history[-1:])
        assert logits is not None
        return logits[:, : texts[0].n_vocab].copy()

    def _recording(self, streams: list[Stream]) -> Recording:
        key = tuple(id(stream) for stream in streams)
        if key not in self._recordings:
            parts = [(slice(i, i + 1), stream.cache.rows) for i, stream in enumerate(streams)]
            model = self.model
            step = Step(model.ops, self._run, self._buffers, model.hparams, parts, streams[0].type_k)
            recording = record(model, step, len(streams))
            model.ops.prepare([recording[1]], model.progress)
            self._recordings[key] = recording
        return self._recordings[key]
