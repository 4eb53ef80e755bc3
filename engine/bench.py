"""run(): times prompt processing and decoding of a model at given depths.

A depth is not computed: 256 tokens are, and their rows are repeated up to it in every layer, as real as any others and
without the hours of a long prompt. Times are of whole steps, medians with the least and the greatest.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from .engine import Engine
from .stream import Progress, Stream

N_REAL_TOKENS = 256
N_PREFILL_RUNS = 3


def run(
    path: str | os.PathLike[str] | None = None,
    *,
    n_prompt: Sequence[int] = (512,),
    n_gen: int = 32,
    depths: Sequence[int] = (0,),
    threads: Sequence[int] = (0,),
    type_k: Sequence[str] = ("f16",),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Every combination of the lists; a thread count of 0 means one per physical core.

    {"model", "decode": [{"type_k", "threads", "depth", "ms_per_token", "min", "max"}],
     "prefill": [{"type_k", "threads", "depth", "tokens", "tokens_per_s", "min", "max"}]}
    """
    result: dict[str, Any] = {"model": "", "decode": [], "prefill": []}
    rng = np.random.default_rng(1)
    for kind in type_k:
        n_ctx = max(depths) + max([N_REAL_TOKENS, n_gen + 1, *n_prompt])
        for n_threads in threads:
            engine = Engine(path, n_ctx=n_ctx, type_k=kind, n_threads=n_threads or None, progress=progress)
            result["model"] = os.path.basename(engine.path)
            n_vocab = engine.hparams.n_vocab
            engine.step(rng.integers(0, n_vocab, N_REAL_TOKENS))
            engine.step([0])  # compiles, and brings the weights into memory
            engine.truncate(N_REAL_TOKENS)
            for depth in depths:
                case = {"type_k": kind, "threads": engine.n_threads, "depth": depth}
                result["decode"] += _decode(engine, case, rng.integers(0, n_vocab, n_gen))
                for n in n_prompt:
                    result["prefill"] += _prefill(engine, case, rng.integers(0, n_vocab, n))
            engine.close()
    return result


def _decode(engine: Stream, case: dict[str, Any], tokens: np.ndarray) -> list[dict[str, Any]]:
    if not len(tokens):
        return []
    _fill(engine, case["depth"])
    engine.step(tokens[:1])
    times = [_time(engine, tokens[i : i + 1]) * 1e3 for i in range(len(tokens))]
    return [case | {"ms_per_token": statistics.median(times), "min": min(times), "max": max(times)}]


def _prefill(engine: Stream, case: dict[str, Any], tokens: np.ndarray) -> list[dict[str, Any]]:
    if not len(tokens):
        return []
    rates = []
    for _ in range(N_PREFILL_RUNS):
        _fill(engine, case["depth"])
        rates.append(len(tokens) / _time(engine, tokens))
    rate = statistics.median(rates)
    return [case | {"tokens": len(tokens), "tokens_per_s": rate, "min": min(rates), "max": max(rates)}]


def _time(engine: Stream, tokens: np.ndarray) -> float:
    start = time.perf_counter()
    engine.step(tokens)
    return time.perf_counter() - start


def _fill(engine: Stream, depth: int) -> None:
    """Set n_kv to depth, by repeating the first N_REAL_TOKENS rows, which stay in place."""
    cache = engine.cache
    for rows in cache.rows:
        for start in range(N_REAL_TOKENS, depth, N_REAL_TOKENS):
            n = min(N_REAL_TOKENS, depth - start)
            rows[start : start + n] = rows[:n]
    cache.n_kv = depth
