"""This card's limits, measured: what it copies, and what it multiplies out of registers (cuda/roofline.cu).

bf16 is the rate of mma.sync, which all cards since Turing have; Hopper's wgmma would reach some 1.6 times as much.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from ._compile import kernel
from .matmul import MAX_DOT_TOKENS
from .quants import format_of
from .stream import prepare

COPIED = 1 << 30  # bytes
BLOCKS = 8  # of a multiprocessor
THREADS, CHAINS = 256, 8
PRODUCTS = {"f32": 1.0, "bf16": 16 * 8 * 16 / 32, "int8": 4.0}  # of a thread in a step of a chain
STEPS = {"f32": 20_000, "bf16": 5_000, "int8": 20_000}
REPEATS = 5


def limits(run: Any) -> dict[str, float]:
    """{"read_gb_s", "f32_gmul_s", "bf16_gmul_s", "int8_gmul_s"}: 10^9 bytes (read and written), products a second."""
    a, b = run.empty(COPIED), run.empty(COPIED)
    for _ in range(2 * REPEATS):  # the first few find the memory's clock still low
        run.copy(b, a)
    found = {"read_gb_s": 2 * COPIED / _seconds(run) / 1e9}
    del a, b
    n_blocks = BLOCKS * run.limits.n_sm
    out = run.empty(4 * n_blocks * THREADS)
    for kind, n in PRODUCTS.items():
        for _ in range(REPEATS):
            run.launch(kernel("roofline.cu", f"peak_{kind}"), (n_blocks,), THREADS, 0, (out, STEPS[kind]))
        found[f"{kind}_gmul_s"] = n * CHAINS * STEPS[kind] * THREADS * n_blocks / _seconds(run) / 1e9
    return found


def _seconds(run: Any) -> float:
    """Of one of the jobs that are queued, all the same: the median, the first ones left out."""
    tape = run.take()
    prepare([tape])
    times = [t for _, t in run.profile(tape)]
    return median(times[len(times) // 2 :])


def attention_kinds(type_k: str, mha: bool) -> tuple[str, str]:
    """Kinds of product of (the latent, the rope) in mla_prefill (mha) or mla_decode: 16-bit ones, of every type."""
    return "bf16", "bf16"


def matmul_kind(type_id: int, k: int, n_tok: int) -> str:
    """Kind of product of n_tok tokens with rows of k weights of a type."""
    f = format_of(type_id)
    if n_tok > MAX_DOT_TOKENS:
        return "f32" if f.name == "F32" else "bf16"
    return "f32" if f.is_float else "int8"
