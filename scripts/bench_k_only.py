"""What K-only gains: mla_decode beside the same kernel that reads its values from an array of their own.

    python scripts/bench_k_only.py --out k_only.json
    python scripts/bench_k_only.py --table k_only.json README.md

A K-cache row is [latent | rope], and V is the latent: K-only reads 1,152 bytes of a token at 512 + 64 in bf16, where
separate arrays have 1,152 + 1,024. The variant is decode_split of cpu_kernels/attention.py with another address for the
values, and gives the same bits, which is checked before anything is timed. It comes plain, and with prefetches of the
values among those of the keys, which hide much of what a second array costs while products are what a core waits for.
All decode one token in each of --layers caches, in turns, and each figure is the median of its rounds.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import click
import marked
import numpy as np

from cpu_kernels import attention
from cpu_kernels._jit import kernel
from cpu_kernels.isa import CPU_NAME, ISA
from cpu_kernels.roofline import dram_read, peak
from cpu_kernels.threads import Run, Tape

NBYTES = {"K-only": 1152, "K and V": 2176, "K and V, prefetched": 2176}  # of a token and layer
RANK, ROT, HEADS = 512, 64, 16
SOURCE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]  # compiled code is kept under it


@kernel
def decode_split_separate(prefetched, source):
    """decode_split of attention.py, in bf16, with values of their own."""
    from cpu_kernels.simd import bc, device, ld, ld_i32, ld_i64, prefetch, st, st_bf16

    module = attention.KINDS["bf16"]
    read, before = attention.reading("bf16", "bf16"), device(attention.rows_before)
    of_split = device(attention.split_bytes)
    add_scores, hide, soften = _scores(prefetched), attention.masking(), attention.softmax("bf16")
    add_values = module.values()
    GROUPS, ROWS, BLOCK, NO_SCORE = attention.GROUPS, attention.ROWS, attention.BLOCK, attention.NO_SCORE

    def body(tile, scratch, panels, panel_bytes, limits, n_lanes, rows, row_stride, C, R, n_out, partial, n_kv, n_tok,
             n_chunks, n_tiles, n_threads, latents, latent_stride):  # fmt: skip
        last_split = ld_i64(n_tiles) // n_chunks - 1
        split = last_split - tile // n_chunks
        first_lane = tile % n_chunks * GROUPS * 16
        n_here = min(n_lanes - first_lane, GROUPS * 16)
        n_groups = (n_here + 15) // 16
        last, shortest = 0, 1 << 40
        for t in range(n_tok):
            last = max(last, ld_i32(n_kv + 4 * t))
            shortest = min(shortest, ld_i32(n_kv + 4 * t))
        first = before(split)
        last = min(last, before(split + 1))
        next_first = before(max(0, last_split - (tile + n_threads) // n_chunks))
        if tile < n_threads:
            for i in range(0, BLOCK * row_stride, 64):
                prefetch(rows + first * row_stride + i)

        lanes = (n_lanes + 15) // 16 * 16
        partial += split * of_split(lanes, n_out, 2)
        result = partial + first_lane * n_out * 2
        maxima = partial + lanes * n_out * 2 + first_lane * 4
        sums = maxima + 4 * lanes
        panels += first_lane // 16 * panel_bytes
        limits += 4 * first_lane
        for i in range(0, n_groups * 64, 64):
            st(maxima + i, bc(NO_SCORE))
            st(sums + i, bc(0.0))

        fades = scratch
        units = fades + GROUPS * 64
        weights = units + GROUPS * 64
        zipped = weights + GROUPS * ROWS * 64
        out = zipped + ROWS * 64
        copy = out + n_groups * n_out * 64
        for i in range(0, n_groups * n_out * 64, 64):
            st(out + i, bc(0.0))
        for t0 in range(first, last, ROWS):
            n = min(ROWS, last - t0)
            whole = (n + BLOCK - 1) // BLOCK * BLOCK
            ahead = rows + (t0 + ROWS if t0 + ROWS < last else next_first) * row_stride
            x = read(rows + t0 * row_stride, row_stride, n, whole, copy, C, R)
            v = latents + t0 * latent_stride
            for g in range(n_groups):
                p, at = weights + g * ROWS * 64, 64 * g
                add_scores(panels + g * panel_bytes, x, row_stride, whole, ahead, p, C, R, v, latent_stride)
                if t0 + whole > shortest:
                    hide(p, whole, t0, limits + at)
                soften(p, x, row_stride, whole, maxima + at, sums + at, fades + at, units + at, C, R)
            add_values(weights, ROWS * 64, n_here, fades, units, v, latent_stride, whole, ahead, 0, zipped, out, C)
        for i in range(0, n_groups * n_out * 16, 16):
            st_bf16(result + 2 * i, ld(out + 4 * i))

    return body


def _scores(prefetched: bool) -> Any:
    """decode_bf16.scores, which may also prefetch the latents of its own rows: they are needed right after."""
    from cpu_kernels.microkernel import rank1_bf16, store_regs, zeros_f
    from cpu_kernels.simd import device, prefetch

    M = ISA.n_acc

    @device
    def add_scores(panel, rows, stride, n, ahead, scores, C, R, latents, latent_stride):
        step = M * stride // ((C + R) // 4)
        latent_step = M * latent_stride // ((C + R) // 4)
        for t in range(0, n, M):
            acc = zeros_f(M, 1)
            w, x = panel, rows + t * stride
            line = x + M * stride if t + M < n else ahead
            latent = latents + t * latent_stride
            for _ in range((C + R) // 4):
                for i in range(3):
                    prefetch(line + 64 * i)
                    if prefetched:
                        prefetch(latent + 64 * i)
                line += step
                latent += latent_step
                acc = rank1_bf16(acc, w, x, stride)
                acc = rank1_bf16(acc, w + 64, x + 4, stride)
                w += 128
                x += 8
            store_regs(acc, scores + 64 * t, 64)

    return add_scores


class Caches:
    """One token's query over `layers` caches of n rows in bf16, and the same latents in arrays of their own."""

    def __init__(self, n: int, layers: int):
        rng = np.random.default_rng(0)
        one = (rng.standard_normal((n, RANK + ROT), dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
        self.rows = [one.view(np.uint8).copy() for _ in range(layers)]
        padding = ((0, attention.BLOCK), (0, 0))  # the last block is read whole
        self.latents = [np.pad(one[:, :RANK], padding).view(np.uint8) for _ in range(layers)]
        self.q = rng.standard_normal((1, HEADS, RANK + ROT), dtype=np.float32)
        self.n_kv = np.full(1, n, np.int32)
        self.out = np.empty((1, HEADS, RANK), np.float32)

    def tape(self, run: Run, kind: str) -> Tape:
        for rows, latents in zip(self.rows, self.latents):
            scale = (RANK + ROT) ** -0.5
            attention.mla_decode(run, self.q, rows, "bf16", self.n_kv, RANK, ROT, scale, self.out)
            for i, (code, n_tiles, args, barrier) in enumerate(run._jobs) if kind != "K-only" else ():
                if code.name.startswith("attention.decode_split-"):
                    variant = decode_split_separate(prefetched="prefetched" in kind, source=SOURCE)
                    run._jobs[i] = (variant, n_tiles, (*args, latents, latents.strides[0]), barrier)
        return run.take()


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--n-kv", multiple=True, default=[1024, 4096, 16384, 65536], show_default=True)
@click.option("--threads", multiple=True, default=[1, 2], show_default=True)
@click.option("--layers", default=27, show_default=True)
@click.option("--rounds", default=15, show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
@click.option("--table", nargs=2, metavar="JSON DOCUMENT", help="write the table of a JSON into a document, no more")
def main(
    n_kv: tuple[int, ...], threads: tuple[int, ...], layers: int, rounds: int, out: Path | None,
    table: tuple[str, str] | None,
) -> None:  # fmt: skip
    if table:
        marked.replace(table[1], "bench_k_only", markdown(json.loads(Path(table[0]).read_text(encoding="utf-8"))))
        return
    if not ISA.bf16:
        raise click.ClickException("this CPU decodes bf16 in f32; the variant is written for bf16 products")
    check()
    result: dict[str, Any] = {"cpu": CPU_NAME, "layers": layers, "rounds": rounds, "rows": []}
    for n in n_kv:
        caches = Caches(n, layers)
        for n_threads in threads:
            result["rows"].append({"n_kv": n, "threads": n_threads} | measure(caches, n_threads, rounds))
            print(result["rows"][-1], flush=True)
        del caches
        if out:
            out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(markdown(result))


def check() -> None:
    """The variants give the bits of the original, and read what they are told to read."""
    run, caches = Run(1), Caches(12_001, 1)
    run.replay(caches.tape(run, "K-only"))
    expected = caches.out.copy()
    latents = caches.latents[0].copy()
    for kind in list(NBYTES)[1:]:
        caches.latents[0][:] = latents
        run.replay(caches.tape(run, kind))
        same = np.array_equal(caches.out, expected)
        caches.latents[0][:] = 0
        run.replay(caches.tape(run, kind))
        if not same or caches.out.any():
            raise click.ClickException("the variant is no copy of decode_split any more; make it one")


def measure(caches: Caches, n_threads: int, rounds: int) -> dict[str, Any]:
    """{"ns": {kind: of a cached token and layer}, "read_gb_s", "bf16_gmul_s": limits}"""
    run = Run(n_threads)
    tapes = {kind: caches.tape(run, kind) for kind in NBYTES}
    times: dict[str, list[float]] = {kind: [] for kind in NBYTES}
    reads, peaks = [], []
    for i in range(rounds + 1):  # the first is not counted
        for kind, tape in tapes.items():
            start = time.perf_counter()
            run.replay(tape)
            times[kind].append((time.perf_counter() - start) / (len(caches.rows) * len(caches.rows[0])))
        if i % 5 == 0:
            reads.append(dram_read(run))
            peaks.append(peak(run, "bf16"))
    ns = {kind: float(np.median(found[1:])) * 1e9 for kind, found in times.items()}
    return {"ns": ns, "read_gb_s": float(np.median(reads)) / 1e9, "bf16_gmul_s": float(np.median(peaks)) / 1e9}


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "| tokens in the cache | threads | K-only: ns a token and layer, MiB a step | K and V | K-only is"
        " | K and V, prefetched | K-only is |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        mib = {kind: f"{nbytes * row['n_kv'] * result['layers'] / 2**20:,.0f}" for kind, nbytes in NBYTES.items()}
        ours, *others = (row["ns"][kind] for kind in NBYTES)
        cells = [f"{ours:.0f}, {mib['K-only']}"]
        for ns in others:
            cells += [f"{ns:.0f}, {mib['K and V']}", f"{ns / ours:.2f} × as fast"]
        lines.append(f"| {row['n_kv']:,} | {row['threads']} | {' | '.join(cells)} |")
    limits = []
    for n in sorted({row["threads"] for row in result["rows"]}):
        read, peak_ = (
            np.median([r[k] for r in result["rows"] if r["threads"] == n]) for k in ("read_gb_s", "bf16_gmul_s")
        )
        limits.append(f"DRAM {read:.1f} GB/s and bf16 {peak_:.0f} · 10⁹ products/s with {n} thread{'s' * (n > 1)}")
    return "\n".join([
        *lines, "",
        f"{result['cpu']}, {HEADS} heads, {RANK} + {ROT}, bf16, {result['layers']} layers; medians of"
        f" {result['rounds']}. Limits in the same run: {', '.join(limits)}.",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
