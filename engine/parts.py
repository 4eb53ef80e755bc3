"""The parts of a step: which kernels belong to each, what it has to read and to multiply, its share of the limits.

    attention   rows of the K-cache; scores and values; in MHA mode also K and V, expanded from the rows
    experts     weights of the routed experts
    dense       all other weights but the embedding
    rest        norms, rope, routing, quantising of activations, embedding, barriers, Python

A share is a time as the limit would have it, over the time taken: of_read if nothing but these bytes came from DRAM at
its rate, of_peak if nothing but these products were multiplied, each kind at its peak. They are of what must be done,
not of what a kernel happens to do. More than 1 of DRAM means that a cache holds the bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from types import ModuleType
from typing import Any

from .layers.ffn import Dense
from .layers.mla import MAX_DECODE_TOKENS
from .tensor import QuantTensor

PARTS = ("attention", "experts", "dense", "rest")
PART_OF = {  # by the start of a kernel's name; what is not listed is rest
    "attention.": "attention",
    "prefill.": "attention",
    "moe.": "experts",
    "matmul.dot_rows": "dense",
    "panels.multiply": "dense",
    "mla_decode.": "attention",  # from here on of a card
    "matvec.": "dense",
    "gemm.": "dense",
    "splits.": "dense",
    "call": "experts",  # in main memory
    "feed": "experts",
}


def part_of(kernel: str) -> str:
    return next((part for start, part in PART_OF.items() if kernel.startswith(start)), "rest")


def by_part(profile: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Seconds of each part of a profile (see Run.profile of cpu_kernels); rest only as far as it is kernels."""
    seconds = dict.fromkeys(PARTS, 0.0)
    for kernel, t in profile:
        seconds[part_of(kernel)] += t
    return seconds


@dataclass
class Work:
    """What a part of a step cannot do without."""

    nbytes: float = 0.0  # to be read: weights, cache rows
    products: dict[str, float] = field(default_factory=dict)  # multiplications by kind

    def multiply(self, kind: str, n: float) -> None:
        self.products[kind] = self.products.get(kind, 0.0) + n

    def shares(self, seconds: float, limits: dict[str, float]) -> dict[str, float | None]:
        """{"of_read", "of_peak"}: None for a part that has no work."""
        if not self.nbytes or seconds <= 0:
            return {"of_read": None, "of_peak": None}
        at_peak = sum(n / (limits[f"{kind}_gmul_s"] * 1e9) for kind, n in self.products.items())
        return {"of_read": self.nbytes / (limits["read_gb_s"] * 1e9) / seconds, "of_peak": at_peak / seconds}


def work_of(stream: Any, n_tok: int, n_past: int) -> dict[str, Work]:
    """Work of a step of n_tok tokens after n_past that asks for the logits of the last one."""
    work = {part: Work() for part in PARTS}
    for start in range(0, n_tok, stream.n_ubatch):
        n = min(stream.n_ubatch, n_tok - start)
        mha = n >= stream.model.min_mha_tokens
        _attention(work["attention"], stream, n, n_past + start, mha)
        _weights(work, stream.model.weights, stream.model.ops, stream.hparams, n, mha)
    _matrix(work["dense"], stream.model.ops, stream.model.weights.output, 1)
    return work


def _attention(work: Work, stream: Any, n_tok: int, n_past: int, mha: bool) -> None:
    hp, layout = stream.hparams, stream.cache.layout
    rank, nope, rot, n_v = hp.kv_lora_rank, hp.n_embd_head_nope, hp.n_rot, hp.n_embd_head_v
    n_kv, pairs = n_past + n_tok, n_tok * n_past + n_tok * (n_tok + 1) // 2
    heads = hp.n_head * hp.n_layer
    of_latent, of_rope = stream.model.ops.roofline.attention_kinds(layout.type_k, mha)
    passes = 1 if mha else -(-n_tok // MAX_DECODE_TOKENS)
    work.nbytes += passes * n_kv * layout.bytes_per_token
    work.multiply(of_rope, heads * pairs * rot)
    if mha:
        work.multiply(of_latent, heads * (pairs * (nope + n_v) + n_kv * rank * (nope + n_v)))
        work.nbytes += sum(w.nbytes for layer in stream.model.weights.attention for w in (layer.w_uk, layer.w_uv))
    else:
        work.multiply(of_latent, heads * pairs * 2 * rank)


def _weights(work: dict[str, Work], weights: Any, ops: ModuleType, hp: Any, n_tok: int, mha: bool) -> None:
    for layer in weights.attention:
        for w in (layer.q, layer.q_a, layer.q_b, layer.kv_a_mqa, layer.output):
            if w is not None:
                _matrix(work["dense"], ops, w, n_tok)
        for w in () if mha else (layer.w_uk, layer.w_uv):
            _matrix(work["dense"], ops, w, n_tok)
    for layer in weights.ffn:
        for w in _dense_of(layer):
            _matrix(work["dense"], ops, w, n_tok)
        if not isinstance(layer, Dense):
            read = min(hp.n_expert, n_tok * hp.n_expert_used)  # random tokens soon meet all of them
            for w in (layer.gate, layer.up, layer.down):
                _matrix(work["experts"], ops, w, n_tok, read / hp.n_expert, hp.n_expert_used / hp.n_expert)


def _dense_of(layer: Any) -> Iterator[QuantTensor]:
    """The matrices that every token meets."""
    if isinstance(layer, Dense):
        yield from (layer.gate, layer.up, layer.down)
    else:
        yield layer.gate_inp
        if layer.shared is not None:
            yield from _dense_of(layer.shared)


def _matrix(work: Work, ops: ModuleType, w: QuantTensor, n_tok: int, read: float = 1.0, used: float = 1.0) -> None:
    """read: share of it that is read; used: share of it that each token is multiplied with."""
    work.nbytes += read * w.nbytes
    work.multiply(ops.roofline.matmul_kind(w.type.id, w.shape[-1], n_tok), used * prod(w.shape) * n_tok)
