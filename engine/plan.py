"""plan(): what running a model takes, before it is run: memory by part, the longest context, times. `konly plan`.

    mapped      the model's file, as far as steps read it, and the libraries: the system can take these pages back and
                read them again, but a run that wants to be fast needs all of them
    anonymous   weights that are copied at load (legacy files), the K-cache, the buffers of a step, what ops work in,
                each thread's scratch, logits, token ids, and Python with the compiled kernels

The K-cache, buffers and workspaces are the sizes that the engine itself asks for: a step of the planned length is
recorded, and not executed. Python and the libraries are as measured in this process, the engine open and its kernels
loaded. `SLACK` is for the allocator. Times come from a probe of some two seconds: this machine's limits (roofline.py of
the backend), what a step has to read and multiply (parts.py), and how near to these limits two steps come, one at the
beginning and one with some thousand tokens in the cache.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np

from . import memory
from .describe import used_tensors
from .engine import MAX_N_CTX, Engine
from .errors import EngineError
from .host import PAGE
from .k_cache import DEFAULT_TYPE_K, TYPES_K
from .model import Model, Progress
from .parts import Work, work_of
from .placing import Shape, layout_of, of_steps
from .stream import Stream

SLACK = 24 << 20  # of the allocator, the stacks of threads, what is between
LIBRARY_SLACK = 12 << 20  # pages of libraries that only sampling reads
BYTES_PER_TOKEN_ID = 128  # a prompt's ids and text, in the caller's list and in the stream's
ROWS_OF_LOGITS = 40  # f32: of 16 drafts, copied, and what a sampler makes of one
UNKNOWN_PYTHON = (220 << 20, 160 << 20)  # (anonymous, mapped) where the system does not tell
MAX_TRIES = 24  # of the longest context
PROBE_DEPTH = 4096
PROBE_SECONDS = 0.4  # of each of the four timings, about

Limits = dict[str, float]


def plan(
    path: str | os.PathLike[str] | None = None,
    *,
    ram: int | None = None,
    n_ctx: int | None = None,
    type_k: str = DEFAULT_TYPE_K,
    n_threads: int | None = None,
    n_ubatch: int | None = None,
    prefix_bytes: int = 0,
    probe: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Plain data, ready for JSON. Sizes in bytes; ram: None for what is available now.

    {"model", "n_ctx", "type_k", "n_ctx_train", "ram", "fits": bool,
     "mapped": {"weights", "libraries"}, "anonymous": {"weights", "k_cache", "prefixes", "buffers", "workspace",
     "scratch", "logits", "tokens", "python", "slack"}, "total",
     "largest_n_ctx": {type_k: n, at most n_ctx_train, 0 if nothing fits},
     "times": None if it does not fit or is not probed, else {"limits", "first_token_s": {tokens of the prompt: s},
              "decode_ms": {tokens in the cache: ms}}}
    """
    ram = memory.available() if ram is None else ram
    if ram is None:
        raise EngineError("this system does not tell how much memory is available; give --ram")
    engine = Engine(
        path, n_ctx=n_ctx, type_k=type_k, n_threads=n_threads, n_ubatch=n_ubatch, prefix_bytes=0, progress=progress
    )
    try:
        for n in (engine.n_ubatch, 100, 17, 16, 4, 2):  # rests of prompts, and drafts, have kernels of their own
            if n <= engine.n_ubatch:
                engine._compile(n)
        return _plan(engine, ram, prefix_bytes, probe)
    finally:
        engine.close()


