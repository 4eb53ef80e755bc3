"""A toy model's forward through gpu_kernels under the shim, beside the CPU engine: the same logits, the same rows."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from compare import assert_relative_rms
from shim import ShimRun, instances
from synthetic import write_model

import gpu_kernels
from engine import Engine
from engine.k_cache import KCache, KCacheLayout
from engine.step import Buffers, Step
from gpu_kernels.attention import choose
from gpu_kernels.attention import kernels as decode_kernels
from gpu_kernels.device import CARDS
from gpu_kernels.k_cache import kernels as row_kernels

FIRST, NEXT = [3, 141, 59, 26], [5]
N_CTX = 64
# of the logits' rms. f32 and f16: 16-bit queries and probabilities; else int8 activations are rounded in another order,
# and q8 decodes with 16-bit rather than int8 queries. q4_k_m: a scale per 32 activations, where the CPU has one per 256
# (found: 0.038, with an expert of one token that changes)
CASES = [("f32", "f16", 2e-3), ("q8_0", "q8", 2e-2), ("q4_k_m", "bf16", 6e-2)]

instances(k for t in ("f16", "bf16", "q8") for n in (3, 12)
          for k in decode_kernels(choose(CARDS[90], t, 128, 32, n), t, 128, 32))  # fmt: skip
instances(decode_kernels(choose(CARDS[90], "q8", 128, 32, 60), "q8", 128, 32))
instances(row_kernels(t, 128, 32)["k_store"] for t in ("f16", "bf16", "q8"))
matmul = importlib.import_module("gpu_kernels.matmul")
instances(matmul.matvec(f, n) for f in (0, 6, 8, 12, 14) for n in (1, 4))
instances([matmul.VARIANTS[-1].kernel(CARDS[90], 8)])


class Ops:
    """gpu_kernels as a model calls them: weights are taken apart when they are first met."""

    def __init__(self) -> None:
        self.packed: dict[int, tuple[Any, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        op = getattr(gpu_kernels, name)
        return lambda run, *args, **kwargs: op(run, *(self.on_gpu(run, a) for a in args), **kwargs)

    def on_gpu(self, run: Any, arg: Any) -> Any:
        if isinstance(arg, list):
            return [self.on_gpu(run, a) for a in arg]
        if not hasattr(arg, "type"):
            return arg
        if id(arg) not in self.packed:
            self.packed[id(arg)] = arg, gpu_kernels.upload(run, arg)
        return self.packed[id(arg)][1]


def step(engine: Any, ops: Any, cache: KCache, tokens: list[int], mha: bool = False) -> np.ndarray:
    """Logits of all tokens, (n, n_vocab); their rows are in the cache afterwards."""
    n, hp, run = len(tokens), engine.hparams, ShimRun(-1)
    some, logits = slice(0, n), np.full((n, hp.n_vocab), np.nan, np.float32)
    one = Step(ops, run, Buffers(n), hp, [(some, cache.rows)], cache.layout.type_k, cache.n_kv, mha)
    one.fill(some, np.array(tokens), cache)
    engine.model.weights.forward(one, logits)
    cache.append(n)
    return logits


@pytest.fixture(scope="module", params=CASES, ids=[f"{quant} {type_k}" for quant, type_k, _ in CASES])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """(engine, ops, an empty cache for the GPU, tolerance)"""
    quant, type_k, tolerance = request.param
    path = write_model(tmp_path_factory.mktemp("model") / "toy.gguf", quant=quant, n_layer=2)
    engine = Engine(path, n_ctx=N_CTX, type_k=type_k)
    hp = engine.hparams
    layout = KCacheLayout(hp.n_layer, N_CTX, hp.kv_lora_rank, hp.n_rot, type_k)
    return SimpleNamespace(engine=engine, ops=Ops(), layout=layout, tolerance=tolerance)


def test_logits_are_the_cpu_engine_s(both: SimpleNamespace) -> None:
    cache = KCache(both.layout)
    both.engine.clear()
    for tokens in (FIRST, NEXT):
        expected = both.engine.step(tokens, logits="all")
        assert_relative_rms(step(both.engine, both.ops, cache, tokens), expected, both.tolerance)


@pytest.mark.parametrize("both", [CASES[1]], indirect=True, ids=["q8_0 q8"])
def test_a_prompt_s_logits_are_the_cpu_engine_s(both: SimpleNamespace) -> None:
    """20 tokens after 4: products on tensor cores, and mla_prefill."""
    cache, prompt = KCache(both.layout), [7 * i % 300 for i in range(20)]
    both.engine.clear()
    both.engine.step(FIRST)
    step(both.engine, both.ops, cache, FIRST)
    expected = both.engine.step(prompt, logits="all")
    assert_relative_rms(step(both.engine, both.ops, cache, prompt, mha=True), expected, 2 * both.tolerance)


def test_a_cache_that_the_cpu_filled_goes_on_on_the_gpu(both: SimpleNamespace) -> None:
    both.engine.clear()
    both.engine.step(FIRST)
    cache = KCache(both.layout)
    for theirs, ours in zip(both.engine.cache.rows, cache.rows):
        ours[: len(FIRST)] = theirs[: len(FIRST)]
    cache.append(len(FIRST))
    expected = both.engine.step(NEXT, logits="all")
    assert_relative_rms(step(both.engine, both.ops, cache, NEXT), expected, both.tolerance)


def test_a_cache_that_the_gpu_filled_goes_on_on_the_cpu(both: SimpleNamespace) -> None:
    cache = KCache(both.layout)
    step(both.engine, both.ops, cache, FIRST)
    both.engine.clear()
    expected = both.engine.step(FIRST + NEXT, logits="all")[-1:]
    both.engine.clear()
    both.engine.step(FIRST)
    for theirs, ours in zip(both.engine.cache.rows, cache.rows):
        theirs[: len(FIRST)] = ours[: len(FIRST)]
    assert_relative_rms(both.engine.step(NEXT, logits="all"), expected, both.tolerance)
