"""Time of mla_decode per cached token, per type_k, beside this machine's limits measured in the same run.

    python scripts/bench_attention.py --heads 16 --rank 512 --rot 64 --n-kv 4096 --n-kv 16384 --threads 1 --threads 2

One token is decoded in each of --layers caches, one after the other, as in a model: eight caches of 4,096 f16 rows are
38 MB. Types and limits are timed in turns, and each figure is the median of its rounds, so that load from elsewhere
meets all of them alike. The share is that of the products of the kind that this CPU multiplies the type in.
"""

from __future__ import annotations

import os
import threading
import time

import click
import numpy as np

from cpu_kernels.attention import mla_decode, products
from cpu_kernels.isa import CPU_NAME
from cpu_kernels.k_cache import k_store
from cpu_kernels.roofline import dram_read, peak
from cpu_kernels.threads import Run
from engine.k_cache import TYPES_K, KCacheLayout


@click.command()
@click.option("--heads", default=16, show_default=True)
@click.option("--rank", default=512, show_default=True, help="kv_lora_rank")
@click.option("--rot", default=64, show_default=True, help="n_rot")
@click.option("--n-kv", multiple=True, default=[4096, 16384], show_default=True)
@click.option("--threads", multiple=True, default=[1, 2], show_default=True)
@click.option("--tokens", default=1, show_default=True, help="query tokens of a step, up to 16")
@click.option("--layers", default=8, show_default=True)
@click.option("--rounds", default=15, show_default=True)
@click.option("--pin", is_flag=True, help="one thread of the pool to a core; else as the system schedules them")
@click.option("--type-k", multiple=True, type=click.Choice(TYPES_K), default=TYPES_K, show_default=True)
def main(
    heads: int, rank: int, rot: int, n_kv: tuple[int, ...], threads: tuple[int, ...], tokens: int, layers: int,
    rounds: int, pin: bool, type_k: tuple[str, ...],
) -> None:  # fmt: skip
    print(f"{CPU_NAME}, {heads} heads, {rank} + {rot}, {tokens} query tokens, {layers} layers, median of {rounds}")
    print("threads   n_kv  type_k  ns/token     GB/s  of read   Gmul/s  of peak")
    cpus = sorted(os.sched_getaffinity(0)) if pin else []
    for n_threads in threads:
        run = Run(n_threads)
        peak(run, "f32")  # starts the pool
        if pin:
            for cpu, thread in zip(cpus, threading.enumerate()):
                os.sched_setaffinity(thread.native_id, {cpu})
        for n in n_kv:
            tapes = {t: decode_tape(run, t, n, heads, rank, rot, tokens, layers) for t in type_k}
            times: dict[str, list[float]] = {t: [] for t in type_k}
            kinds = {t: products(t) for t in type_k}
            limits: dict[str, list[float]] = {kind: [] for kind in {*kinds.values(), "read"}}
            for i in range(rounds + 1):
                for t, tape in tapes.items():
                    start = time.perf_counter()
                    run.replay(tape)
                    times[t].append((time.perf_counter() - start) / (layers * n))
                if i % 5 == 0:
                    for kind, found in limits.items():
                        found.append(dram_read(run) if kind == "read" else peak(run, kind))
            for t in type_k:
                seconds = float(np.median(times[t][1:]))
                nbytes = KCacheLayout(1, n, rank, rot, t).row_stride / seconds
                products_s = tokens * heads * (2 * rank + rot) / seconds
                limit = {kind: float(np.median(found)) for kind, found in limits.items()}
                print(
                    f"{n_threads:7} {n:6}  {t:6} {seconds * 1e9:9.1f} {nbytes / 1e9:8.1f} {nbytes / limit['read']:8.0%}"
                    f" {products_s / 1e9:8.0f} {products_s / limit[kinds[t]]:7.0%} of {kinds[t]}",
                    flush=True,
                )


def decode_tape(run: Run, type_k: str, n: int, heads: int, rank: int, rot: int, tokens: int, layers: int) -> object:
    """One step's decodes over `layers` caches of n rows."""
    rng = np.random.default_rng(0)
    layout = KCacheLayout(1, n, rank, rot, type_k)
    q = rng.standard_normal((tokens, heads, rank + rot), dtype=np.float32)
    out = np.empty((tokens, heads, rank), np.float32)
    kv_a = rng.standard_normal((n, rank + rot), dtype=np.float32)
    cos_sin = np.repeat(np.array([[1, 0]], np.float32), rot // 2, axis=1).repeat(n, axis=0)
    ones = np.ones(rank, np.float32)
    all_rows = [np.zeros((n, layout.row_stride), np.uint8) for _ in range(layers)]
    for rows in all_rows:
        k_store(run, kv_a, ones, 1e-6, cos_sin, np.arange(n, dtype=np.int32), rows, type_k, rank, rot)
    run.sync()
    limits = np.full(tokens, n, np.int32)
    for rows in all_rows:
        mla_decode(run, q, rows, type_k, limits, rank, rot, (rank + rot) ** -0.5, out)
    return run.take()


if __name__ == "__main__":
    main()