def _plan(engine: Engine, ram: int, prefix_bytes: int, probe: bool) -> dict[str, Any]:
    model, n_ctx, type_k = engine.model, engine.n_ctx, engine.type_k
    parts = _Parts(engine, prefix_bytes)
    mapped, anonymous = parts.mapped(), parts.anonymous(n_ctx, type_k)
    total = sum(mapped.values()) + sum(anonymous.values())
    report: dict[str, Any] = {
        "model": os.path.basename(engine.path),
        "n_ctx": n_ctx,
        "type_k": type_k,
        "n_ctx_train": model.hparams.n_ctx_train,
        "ram": ram,
        "fits": total <= ram,
        "mapped": mapped,
        "anonymous": anonymous,
        "total": total,
        "largest_n_ctx": {kind: parts.largest(ram, kind) for kind in TYPES_K},
        "times": None,
    }
    if probe and report["fits"]:
        report["times"] = _times(engine)
    return report


class _Parts:
    """Bytes of an engine's parts, for any n_ctx and type_k. Made before it has executed anything."""

    def __init__(self, engine: Engine, prefix_bytes: int):
        self.model, self.prefix_bytes, self.n_threads = engine.model, prefix_bytes, engine.n_threads
        now, self.libraries = memory.resident() or UNKNOWN_PYTHON
        self.copied = _copied_weights(engine.model)
        self.python = max(0, now - self.copied)
        self.weights = sum(tensor.nbytes + PAGE for tensor in used_tensors(engine.model.file, engine.hparams))

    def mapped(self) -> dict[str, int]:
        return {"weights": self.weights, "libraries": self.libraries + LIBRARY_SLACK}

    def anonymous(self, n_ctx: int, type_k: str) -> dict[str, int]:
        model, hp, ops = self.model, self.model.hparams, self.model.ops
        shape = Shape(n_ctx, type_k, model.n_ubatch, model.min_mha_tokens)
        buffers, workspace = of_steps(model.weights, ops, shape, model.n_threads)
        layout = layout_of(hp, shape)
        return {
            "weights": self.copied,
            "k_cache": hp.n_layer * (-(-n_ctx * layout.row_stride // PAGE) * PAGE),
            "prefixes": self.prefix_bytes,
            "buffers": buffers,
            "workspace": workspace,
            "scratch": self.n_threads * int(ops.threads.SCRATCH_BYTES),
            "logits": ROWS_OF_LOGITS * 4 * hp.n_vocab,
            "tokens": BYTES_PER_TOKEN_ID * n_ctx,
            "python": self.python,
            "slack": SLACK,
        }

    def largest(self, ram: int, type_k: str) -> int:
        """The most tokens of context, as far as the model was trained, that fit into ram."""
        rest = ram - sum(self.mapped().values())
        over = lambda n: sum(self.anonymous(n, type_k).values()) - rest  # noqa: E731
        return largest(over, min(self.model.hparams.n_ctx_train, MAX_N_CTX))


def largest(over: Callable[[int], int], high: int) -> int:
    """The greatest n from 1 to high with over(n) <= 0, which grows nearly as a line does; 0 if there is none."""
    low = 1
    over_low, over_high = over(low), over(high)
    if over_high <= 0 or over_low > 0:
        return high if over_high <= 0 else 0
    for i in range(MAX_TRIES):  # where the line through both ends meets 0, now and then the middle
        if high - low <= 1:
            break
        share = 0.5 if i % 3 == 2 else over_low / (over_low - over_high)
        n = min(max(low + int((high - low) * share), low + 1), high - 1)
        if (more := over(n)) <= 0:
            low, over_low = n, more
        else:
            high, over_high = n, more
    return low


def _copied_weights(model: Model) -> int:
    """Of legacy files: the transposed parts of attn_kv_b."""
    if model.hparams.form != "legacy":
        return 0
    return sum(layer.w_uk.nbytes for layer in model.weights.attention)


# ----------------------------------------------------------------------------------------------------------- times


def _times(engine: Engine) -> dict[str, Any]:
    """Estimates from two steps of one token and two of a prompt, at depth 0 and at PROBE_DEPTH or what there is."""
    run = engine.model.ops.Run(engine.n_threads)
    limits = engine.model.ops.roofline.limits(run)
    n_prompt = _prompt_length(engine, limits)
    depth = max(0, min(PROBE_DEPTH, engine.n_ctx - n_prompt))
    stream = Stream(replace(engine.model, n_ubatch=n_prompt), depth + n_prompt, engine.type_k)
    tokens = np.random.default_rng(1).integers(0, engine.hparams.n_vocab, n_prompt)
    stream.step(tokens)  # brings the weights into memory
    fits = {
        "prompt": _Fit.of(lambda at: _timed(stream, tokens, at), stream, n_prompt, depth, limits),
        "token": _Fit.of(lambda at: _timed(stream, tokens[:1], at), stream, 1, depth, limits),
    }
    stream.close()
    n_ctx = engine.n_ctx
    depths = sorted({n for n in (0, 1024, 4096, 16384, n_ctx // 2, n_ctx - 1) if n < n_ctx})
    prompts = sorted({n for n in (64, 512, 4096, 16384, n_ctx // 2, n_ctx) if 0 < n <= n_ctx})
    planned = Stream(engine.model, n_ctx, engine.type_k)
    try:
        return {
            "limits": limits,
            "first_token_s": {n: fits["prompt"].seconds(planned, n, 0, limits) for n in prompts},
            "decode_ms": {n: 1e3 * fits["token"].seconds(planned, 1, n, limits) for n in depths},
        }
    finally:
        planned.close()


def _prompt_length(engine: Engine, limits: Limits) -> int:
    """Tokens of a prompt that take about PROBE_SECONDS: a whole ubatch if it does, else enough for MHA mode."""
    n = engine.n_ubatch
    while n > max(64, engine.model.min_mha_tokens) and 2 * sum(_roof(engine, n, 0, limits)) > PROBE_SECONDS:
        n //= 2
    return n


class _Fit:
    """A step's time = rest * what the limits say of all but attention + attention * what they say of attention."""

    def __init__(self, rest: float, attention: float):
        self.rest, self.attention = rest, attention

    @classmethod
    def of(cls, timed: Callable[[int], float], stream: Stream, n_tok: int, depth: int, limits: Limits) -> _Fit:
        start = timed(0)
        rest, attention = _roof(stream, n_tok, 0, limits)
        more = _roof(stream, n_tok, depth, limits)[1] - attention
        slope = start / (rest + attention)
        if more > 0 and start < 2 * PROBE_SECONDS:  # else there is no time for a second one
            slope = max((timed(depth) - start) / more, 1.0)  # nothing is faster than the limits
        return cls((start - min(slope * attention, start / 2)) / rest, slope)

    def seconds(self, stream: Stream, n_tok: int, n_past: int, limits: Limits) -> float:
        rest, attention = _roof(stream, n_tok, n_past, limits)
        return self.rest * rest + self.attention * attention


def _roof(stream: Stream, n_tok: int, n_past: int, limits: Limits) -> tuple[float, float]:
    """Seconds that the limits leave to a step: (all but attention, attention)."""
    work = work_of(stream, n_tok, n_past)
    attention = _at_limits(work.pop("attention"), limits)
    return sum(_at_limits(part, limits) for part in work.values()), attention


def _at_limits(work: Work, limits: Limits) -> float:
    shares = work.shares(1.0, limits)
    return max(shares["of_read"] or 0.0, shares["of_peak"] or 0.0)


def _timed(stream: Stream, tokens: np.ndarray, depth: int) -> float:
    """Median seconds of a step after depth tokens, whose rows are those of the first real ones, repeated."""
    stream.cache.repeat(min(stream.n_ctx, stream.n_ubatch), depth)
    times: list[float] = []
    while len(times) < 3 or (sum(times) < PROBE_SECONDS / 2 and len(times) < 50):
        stream.cache.n_kv = depth
        began = time.perf_counter()
        stream.step(tokens)
        times.append(time.perf_counter() - began)
        if sum(times) > 4 * PROBE_SECONDS:
            break
    return median(times[1:] or times)
