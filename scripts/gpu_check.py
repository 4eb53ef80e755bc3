"""What a machine with an NVIDIA card and CuPy can tell: python scripts/gpu_check.py [--quick] [--json FILE]

First every kernel against float64 (exit 1 if one is wrong), then times, with shares of the measured copy rate and of
what tensor cores multiply; then whole models (gpu_model.py). Needs what konly needs, 12 GB of disk, and no network.

    compute-sanitizer --tool racecheck python scripts/gpu_check.py --only decode --small

looks at one part of the comparisons, in small cases (memcheck and synccheck as well).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gpu_kernels as ops
from gpu_kernels import device, prefill
from gpu_kernels.attention import choose, geometry
from gpu_kernels.k_cache import TYPES_K, row_bytes
from gpu_kernels.matmul import takes_gemm
from gpu_kernels.quants import FORMATS

SCALE, EPS = 192**-0.5, 1e-6
NMSE = {"f16": 2e-6, "bf16": 1e-4, "q8": 5e-4}
L2_BYTES = 256 << 20  # more than any card's: what is timed walks through so many bytes before it meets them again
failures: list[str] = []
report: dict[str, Any] = {"correctness": [], "mla_decode": [], "matvec": [], "small": []}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    parser.add_argument("--kernels", action="store_true", help="no whole models (gpu_model.py)")
    parser.add_argument("--json", type=Path, help="write every number to this file")
    parser.add_argument("--only", nargs="+", choices=CHECKS, help="these comparisons, and no times")
    parser.add_argument("--small", action="store_true", help="short caches, few tokens and types: for a sanitizer")
    options = parser.parse_args()
    try:
        limits = device.check()
    except device.GpuError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    import cupy

    print(
        f"{limits.name}: {limits.n_sm} SMs, sm_{limits.sm}, {limits.shared_per_block:,} bytes of shared memory a block"
    )
    run = ops.Run()
    with run.stream:  # CuPy's own copies and fills as well
        for name in options.only or CHECKS:
            CHECKS[name](run, options.small)
        print(f"{len(report['correctness'])} comparisons, {len(failures)} failed {failures or ''}\n", flush=True)
        if options.only:
            return bool(failures)

        measured = ops.roofline.limits(run)
        rate = measured["read_gb_s"]
        report.update(device=limits.name, limits=measured, cupy=cupy.__version__)
        peaks = ", ".join(f"{kind} {2e-3 * measured[f'{kind}_gmul_s']:,.0f}" for kind in ("bf16", "int8", "f32"))
        print(f"copy {rate:,.0f} GB/s (bytes read and written); TFLOP/s out of registers: {peaks}\n", flush=True)
        time_decode(run, rate, options.quick)
        time_products(run, rate, options.quick)
        time_experts(run)
        time_prefill(run)
        time_small(run)
    if not options.kernels:
        import gpu_model

        with tempfile.TemporaryDirectory() as folder:
            report["models"] = gpu_model.run(Path(folder))
        failures.extend(report["models"]["failed"])
    if options.json:
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return bool(failures)


# ------------------------------------------------------------------------------------------------------ correctness


def compare(name: str, actual: Any, expected: np.ndarray, nmse: float) -> None:
    a, e = np.asarray(actual.get(), np.float64), np.asarray(expected, np.float64)
    squares = float((e * e).sum())
    found = float(((a - e) ** 2).sum()) / squares if squares else float(np.abs(a).max(initial=0.0))
    ok = a.shape == e.shape and found <= nmse  # NaN is not
    report["correctness"].append({"name": name, "nmse": found, "allowed": nmse, "ok": bool(ok)})
    if not ok:
        failures.append(f"{name}: nmse {found:.3g}, expected at most {nmse:g}")
        print("FAILED", failures[-1], flush=True)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def hadamard(rank: int) -> np.ndarray:
    block, h = rank & -rank, np.ones((1, 1))
    while len(h) < block:
        h = np.block([[h, h], [h, -h]])
    return np.kron(np.eye(rank // block), h / np.sqrt(block))


def stored(run: Any, type_k: str, rank: int, n_rot: int, n_ctx: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """(rows on the card, the exact float64 rows, the norm's weight) of random tokens without rotation."""
    kv_a = normal(n_ctx, rank + n_rot, seed=rank)
    gamma = np.random.default_rng(1).lognormal(0, 0.5, rank).astype(np.float32)
    cos_sin = np.concatenate([np.ones((n_ctx, n_rot // 2)), np.zeros((n_ctx, n_rot // 2))], 1).astype(np.float32)
    rows = run.upload(np.full((n_ctx, row_bytes(type_k, rank, n_rot)), 0xFF, np.uint8))
    args = [run.upload(a) for a in (kv_a, gamma, cos_sin, np.arange(n_ctx, dtype=np.int32))]
    ops.k_store(run, args[0], args[1], EPS, args[2], args[3], rows, type_k, rank, n_rot)
    run.sync()
    x = kv_a.astype(np.float64)
    latent = x[:, :rank] / np.sqrt((x[:, :rank] ** 2).mean(1, keepdims=True) + EPS) * gamma
    return rows, np.concatenate([latent, x[:, rank:]], 1), gamma


def attention(q: np.ndarray, rows: np.ndarray, n_kv: Sequence[int], rank: int) -> np.ndarray:
    out = np.zeros((*q.shape[:2], rank))
    for t, n in enumerate(n_kv):
        if n:
            s = q[t].astype(np.float64) @ rows[:n].T * SCALE
            p = np.exp(s - s.max(1, keepdims=True))
            out[t] = p / p.sum(1, keepdims=True) @ rows[:n, :rank]
    return out


def check_decode(run: Any, small: bool) -> None:
    shapes, n = ((512, 64), (256, 64), (256, 32), (128, 32)), 4133
    if small:
        shapes, n = ((512, 64), (128, 32)), 333
    for rank, n_rot in shapes:
        for type_k in TYPES_K:
            if type_k == "bf16" and not run.limits.has_bf16:
                continue
            rows, exact, gamma = stored(run, type_k, rank, n_rot, n + 67)
            for n_head, n_kv in ((16, [0]), (16, [1]), (16, [n]), (5, [n // 5, 0, 33]), (40, [n // 4]), (128, [n, 64])):
                try:
                    choose(run.limits, type_k, rank, n_rot, n_head * len(n_kv))
                except ValueError:
                    continue
                q = normal(len(n_kv), n_head, rank + n_rot, seed=2)
                q /= np.float32((q[0] @ exact[:500].T * SCALE).std())
                on_card = rows.copy()
                on_card[max(n_kv) :] = 0xFF  # NaN
                out = decode(
                    run, run.upload(q), on_card, type_k, run.upload(np.array(n_kv, np.int32)), rank, n_rot, gamma
                )
                expected = attention(q, exact, n_kv, rank)
                compare(f"mla_decode {type_k} {rank}+{n_rot} {n_head} heads {n_kv}", out, expected, NMSE[type_k])


def decode(run: Any, q: Any, rows: Any, type_k: str, n_kv: Any, rank: int, n_rot: int, gamma: np.ndarray) -> Any:
    out = run.upload(np.full((*q.shape[:2], rank), np.nan, np.float32))
    weight = run.upload(gamma)
    if type_k == "q8":
        ops.rotate_query(run, q, weight, rank)
    ops.mla_decode(run, q, rows, type_k, n_kv, rank, n_rot, SCALE, out)
    if type_k == "q8":
        ops.unrotate_output(run, out, weight)
    run.sync()
    return out


def check_rows_and_rotation(run: Any, small: bool) -> None:
    for rank, n_rot in ((512, 64),) if small else ((512, 64), (384, 64), (128, 32)):
        h = hadamard(rank)
        for type_k in TYPES_K:
            rows, exact, gamma = stored(run, type_k, rank, n_rot, 50)
            host = rows.get()
            used = np.ascontiguousarray(host[:, : 2 * (rank + n_rot)])
            if type_k == "f16":
                found = used.view(np.float16).astype(np.float64)
            elif type_k == "bf16":
                found = (used.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
            else:
                at = rank + 2 * n_rot
                scale = np.ascontiguousarray(host[:, at : at + 4]).view(np.float32)
                rope = np.ascontiguousarray(host[:, rank:at]).view(np.uint16).astype(np.uint32) << 16
                latent = (host[:, :rank].astype(np.float64) - 128) * scale @ h * gamma
                found = np.concatenate([latent, rope.view(np.float32)], 1)
            compare(f"k_store {type_k} {rank}+{n_rot}", SimpleNamespace(get=lambda f=found: f), exact, NMSE[type_k])
        q, x = normal(2, 3, rank + n_rot), normal(2, 3, rank, seed=1)
        on_card = [run.upload(a) for a in (q, x, gamma)]
        ops.rotate_query(run, on_card[0], on_card[2], rank)
        ops.unrotate_output(run, on_card[1], on_card[2])
        run.sync()
        compare(
            f"rotate_query {rank}", on_card[0], np.concatenate([q[..., :rank] * gamma @ h, q[..., rank:]], -1), 1e-12
        )
        compare(f"unrotate_output {rank}", on_card[1], x @ h * gamma, 1e-12)


def check_small(run: Any, small: bool) -> None:
    x, w, y = normal(5, 2048), normal(2048, seed=1), normal(5, 2048, seed=2)
    d_x, d_w, d_y, out = (run.upload(a) for a in (x, w, y, np.empty_like(x)))
    ops.rms_norm(run, d_x, d_w, EPS, out)
    run.sync()
    wide = x.astype(np.float64)
    compare("rms_norm", out, wide / np.sqrt((wide**2).mean(1, keepdims=True) + EPS) * w, 1e-12)
    ops.swiglu(run, d_x, d_y, out)
    run.sync()
    compare("swiglu", out, wide / (1 + np.exp(-wide)) * y, 1e-12)
    angle = np.array([0, 1, 4095, 7, 9])[:, None] * 10000.0 ** -(np.arange(0, 64, 2) / 64)
    cos_sin = run.upload(np.concatenate([np.cos(angle), np.sin(angle)], 1).astype(np.float32))
    heads = x.reshape(5, 32, 64)
    for neox in (False, True):
        turned = run.upload(heads)
        ops.rope(run, turned, cos_sin, turned, neox)
        run.sync()
        pairs = heads.reshape(5, 32, 2, 32).swapaxes(2, 3) if neox else heads.reshape(5, 32, 32, 2)
        z = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)[:, None]
        parts = [z.real, z.imag]
        expected = np.concatenate(parts, -1) if neox else np.stack(parts, -1).reshape(5, 32, 64)
        compare(f"rope neox={neox}", turned, expected, 1e-11)
    logits = normal(6, 160)
    ids, weights = run.upload(np.zeros((6, 6), np.int32)), run.upload(np.zeros((6, 6), np.float32))
    ops.route(run, run.upload(logits), None, "softmax", 1, 1, False, 1.0, ids, weights)
    run.sync()
    best = np.argsort(-logits, axis=1, kind="stable")[:, :6]
    probs = np.exp(logits.astype(np.float64))
    probs /= probs.sum(1, keepdims=True)
    compare("route ids", ids, best, 0.0)
    compare("route weights", weights, np.take_along_axis(probs, best, 1), 1e-11)


def random_weight(run: Any, type_id: int, *shape: int) -> Any:
    """A weight of random bytes; its f16 scales (or values) are sane numbers."""
    f = FORMATS[type_id]
    n = int(np.prod(shape)) // f.block
    rng = np.random.default_rng(type_id)
    blocks = rng.integers(0, 256, (n, f.nbytes), dtype=np.uint8)
    if f.is_float:
        x = rng.standard_normal((n, f.block), dtype=np.float32)
        narrow = {"F32": x, "F16": x.astype(np.float16), "BF16": (x.view(np.uint32) >> 16).astype(np.uint16)}
        blocks = narrow[f.name].view(np.uint8)
    scales = {
        "Q2_K": (80, 82),
        "Q3_K": (108,),
        "Q6_K": (208,),
        **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    }
    for at in () if f.is_float else scales.get(f.name, (0,)):
        blocks[:, at : at + 2] = (rng.random((n, 1)) * 0.01).astype(np.float16).view(np.uint8)
    kind = SimpleNamespace(id=type_id)
    data = blocks.reshape(*shape[:-1], -1)
    return ops.upload(run, SimpleNamespace(type=kind, shape=shape, data=data))


def check_products(run: Any, small: bool) -> None:
    """Against the weights as embed_rows decodes them, which the tests compare with gguf bit by bit."""
    for f in FORMATS.values():
        if small and f.name not in ("F32", "F16", "Q8_0", "Q4_K", "Q6_K"):
            continue
        w, k = random_weight(run, f.type_id, 500, 1536), 1536
        values = run.upload(np.empty((500, k), np.float32))
        ops.embed_rows(run, w, run.upload(np.arange(500, dtype=np.int32)), values)
        alone = []
        for n_tok in (1, 6, 17, 70) if small else (1, 6, 17, 70, 300):
            x = normal(n_tok, k)
            out = run.upload(np.full((n_tok, 500), np.nan, np.float32))
            ops.matmul(run, w, run.upload(x), out)
            run.sync()
            expected = x.astype(np.float64) @ values.get().astype(np.float64).T
            allowed = 2.5e-5 if takes_gemm(run.limits, f.type_id, n_tok) else 1e-11 if f.is_float else 1.5e-4
            compare(f"matmul {f.name} {n_tok} tokens", out, expected, allowed)
            alone.append(out)
        x, out = normal(40, 8, k, seed=3), run.upload(np.full((40, 8, 100), np.nan, np.float32))
        heads = ops.quants.Weight(w.type, (5, 100, k), w.data, w.planes)
        ops.matmul_heads(run, heads, run.upload(x)[:, :5], out[:, 3:])
        run.sync()
        per_head = values.get().astype(np.float64).reshape(5, 100, k)
        expected = np.einsum("thk,hmk->thm", x[:, :5].astype(np.float64), per_head)
        allowed = 2.5e-5 if takes_gemm(run.limits, f.type_id, 40) else 1e-11
        compare(f"matmul_heads {f.name} 40 tokens", out[:, 3:], expected, allowed)
        out = run.upload(np.empty((1, 500), np.float32))
        ops.matmul(run, w, run.upload(normal(6, k)[:1]), out)
        run.sync()
        compare(f"matmul {f.name}: a token has the bits it has alone", out, alone[1][:1].get(), 0.0)


def check_experts(run: Any, small: bool) -> None:
    n_expert, n_embd, n_ff = 9, 512, 256
    for name, types in (("F32", (0, 0, 0)), ("Q4_K Q6_K", (12, 12, 14)), ("BF16 F16 Q5_0", (30, 1, 6))):
        shapes = ((n_ff, n_embd), (n_ff, n_embd), (n_embd, n_ff))
        mats = [random_weight(run, t, n_expert, *shape) for t, shape in zip(types, shapes)]
        values = []
        for w in mats:
            _, m, k = w.shape
            flat = ops.quants.Weight(w.type, (n_expert * m, k), w.data, w.planes)
            decoded = run.upload(np.empty((n_expert * m, k), np.float32))
            ops.embed_rows(run, flat, run.upload(np.arange(n_expert * m, dtype=np.int32)), decoded)
            run.sync()
            values.append(decoded.get().astype(np.float64).reshape(w.shape))
        for n_tok in (2, 70) if small else (2, 70, 700):
            x, ids = normal(n_tok, n_embd) * 0.01, chosen(n_tok, n_expert - 1, 3)  # the last has no token
            weights, out = np.abs(normal(n_tok, 3)), run.upload(np.zeros((n_tok, n_embd), np.float32))
            ops.experts(run, run.upload(x), run.upload(ids), run.upload(weights), *mats, out)
            run.sync()
            expected = np.zeros((n_tok, n_embd))
            for e in range(n_expert):
                token, slot = np.nonzero(ids == e)
                gate, up = x[token] @ values[0][e].T, x[token] @ values[1][e].T
                expected[token] += weights[token, slot, None] * (gate / (1 + np.exp(-gate)) * up @ values[2][e].T)
            compare(f"experts {name} {n_tok} tokens", out, expected, 1e-10 if name == "F32" else 1e-3)


def chosen(n_tok: int, n_expert: int, n_used: int) -> np.ndarray:
    """Random ids, all different for a token."""
    return np.ascontiguousarray(np.argsort(normal(n_tok, n_expert, seed=7), axis=1)[:, :n_used], np.int32)


def check_prefill(run: Any, small: bool) -> None:
    for case in ((16, 128, 128, 40, 300), (4, 192, 256, 400, 150), (16, 128, 128, 3000, 20)):
        n_head, nope, n_v, n_past, n_tok = case
        if small:
            n_head, n_past, n_tok = 4, min(n_past, 600), min(n_tok, 70)
        _check_prefill(run, n_head, nope, n_v, n_past, n_tok)


def _check_prefill(run: Any, n_head: int, nope: int, n_v: int, n_past: int, n_tok: int) -> None:
    rank, n_rot = 512, 64
    w_uk, w_uv = random_weight(run, 1, n_head, rank, nope), random_weight(run, 1, n_head, n_v, rank)
    values = []
    for w in (w_uk, w_uv):
        _, m, k = w.shape
        decoded = run.upload(np.empty((n_head * m, k), np.float32))
        flat = ops.quants.Weight(w.type, (n_head * m, k), w.data, w.planes)
        ops.embed_rows(run, flat, run.upload(np.arange(n_head * m, dtype=np.int32)), decoded)
        run.sync()
        values.append(decoded.get().astype(np.float64).reshape(w.shape))
    for type_k in TYPES_K if run.limits.has_bf16 else ("f16", "q8"):
        rows, exact, gamma = stored(run, type_k, rank, n_rot, n_past + n_tok)
        q = normal(n_tok, n_head, nope + n_rot, seed=3)
        q[:, :, :nope] *= rank**-0.5
        out = run.upload(np.full((n_tok, n_head, n_v), np.nan, np.float32))
        ops.mla_prefill(
            run, run.upload(q), rows, type_k, n_past, rank, n_rot, SCALE, w_uk, w_uv, run.upload(gamma), out
        )
        run.sync()
        absorbed = np.einsum("thd,hcd->thc", q[:, :, :nope].astype(np.float64), values[0])
        absorbed = np.concatenate([absorbed, q[:, :, nope:]], -1)
        latent = attention(absorbed, exact, list(range(n_past + 1, n_past + n_tok + 1)), rank)
        mha = prefill.choose(run.limits, type_k, w_uk.shape, n_rot, n_v, n_tok, n_past)
        allowed = NMSE[type_k] if mha else 1e-3
        expected = np.einsum("thc,hvc->thv", latent, values[1])
        compare(f"mla_prefill {type_k}, {n_head} heads, {n_tok} tokens after {n_past}", out, expected, allowed)


CHECKS = {
    "rows": check_rows_and_rotation,
    "decode": check_decode,
    "small": check_small,
    "products": check_products,
    "experts": check_experts,
    "prefill": check_prefill,
}


# ------------------------------------------------------------------------------------------------------------ times


def seconds(run: Any, calls: Sequence[Callable[[], None]], repeats: int = 7) -> float:
    """Of one call, from a captured graph of all of them: the median of `repeats` launches."""
    import cupy

    for call in calls:
        call()
    tape = run.take()
    for _ in range(2):  # compiled, then captured
        run.replay(tape)
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    times = []
    for _ in range(repeats + 2):
        start.record(run.stream)
        for part in tape.parts:
            part()
        end.record(run.stream)
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end) / 1e3 / len(calls))
    return float(np.median(times[2:]))


def time_decode(run: Any, rate: float, quick: bool) -> None:
    import cupy

    rank, n_rot = 512, 64
    print("mla_decode, one token, 512 + 64, with its combine, from a graph")
    print("| type_k | heads | n_kv | lanes a block, tokens a tile | splits | µs | GB/s of K | of copy | TFLOP/s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for type_k in TYPES_K:
        some, _, _ = stored(run, type_k, rank, n_rot, 8192)
        for n_ctx in (4096, 32_768, 163_840):
            n_sets = max(1, -(-L2_BYTES // (n_ctx * some.shape[1])))
            sets = [cupy.concatenate([some] * -(-n_ctx // 8192))[:n_ctx] for _ in range(n_sets)]
            for n_head in (16, 128) if quick else (16, 32, 64, 128):
                q = run.upload(3 * normal(1, n_head, rank + n_rot))
                n_kv, out = run.upload(np.array([n_ctx], np.int32)), run.upload(np.zeros((1, n_head, rank), np.float32))
                cupy.cuda.Device().synchronize()
                calls = [
                    lambda rows=rows, q=q, n_kv=n_kv, out=out, type_k=type_k: ops.mla_decode(
                        run, q, rows, type_k, n_kv, rank, n_rot, SCALE, out
                    )
                    for rows in sets
                ] * max(1, 8 // n_sets)
                t = seconds(run, calls)
                variant = choose(run.limits, type_k, rank, n_rot, n_head)
                splits, _ = geometry(run.limits, variant, n_head, n_ctx)
                gb_s, tflops = n_ctx * some.shape[1] / t / 1e9, 2 * n_head * n_ctx * (2 * rank + n_rot) / t / 1e12
                report["mla_decode"].append(
                    {
                        "type_k": type_k,
                        "n_head": n_head,
                        "n_kv": n_ctx,
                        "us": t * 1e6,
                        "gb_s": gb_s,
                        "share": gb_s / rate,
                    }
                )
                print(
                    f"| {type_k} | {n_head} | {n_ctx:,} | {variant.lanes}, {variant.tokens} | {splits} "
                    f"| {t * 1e6:.1f} | {gb_s:,.0f} | {gb_s / rate:.0%} | {tflops:.0f} |", flush=True,
                )  # fmt: skip
            del sets
    print()


def time_products(run: Any, rate: float, quick: bool) -> None:
    m, k = 8192, 4096
    print(f"matmul, ({m}, {k}), with the activations' quantisation or rounding, from a graph")
    print("| type | tokens | µs | GB/s of weights | of copy | TFLOP/s |\n|---|---|---|---|---|---|")
    for f in FORMATS.values():
        nbytes = m * k // f.block * f.nbytes
        n_sets = max(1, min(16, -(-L2_BYTES // nbytes)))
        first = random_weight(run, f.type_id, m, k)
        weights = [first] + [
            ops.quants.Weight(first.type, first.shape, first.data.copy(), first.planes) for _ in range(n_sets - 1)
        ]
        for n_tok in (1, 512) if quick else (1, 4, 16, 32, 64, 512, 4096):
            x, out = run.upload(normal(n_tok, k)), run.upload(np.zeros((n_tok, m), np.float32))
            t = seconds(run, [lambda w=w, x=x, out=out: ops.matmul(run, w, x, out) for w in weights])
            gb_s = nbytes / t / 1e9
            tflops = 2 * m * k * n_tok / t / 1e12
            report["matvec"].append({"type": f.name, "n_tok": n_tok, "us": t * 1e6, "gb_s": gb_s, "share": gb_s / rate})
            row = f"| {f.name} | {n_tok} | {t * 1e6:.1f} | {gb_s:,.0f} | {gb_s / rate:.0%} | {tflops:.1f} |"
            print(row, flush=True)
    print()


def time_experts(run: Any) -> None:
    n_expert, n_used, n_embd, n_ff = 64, 6, 2048, 1408
    print(f"experts, {n_used} of {n_expert}, {n_embd} and {n_ff} values, from a graph")
    print("| gate and up, down | tokens | µs | TFLOP/s |\n|---|---|---|---|")
    for name, types in (("Q4_K, Q8_0", (12, 12, 8)), ("Q8_0, Q8_0", (8, 8, 8)), ("BF16, BF16", (30, 30, 30))):
        shapes = ((n_ff, n_embd), (n_ff, n_embd), (n_embd, n_ff))
        mats = [random_weight(run, t, n_expert, *shape) for t, shape in zip(types, shapes)]
        for n_tok in (1, 16, 32, 512, 4096):
            x, out = run.upload(normal(n_tok, n_embd)), run.upload(np.zeros((n_tok, n_embd), np.float32))
            ids, weights = run.upload(chosen(n_tok, n_expert, n_used)), run.upload(np.abs(normal(n_tok, n_used)))
            args = (run, x, ids, weights, *mats, out)
            t = seconds(run, [lambda args=args: ops.experts(*args)] * 2)
            report["small"].append({"name": f"experts {name} {n_tok} tokens", "us": t * 1e6})
            tflops = 6 * n_tok * n_used * n_embd * n_ff / t / 1e12
            print(f"| {name} | {n_tok} | {t * 1e6:,.0f} | {tflops:.1f} |", flush=True)
    print()


def time_prefill(run: Any) -> None:
    rank, n_rot = 512, 64
    print("mla_prefill, 512 + 64, Q8_0 up-projections\n| heads | tokens after | type_k | µs |\n|---|---|---|---|")
    for n_head, nope, n_v, n_past, n_tok in (
        (16, 128, 128, 0, 512),
        (16, 128, 128, 7680, 512),
        (16, 128, 128, 32_256, 512),
        (20, 192, 256, 7680, 512),
        (128, 128, 128, 3584, 512),
        (16, 128, 128, 7680, 64),
    ):
        w_uk, w_uv = random_weight(run, 8, n_head, rank, nope), random_weight(run, 8, n_head, n_v, rank)
        q, out = run.upload(normal(n_tok, n_head, nope + n_rot)), run.upload(np.zeros((n_tok, n_head, n_v), np.float32))
        for type_k in TYPES_K if run.limits.has_bf16 else ("f16", "q8"):
            rows, _, gamma = stored(run, type_k, rank, n_rot, n_past + n_tok)
            args = (type_k, n_past, rank, n_rot, SCALE, w_uk, w_uv, run.upload(gamma), out)

            def call(q: Any = q, rows: Any = rows, args: Any = args) -> None:
                ops.mla_prefill(run, q, rows, *args)

            t = seconds(run, [call] * 2)
            name = f"{n_head} heads of {nope} and {n_v}, {n_tok} tokens after {n_past}"
            report["small"].append({"name": f"mla_prefill {type_k} {name}", "us": t * 1e6})
            print(f"| {n_head} of {nope}, {n_v} | {n_tok} after {n_past:,} | {type_k} | {t * 1e6:,.0f} |", flush=True)
    print()


def time_small(run: Any) -> None:
    x, w, out = run.upload(normal(1, 4096)), run.upload(normal(4096)), run.upload(normal(1, 4096))
    q, gamma = run.upload(normal(1, 128, 576)), run.upload(normal(512))
    cases = {
        "rms_norm 4096": lambda: ops.rms_norm(run, x, w, EPS, out),
        "swiglu 4096": lambda: ops.swiglu(run, x, x, out),
        "rotate_query 128 heads": lambda: ops.rotate_query(run, q, gamma, 512),
    }
    print("| one token | µs |\n|---|---|")
    for name, call in cases.items():
        t = seconds(run, [call] * 50)
        report["small"].append({"name": name, "us": t * 1e6})
        print(f"| {name} | {t * 1e6:.2f} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
