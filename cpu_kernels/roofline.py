"""This machine's limits, measured: products per second of the microkernel out of the first cache, and DRAM read.

    limits     all of them; attention_kinds and matmul_kind say which kind of product an op is to be compared with
    multiply   1 product (f32), 2 (bf16, int16) or 4 (int8) a lane and dot; ISA.n_acc accumulators, operands in the
               first cache
    read       sums of lines of a buffer that no cache holds

What a kernel reaches is reported as a share of these, measured in the same run: the clock and the other tenants of a
machine change within seconds.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from . import attention, panels, quants
from ._jit import kernel
from .isa import ISA
from .matmul import MAX_DOT_TOKENS

PRODUCTS = {"f32": 1, "bf16": 2, "int8": 4, "int16": 2}  # of a lane in a dot
# whether this CPU multiplies so
KINDS = {"f32": True, "bf16": ISA.bf16, "int8": ISA.int8 or ISA.avx2, "int16": ISA.avx2 and not ISA.int8}
STEPS = 20_000  # of a tile of multiply
TILES = 32  # for each thread: 8 ms, in which the system has spread them over the cores
READ_BYTES = 256 << 20
READ_TILE = 1 << 20


def limits(run: Any) -> dict[str, float]:
    """{"read_gb_s", "f32_gmul_s", "int8_gmul_s", …}: 10^9 bytes and products a second on a run's threads.

    Only those kinds of product that kernels use on this CPU.
    """
    found = {"read_gb_s": dram_read(run) / 1e9}
    return found | {f"{kind}_gmul_s": peak(run, kind) / 1e9 for kind, there in KINDS.items() if there}


def attention_kinds(type_k: str, mha: bool) -> tuple[str, str]:
    """Kinds of product of (the latent, the rope) in mla_prefill (mha) or mla_decode."""
    if mha:
        kind = "f32" if type_k == "f16" else ISA.panel
    else:
        kind = attention.products(type_k)
    return kind, ISA.panel if kind == "int8" else kind


def matmul_kind(type_id: int, k: int, n_tok: int) -> str:
    """Kind of product of n_tok tokens with rows of k weights of a type."""
    if n_tok > MAX_DOT_TOKENS:
        return panels.kind_of(type_id, k)
    return "int8" if KINDS["int8"] and quants.FORMATS[type_id].activation != "f32" else "f32"


def peak(run: Any, kind: str) -> float:
    """Multiplications per second (each with its addition) on the threads of a run; kind of PRODUCTS."""
    n_tiles = TILES * run.n_threads
    dots = n_tiles * STEPS * 2 * ISA.n_acc
    return dots * 16 * PRODUCTS[kind] / _seconds(run, multiply(kind=kind), n_tiles, ())


def dram_read(run: Any) -> float:
    """Bytes per second."""
    data = np.ones(READ_BYTES, np.uint8)
    return READ_BYTES / _seconds(run, read(), READ_BYTES // READ_TILE, (data,))


def _seconds(run: Any, code: Any, n_tiles: int, args: tuple[Any, ...]) -> float:
    run.launch(code, n_tiles, args)
    tape = run.take()
    times = []
    for _ in range(6):  # the first one compiles, and wakes the threads
        start = time.perf_counter()
        run.replay(tape)
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


@kernel
def multiply(kind):
    """STEPS steps of two dots per accumulator."""
    from .microkernel import rank1_bf16, rank1_f32, rank1_pairs, rank1_words, rank1_ws8, store_regs, zeros_f, zeros_i

    int8 = rank1_ws8 if ISA.int8 else rank1_pairs
    rank1 = {"f32": rank1_f32, "bf16": rank1_bf16, "int8": int8, "int16": rank1_words}[kind]
    zeros = zeros_f if kind in ("f32", "bf16") else zeros_i
    M = ISA.n_acc

    def body(tile, scratch):
        acc = zeros(M, 1)
        for i in range(STEPS):
            at = scratch + i % 8 * 128  # moves, else the broadcasts are loaded once and spilled
            acc = rank1(acc, at, at + 4096, 64)
            acc = rank1(acc, at + 64, at + 4100, 64)
        store_regs(acc, scratch + 8192, 64)

    return body


@kernel
def read():
    """READ_TILE bytes."""
    from .simd import ldi, sti

    def body(tile, scratch, data):
        data += tile * READ_TILE
        s0, s1, s2, s3 = ldi(data), ldi(data), ldi(data), ldi(data)
        for i in range(0, READ_TILE, 256):
            s0 = s0 ^ ldi(data + i)
            s1 = s1 ^ ldi(data + i + 64)
            s2 = s2 ^ ldi(data + i + 128)
            s3 = s3 ^ ldi(data + i + 192)
        sti(scratch, s0 ^ s1 ^ s2 ^ s3)

    return body
