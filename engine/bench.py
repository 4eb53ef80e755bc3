"""run(): times prompt processing and decoding of a model at given depths, beside this machine's limits.

A depth is not computed: 256 tokens are, and their rows are repeated up to it in every layer, as real as any others and
without the hours of a long prompt. Times are of whole steps, medians with the least and the greatest. Every step is
profiled as it is timed (two clock reads at each barrier, microseconds in all), so its parts are its own; parts.py says
what they are. The limits are measured between the depths, for a machine's clock and its other tenants change.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np

from .engine import Engine
from .model import Progress
from .parts import PARTS, by_part, work_of
from .stream import Stream

N_REAL_TOKENS = 256
N_PREFILL_RUNS = 3

Limits = dict[str, float]
Timing = tuple[float, dict[str, float]]  # seconds of a step, and of its parts


def run(
    path: str | os.PathLike[str] | None = None,
    *,
    n_prompt: Sequence[int] = (512,),
    n_ubatch: int | None = None,
    n_gen: int = 32,
    depths: Sequence[int] = (0,),
    threads: Sequence[int] = (0,),
    type_k: Sequence[str] = ("f16",),
    backend: str = "cpu",
    experts: str | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Every combination of the lists; a thread count of 0 means one per physical core.

    progress   of compiling        tell   called with what is timed next, a few words
    {"model", "backend",
     "limits": {threads: {"read_gb_s", "f32_gmul_s", "bf16_gmul_s", "int8_gmul_s"}}, threads as a string
     "decode": [{"type_k", "threads", "depth", "ms_per_token", "min", "max", "parts"}],
     "prefill": [{"type_k", "threads", "depth", "tokens", "tokens_per_s", "min", "max", "parts"}]}
    parts: {name of PARTS: {"ms": of a token, "of_read", "of_peak": shares of the limits, None without work}}
    """
    result: dict[str, Any] = {"model": "", "limits": {}, "decode": [], "prefill": []}
    measured: dict[str, list[Limits]] = {}
    rng = np.random.default_rng(1)
    for kind in type_k:
        n_ctx = max(depths) + max([N_REAL_TOKENS, n_gen, *n_prompt]) + 1
        for n_threads in threads:
            engine = Engine(
                path,
                n_ctx=n_ctx,
                type_k=kind,
                n_threads=n_threads or None,
                n_ubatch=n_ubatch,
                backend=backend,
                experts=experts,
                progress=progress,
            )
            result |= {"model": os.path.basename(engine.path), "backend": engine.backend}
            n_vocab = engine.hparams.n_vocab
            engine.step(rng.integers(0, n_vocab, N_REAL_TOKENS))
            engine.step([0])  # compiles, and brings the weights into memory
            engine.truncate(N_REAL_TOKENS)
            for depth in depths:
                limits = engine.model.ops.roofline.limits(engine.model.ops.Run(engine.n_threads))
                measured.setdefault(str(engine.n_threads), []).append(limits)
                case = {"type_k": kind, "threads": engine.n_threads, "depth": depth}
                at = f"at depth {depth:,}, {kind}, threads: {engine.n_threads}"
                if n_gen:
                    tell(f"{n_gen:,} tokens one by one {at}")
                    result["decode"].append(case | _decode(engine, depth, rng.integers(0, n_vocab, n_gen)))
                for n in filter(None, n_prompt):
                    tell(f"a prompt of {n:,} tokens {at}")
                    result["prefill"].append(case | _prefill(engine, depth, rng.integers(0, n_vocab, n)))
            engine.close()
    result["limits"] = {n: _medians(found) for n, found in measured.items()}
    for row in result["decode"] + result["prefill"]:
        _add_shares(row, result["limits"][str(row["threads"])])
    return result


def _decode(engine: Engine, depth: int, tokens: np.ndarray) -> dict[str, Any]:
    _fill(engine, depth)
    engine.step(tokens[:1])
    timings = [_time(engine, tokens[i : i + 1]) for i in range(len(tokens))]
    times = [seconds * 1e3 for seconds, _ in timings]
    row = {"ms_per_token": median(times), "min": min(times), "max": max(times)}
    return row | {"parts": _parts(timings, 1), "work": work_of(engine, 1, depth + 1 + len(tokens) // 2)}


def _prefill(engine: Engine, depth: int, tokens: np.ndarray) -> dict[str, Any]:
    engine._compile(len(tokens))
    timings = []
    for _ in range(N_PREFILL_RUNS):
        _fill(engine, depth)
        timings.append(_time(engine, tokens))
    n = len(tokens)
    rates = [n / seconds for seconds, _ in timings]
    row = {"tokens": n, "tokens_per_s": median(rates), "min": min(rates), "max": max(rates)}
    return row | {"parts": _parts(timings, n), "work": work_of(engine, n, depth)}


def _time(engine: Engine, tokens: np.ndarray) -> Timing:
    """One step, with the run's replay() replaced by one that is profiled."""
    run = engine._run
    found: list[tuple[str, float]] = []
    evaluating = 0.0

    def replay(tape: Any, tell: None) -> None:
        nonlocal evaluating
        start = time.perf_counter()
        profile = _profiled(run, tape)
        found.extend(profile)
        evaluating += time.perf_counter() - start - sum(t for _, t in profile)

    run.replay = replay
    try:
        start = time.perf_counter()
        engine.step(tokens)
        seconds = time.perf_counter() - start - evaluating
    finally:
        del run.replay
    parts = by_part(found)
    parts["rest"] += seconds - sum(parts.values())
    return seconds, parts


def _profiled(run: Any, tape: Any) -> list[tuple[str, float]]:
    """Execute a tape; (kernel, seconds), in all those of a replay."""
    if not run.profile_is_slower:
        return list(run.profile(tape))
    start = time.perf_counter()
    type(run).replay(run, tape)
    seconds = time.perf_counter() - start
    profile = run.profile(tape)  # once more: it writes what is there
    scale = seconds / sum(t for _, t in profile)
    return [(name, t * scale) for name, t in profile]


def _parts(timings: list[Timing], n_tok: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of a token by part: medians, scaled to add up to the median step."""
    seconds = {name: median(parts[name] for _, parts in timings) for name in PARTS}
    scale = median(whole for whole, _ in timings) / sum(seconds.values()) * 1e3 / n_tok
    return {name: {"ms": t * scale} for name, t in seconds.items()}


def _add_shares(row: dict[str, Any], limits: Limits) -> None:
    """Put the row's work, which is taken out, into its parts as shares of the limits."""
    work = row.pop("work")
    for name, part in row["parts"].items():
        part |= work[name].shares(part["ms"] / 1e3 * row.get("tokens", 1), limits)


def _medians(found: list[Limits]) -> Limits:
    return {name: median(limits[name] for limits in found) for name in found[0]}


def _fill(engine: Stream, depth: int) -> None:
    """Set n_kv to depth, by repeating the first N_REAL_TOKENS rows, which stay in place."""
    engine.cache.repeat(N_REAL_TOKENS, depth)
