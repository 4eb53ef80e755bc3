"""Whole models on an NVIDIA card: python scripts/gpu_model.py [--model FILE] [--json FILE]; gpu_check.py calls it, too.

First the card against the CPU: logits, and sessions that move from one to the other. Then times of a V2-Lite-shaped
Q4_K_M model, which is made here from random weights (10 GB), with and without CUDA graphs, and with its experts in RAM.
Last the plan of DeepSeek-V3 with 160k tokens on a card of 32 GB, from a file that is only a head.

With --v3 nothing but DeepSeek-V3's shape in Q6_K with 16 of its 256 experts, of which a token takes 8 as there: 48 GB
of disk, and a card of 80 GB. A token reads what it reads of the whole model, and with its experts in RAM the card
holds what it holds of that.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from make_synthetic import KINDS, write

from engine import Engine, hybrid
from engine.k_cache import TYPES_K
from engine.plan_card import plan_card

DEPTHS = (0, 4096, 32_768, 163_840 - 4096)
PROMPTS = (512, 4096)
N_REAL = 512  # tokens that are computed; their rows are repeated up to a depth
TOLERANCE = 0.1  # of the logits' rms, 3 random layers; 0.02 to 0.03 were found
TOLD, LEAD = 60, 0.1  # tokens after a session; of logits
STORY = "Once upon a time there was a little fox who"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="time this file instead of one that is made here")
    parser.add_argument("--v3", action="store_true", help="time DeepSeek-V3's shape with few experts instead")
    parser.add_argument("--json", type=Path, help="write every number to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = run_v3(Path(folder), options.model) if options.v3 else run(Path(folder), options.model)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return bool(report["failed"])


def run(folder: Path, model: Path | None = None) -> dict[str, Any]:
    """{"failed": names, "checks", "times", "plan"}; tables on stdout."""
    report: dict[str, Any] = {"failed": [], "checks": [], "times": []}
    small = folder / "v2lite-3.gguf"
    write(small, replace(KINDS["v2lite"], n_layer=3), "q4_k_m")
    for type_k in TYPES_K:
        check_logits(report, small, type_k)
        check_sessions(report, folder / "session", type_k)
    small.unlink()
    print(
        f"{len(report['checks'])} comparisons with the CPU, {len(report['failed'])} failed {report['failed'] or ''}\n"
    )
    if model is None:
        model = folder / "v2lite.gguf"
        write(model, KINDS["v2lite"], "q4_k_m")
    time_model(report, model)
    report["plan"] = plan_of_v3(folder / "v3.gguf")
    return report


def run_v3(folder: Path, model: Path | None = None) -> dict[str, Any]:
    """{"failed": names, "times", "memory …": planned and taken bytes}; a table on stdout."""
    report: dict[str, Any] = {"failed": [], "times": []}
    if model is None:
        model = folder / "v3-16.gguf"
        write(model, replace(KINDS["v3"], n_expert=16), "q6_k")
    print("| DeepSeek-V3, 16 experts | depth | ms a token | without graph | t/s of prompts |\n|---|---|---|---|---|")
    options: dict[str, Any] = {"n_ctx": 163_840, "type_k": "f16", "n_ubatch": 4096}
    for experts in (None, "cpu"):
        with opened(report, model, experts=experts, **options) as gpu:
            for depth in DEPTHS if experts is None else DEPTHS[::3]:
                time_depth(report, gpu, f"experts on {experts or 'the card'}", depth, PROMPTS, n_gen=12, n_prompts=2)
            planned = plan_card(str(model), "gpu", experts, **options)
            note_memory(report, f"experts {experts}", planned)
    return report


# ------------------------------------------------------------------------------------------------------ correctness


def check_logits(report: dict[str, Any], path: Path, type_k: str) -> None:
    """A prompt and tokens after it, on the card, with experts in RAM, and with experts streamed, against the CPU."""
    ids = np.random.default_rng(3).integers(0, 100_000, 700)
    steps = (ids[:300], ids[300:301], ids[301:302], ids[302:310], ids[310:])
    with closing(Engine(path, n_ctx=1024, type_k=type_k)) as cpu:
        expected = [cpu.step(some) for some in steps]
    for name, experts, stream_from in (
        ("card", None, 256),
        ("experts in RAM", "cpu", 1 << 30),
        ("streamed", "cpu", 17),
    ):
        hybrid.STREAM_TOKENS, usual = stream_from, hybrid.STREAM_TOKENS
        with closing(Engine(path, n_ctx=1024, type_k=type_k, backend="gpu", experts=experts)) as gpu:
            found = [gpu.step(some) for some in steps]
        hybrid.STREAM_TOKENS = usual
        worst = max(float(np.sqrt(((a - b) ** 2).mean() / (b**2).mean())) for a, b in zip(found, expected))
        note(report, f"logits, {type_k}, {name}", worst, worst <= TOLERANCE)


def check_sessions(report: dict[str, Any], path: Path, type_k: str) -> None:
    """The default model tells a story: begun on one, saved, opened on the other, which goes on with the same tokens.

    But for toss-ups: where the lead of the most probable token is less than LEAD, the other may see it otherwise.
    """
    with closing(Engine(type_k=type_k)) as cpu, closing(Engine(type_k=type_k, backend="gpu")) as gpu:
        for start, end, name in ((cpu, gpu, "CPU to card"), (gpu, cpu, "card to CPU")):
            start.clear()
            logits = start.step(start.tokenize(STORY))
            for _ in range(20):
                logits = start.step([int(logits.argmax())])
            start.save(path)
            end.load(path)
            n_same = n_sure = n_wrong = 0
            for _ in range(TOLD):
                token = int(logits.argmax())
                logits, other = start.step([token]), end.step([token])
                second, first = np.sort(logits)[-2:]
                same = int(other.argmax()) == int(logits.argmax())
                sure = bool(first - second > LEAD)
                n_same, n_sure, n_wrong = n_same + same, n_sure + sure, n_wrong + (sure and not same)
            print(f"{n_same} of {TOLD} tokens are the same, {n_sure} of them are no toss-ups; ", end="")
            note(report, f"session, {type_k}, {name}", n_wrong, not n_wrong)


def note(report: dict[str, Any], name: str, value: float, ok: bool) -> None:
    report["checks"].append({"name": name, "value": value, "ok": ok})
    if not ok:
        report["failed"].append(name)
    print(f"{name}: {value:.4g}{'' if ok else '   FAILED'}", flush=True)


# ------------------------------------------------------------------------------------------------------------ times


def time_model(report: dict[str, Any], path: Path) -> None:
    print("| V2-Lite Q4_K_M | depth | ms a token | without graph |" + "".join(f" t/s of {n:,} |" for n in PROMPTS))
    print("|---|---|---|---|" + "---|" * len(PROMPTS))
    for type_k in ("f16", "q8"):
        with opened(report, path, n_ctx=163_840, type_k=type_k, n_ubatch=4096) as gpu:
            planned = plan_card(str(path), n_ctx=163_840, type_k=type_k, n_ubatch=4096)
            for depth in DEPTHS:
                time_depth(report, gpu, f"card, {type_k}", depth, PROMPTS)
            note_memory(report, type_k, planned)
    print()
    for name, stream_from in (("experts by the CPU", 1 << 30), ("experts streamed", 17)):
        hybrid.STREAM_TOKENS, usual = stream_from, hybrid.STREAM_TOKENS
        with opened(report, path, n_ctx=40_960, type_k="f16", n_ubatch=4096, experts="cpu") as gpu:
            for depth in (0, 32_768):
                time_depth(report, gpu, name, depth, (64, 128, 256, 512, 4096), n_gen=16)
        hybrid.STREAM_TOKENS = usual


def note_memory(report: dict[str, Any], name: str, planned: dict[str, Any] | None) -> None:
    import cupy

    assert planned is not None
    taken = cupy.get_default_memory_pool().used_bytes()
    report[f"memory {name}"] = planned["total"], taken
    print(f"planned {planned['total'] / 2**30:.2f} GiB, taken {taken / 2**30:.2f}", flush=True)


@contextmanager
def opened(report: dict[str, Any], path: Path, **options: Any) -> Iterator[Engine]:
    began = time.perf_counter()
    with closing(Engine(path, backend="gpu", **options)) as gpu:
        report["times"].append({"name": "open", "s": time.perf_counter() - began, **options})
        yield gpu


def time_depth(
    report: dict[str, Any], gpu: Engine, name: str, depth: int, prompts: tuple[int, ...], n_gen: int = 32,
    n_prompts: int = 3,
) -> None:  # fmt: skip
    ids = np.random.default_rng(1).integers(0, gpu.hparams.n_vocab, max(*prompts, N_REAL))
    if depth == 0:
        gpu.step(ids[:N_REAL])
        for _ in range(3):
            gpu.step(ids[:1])
    else:
        gpu.cache.repeat(N_REAL, depth)

    def timed(n: int) -> float:
        gpu.cache.n_kv = depth
        began = time.perf_counter()
        gpu.step(ids[:n])
        return time.perf_counter() - began

    tape = gpu._recordings[1, 1][1]
    decode = median(timed(1) for _ in range(n_gen))
    plain = []
    for _ in range(8):
        tape.replayed = False
        plain.append(timed(1))
    rates = {n: n / min(timed(n) for _ in range(n_prompts)) for n in prompts}
    row = {"name": name, "depth": depth, "decode_ms": 1e3 * decode, "plain_ms": 1e3 * median(plain), "prompts": rates}
    report["times"].append(row)
    cells = " | ".join(f"{n:,}: {rate:,.0f}" for n, rate in rates.items())
    print(f"| {name} | {depth:,} | {row['decode_ms']:.2f} | {row['plain_ms']:.2f} | {cells} |", flush=True)


def plan_of_v3(path: Path) -> dict[str, Any]:
    """DeepSeek-V3 in Q6_K, 160k tokens, 4,096 together, experts in RAM, on a card of 32 GB."""
    write(path, KINDS["v3"], "q6_k", sparse=True)
    plans: dict[str, Any] = {}
    for type_k in ("f16", "q8"):
        told = plan_card(str(path), "gpu", "cpu", ram=32 * 10**9, n_ctx=163_840, type_k=type_k, n_ubatch=4096)
        assert told is not None
        plans[type_k] = told
        parts = ", ".join(f"{part} {n / 2**30:.2f}" for part, n in told["on_card"].items())
        verdict = "fits" if told["fits"] else "does not fit"
        print(f"DeepSeek-V3 Q6_K, 160k tokens, {type_k}: {told['total'] / 2**30:.2f} GiB ({parts}): {verdict} 32 GB")
    return plans


if __name__ == "__main__":
    sys.exit(main())
