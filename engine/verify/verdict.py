"""verify(): is this file good, and do this machine's kernels compute what they should? The answer of `konly verify`.

    file      weights that are NaN, infinite, absurd or missing (weights.py). If there are any, that is the verdict
    layers    a prompt through the engine's kernels, op by op, twice: as a prompt (MHA mode, panels) and token by token
              (MQA mode, dots). From each hidden state that came out, engine/reference.py computes the next part, the
              attention or the feed-forward of a layer, in float64 by the long way: NMSE of what the part adds
    steps     the same prompt as the engine really runs it, recorded and on all threads: the same bits
    ops       in a layer that is off, each op is compared with float64 over its own inputs, and the worst one is named

Because every part starts from the engine's own hidden state, its error is its own and layers do not add up; `drift` is
the NMSE of the hidden state along float64's own path, where they do, and where experts change sides. It is told, and
decides nothing. If the router's logits and the choice are right, other experts than float64's can only be near equals.
Weights are dequantised a layer at a time, of experts one at a time, the output some rows at a time.

Source: the oracle is DeepSeek-V2 (arXiv 2405.04434) §2.1, as engine/reference.py has it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import reference
from ..describe import used_tensors
from ..engine import Engine
from ..errors import EngineError
from ..k_cache import KCache, KCacheLayout
from ..model import Model
from ..step import Buffers, Step
from ..stream import Stream
from .ops import EXACT, ROUNDED, Watch, Watched, nmse, tolerance_of
from .weights import bad_weights

MODES = ("prompt", "token")  # one step of all tokens in MHA mode; a step for each in MQA mode
PARTS = ("attention", "router", "ffn")  # of a layer
PART = 4.0  # times what one op may be off by: a part is several
OUTPUT_ROWS = 8192  # of the output matrix, dequantised together

Progress = Callable[[int, int, str], None]


def verify(engine: Engine, tokens: Sequence[int], progress: Progress | None = None) -> dict[str, Any]:
    """Plain data, ready for JSON.

    {"verdict": "good" | "bad file" | "bad kernels", "problems": [sentence, …], "tokens": n,
     "embedding": NMSE,
     "layers": [{"layer", "attention", "router", "ffn": NMSE, the greater of both modes, "tolerance": {the same three},
                 "drift", "rerouted": tokens left out of "ffn", of whose experts rounding exchanged some}],
     "logits": {"nmse", "tolerance", "drift", "same_top": share of tokens with the same most probable one}}
    For a bad file there are no figures.
    """
    ids = np.asarray(tokens, np.int32)
    if not len(ids):
        raise EngineError("verify: the prompt has no tokens")
    report: dict[str, Any] = {"verdict": "good", "problems": [], "tokens": len(ids), "layers": [], "logits": {}}
    in_mib: Progress | None = progress and (lambda done, total, name: progress(done >> 20, (total >> 20) + 1, name))
    bad = bad_weights(used_tensors(engine.model.file, engine.hparams), in_mib)
    if bad:
        problems = [f"tensor {one['tensor']!r} ({one['type']}): {one['what']}" for one in bad]
        return report | {"verdict": "bad file", "problems": problems}
    oracle = _Oracle(engine, ids)
    report["embedding"] = oracle.embedding()
    n_layer = engine.hparams.n_layer
    for il in range(n_layer):
        if progress is not None:
            progress(il, n_layer + 1, f"layer {il}")
        report["layers"].append(oracle.layer(il))
    if progress is not None:
        progress(n_layer, n_layer + 1, "output")
    report["logits"] = oracle.logits()
    report["problems"] = _problems(oracle, report) or _other_bits(engine, ids, oracle)
    if report["problems"]:
        report["verdict"] = "bad kernels"
    return report


def watch(model: Model, type_k: str, ids: np.ndarray, mode: str, check: Sequence[int] = ()) -> tuple[Watch, np.ndarray]:
    """The prompt through the kernels, op by op, from an empty cache: what was seen, and logits (n_tok, n_vocab)."""
    hp, n = model.hparams, len(ids)
    cache = KCache(KCacheLayout(hp.n_layer, n, hp.kv_lora_rank, hp.n_rot, type_k))
    run, buffers, seen = model.ops.Run(model.n_threads), Buffers(n), Watch(model.weights, check)
    ops: Any = Watched(model.ops, seen)
    logits = np.empty((n, hp.n_vocab), np.float32)
    size = n if mode == "prompt" else 1
    for at in range(0, n, size):
        some = slice(0, size)
        step = Step(ops, run, buffers, hp, [(some, cache.rows)], type_k, cache.n_kv, mode == "prompt")
        step.fill(some, ids[at : at + size], cache)
        model.weights.forward(step, logits[at : at + size])
        cache.append(size)
    return seen, logits


class _Oracle:
    """Both runs of the engine, and float64 beside them, layer by layer."""

    def __init__(self, engine: Engine, ids: np.ndarray):
        self.model, self.hparams, self.type_k, self.ids = engine.model, engine.hparams, engine.type_k, ids
        self.tensors = engine.model.file.tensors
        self.runs = {mode: watch(self.model, self.type_k, ids, mode) for mode in MODES}
        self.x = reference.dequantise(self.tensors["token_embd.weight"], np.asarray(ids, np.int64))  # its own path
        self.round_row = {"f16": reference.round_f16, "bf16": reference.round_bf16}.get(self.type_k)

    def embedding(self) -> float:
        return max(nmse(seen.state(0, "in"), self.x) for seen, _ in self.runs.values())

    def layer(self, il: int) -> dict[str, Any]:
        hp, n = self.hparams, len(self.ids)
        w = _Remembering(self.tensors, il)
        entered = [self.x, *(seen.state(il, "in").astype(np.float64) for seen, _ in self.runs.values())]
        adds = [self._attention(w, x) for x in entered]
        middle = [self.x + adds[0], *(seen.state(il, "mid").astype(np.float64) for seen, _ in self.runs.values())]
        record: reference.Record = {}
        y = reference.rms_norm(np.concatenate(middle), w["ffn_norm"], hp.rms_eps)
        ffn = reference.ffn(hp, w, y, record)
        row: dict[str, Any] = {"layer": il, **dict.fromkeys(PARTS, 0.0), "rerouted": 0}
        for i, (seen, _) in enumerate(self.runs.values(), 1):
            some = slice(i * n, (i + 1) * n)
            row["attention"] = max(row["attention"], nmse(middle[i] - entered[i], adds[i]))
            kept = np.ones(n, bool)
            if (routing := seen.routing(il)) is not None:
                logits, chosen, off = routing
                row["router"] = max(row["router"], off, nmse(logits, record[il, "router_logits"][some]))
                theirs = record[il, "experts"][some]
                kept = (np.sort(chosen, axis=1) == np.sort(theirs, axis=1)).all(axis=1)
                row["rerouted"] += int((~kept).sum())
            found = seen.state(il, "out").astype(np.float64) - middle[i]
            row["ffn"] = max(row["ffn"], nmse(found[kept], ffn[some][kept]))
        self.x = middle[0] + ffn[:n]
        row["drift"] = max(nmse(seen.state(il, "out"), self.x) for seen, _ in self.runs.values())
        row["tolerance"] = self._tolerances(il)
        return row

    def logits(self) -> dict[str, Any]:
        hp, n = self.hparams, len(self.ids)
        last = hp.n_layer - 1
        x = np.concatenate([self.x, *(seen.state(last, "out").astype(np.float64) for seen, _ in self.runs.values())])
        y = reference.rms_norm(x, reference.dequantise(self.tensors["output_norm.weight"]), hp.rms_eps)
        output = self.tensors.get("output.weight", self.tensors["token_embd.weight"])
        pieces = [
            y @ reference.dequantise(output, slice(at, at + OUTPUT_ROWS)).T for at in range(0, hp.n_vocab, OUTPUT_ROWS)
        ]
        exact = np.concatenate(pieces, axis=1)
        found = [logits for _, logits in self.runs.values()]
        return {
            "nmse": max(nmse(logits, exact[i * n : (i + 1) * n]) for i, logits in enumerate(found, 1)),
            "tolerance": tolerance_of(output),
            "drift": max(nmse(logits, exact[:n]) for logits in found),
            "same_top": float(np.mean([logits.argmax(1) == exact[:n].argmax(1) for logits in found])),
        }

    def _attention(self, w: reference.Layer, x: reference.Array) -> reference.Array:
        hp = self.hparams
        rows: Any = {w.il: np.empty((0, hp.kv_lora_rank + hp.n_rot))}
        return reference.mla(hp, w, reference.rms_norm(x, w["attn_norm"], hp.rms_eps), rows, self.round_row, {})

    def _tolerances(self, il: int) -> dict[str, float]:
        def of(starts: Sequence[str]) -> float:
            names = [f"blk.{il}.{start}" for start in starts]
            return PART * tolerance_of(*(t for name, t in self.tensors.items() if name.startswith(tuple(names))))

        attention = PART * ROUNDED if self.type_k == "q8" else of(["attn_q", "attn_k", "attn_v", "attn_output"])
        return {"attention": attention, "router": of(["ffn_gate_inp"]), "ffn": of(["ffn_"])}


class _Remembering(reference.Layer):
    """A layer whose matrices are dequantised once; they go when it goes."""

    def __init__(self, tensors: reference.Weights, il: int) -> None:
        super().__init__(tensors, il)
        self._known: dict[str, reference.Array] = {}

    def __getitem__(self, name: str) -> reference.Array:
        if not name.startswith("attn_"):
            return super().__getitem__(name)
        if name not in self._known:
            self._known[name] = super().__getitem__(name)
        return self._known[name]


def _problems(oracle: _Oracle, report: dict[str, Any]) -> list[str]:
    """A sentence for each part that is off, naming the op that is to blame."""
    off = [
        (row["layer"], part, row[part], row["tolerance"][part])
        for row in report["layers"]
        for part in PARTS
        if not row[part] <= row["tolerance"][part]
    ]
    if not report["embedding"] <= EXACT:
        off.append((-1, "embedding", report["embedding"], EXACT))
    if not report["logits"]["nmse"] <= report["logits"]["tolerance"]:
        off.append((-1, "output", report["logits"]["nmse"], report["logits"]["tolerance"]))
    if not off:
        return []
    blamed = _blame(oracle, sorted({il for il, *_ in off}))
    found = []
    for il, part, value, tolerance in off:
        where = f"the {part}" if il < 0 else f"layer {il}, {part}"
        op = blamed.get(il, "each op is right by itself: the order of ops, or what the oracle reads, is wrong")
        found.append(f"{where}: NMSE {value:.2g}, expected at most {tolerance:.2g}; {op}")
    return found


def _blame(oracle: _Oracle, layers: list[int]) -> dict[int, str]:
    """{il: the first op of a layer that is off by more than its tolerance}"""
    blamed: dict[int, str] = {}
    for mode in MODES:
        seen, _ = watch(oracle.model, oracle.type_k, oracle.ids, mode, check=layers)
        for il in layers:
            for op, value, tolerance in seen.seen[il]:
                if not value <= tolerance and il not in blamed:
                    blamed[il] = f"{op} in {mode} mode is off: NMSE {value:.2g}, expected at most {tolerance:.2g}"
    return blamed


def _other_bits(engine: Engine, ids: np.ndarray, oracle: _Oracle) -> list[str]:
    """Whether recorded steps, on all threads, give the bits of the ops one by one."""
    found = []
    for mode in MODES:
        size = len(ids) if mode == "prompt" else 1
        model = dataclasses.replace(
            engine.model, n_ubatch=len(ids), min_mha_tokens=1 if mode == "prompt" else len(ids) + 1
        )
        stream = Stream(model, len(ids), engine.type_k)
        logits = np.concatenate([stream.step(ids[at : at + size], logits="all") for at in range(0, len(ids), size)])
        stream.close()
        if not np.array_equal(logits, oracle.runs[mode][1], equal_nan=True):
            found.append(
                f"{mode} mode: a recorded step gives other logits than its ops one by one"
                f" (NMSE {nmse(logits, oracle.runs[mode][1]):.2g}): threads do not wait for each other"
            )
    return found
