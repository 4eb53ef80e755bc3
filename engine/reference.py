"""The oracle: deepseek2 in NumPy float64, by the long way.

`forward` is the whole model: K and V are built per head from the latent, and nothing is absorbed, quantised or
reordered.  Every step is a function of its own, so that a kernel is tested against the same code as the model.
Written to be read next to the papers, not to be fast: a layer's weights are dequantised (by the PyPI package
gguf, imported when the first tensor that is not F32 comes) each time they are used.

The K rows kept between calls are those of the engine's cache, `[latent | rope]`; `round_row` puts them through
whatever the cache would do to them, so the oracle sees the same rows.

Source: DeepSeek-V2 (arXiv 2405.04434) §2.1; DeepSeek-V3 (arXiv 2412.19437) §2.1 for sigmoid and groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .hparams import HParams
    from .tensor import QuantTensor

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Weights = Mapping[str, "QuantTensor"]
Record = dict[tuple[int, str], np.ndarray]

MIN_WEIGHT_SUM = 2.0**-14  # where llama.cpp keeps normalised expert weights from dividing by 0


def forward(
    hparams: HParams,
    tensors: Weights,
    tokens: Sequence[int] | IntArray,
    *,
    past: list[Array] | None = None,
    round_row: Callable[[Array], Array] | None = None,
    record: Record | None = None,
) -> Array:
    """Logits (n_tok, n_vocab) float64 after each of `tokens`.

    past       K rows of the tokens before, one (n_kv, kv_lora_rank + n_rot) per layer, `[]` at the start;
               extended in place.  None: the tokens stand alone
    round_row  (n_tok, kv_lora_rank + n_rot) -> the same after the cache's rounding, e.g. `round_f16`
    record     filled with what happens inside, by (il, name): 'q' 'row' 'attn_out' 'router_logits' 'experts'
               'expert_weights' 'ffn_out' 'layer_out'
    """
    record = {} if record is None else record
    rows = [] if past is None else past
    if not rows:
        rows.extend(np.empty((0, hparams.kv_lora_rank + hparams.n_rot)) for _ in range(hparams.n_layer))
    ids = np.asarray(tokens, np.int64)
    x = dequantise(tensors["token_embd.weight"], ids)  # (n_tok, n_embd)
    for il in range(hparams.n_layer):
        w = Layer(tensors, il)
        x = x + mla(hparams, w, rms_norm(x, w["attn_norm"], hparams.rms_eps), rows, round_row, record)
        x = x + ffn(hparams, w, rms_norm(x, w["ffn_norm"], hparams.rms_eps), record)
        record[il, "layer_out"] = x
    x = rms_norm(x, dequantise(tensors["output_norm.weight"]), hparams.rms_eps)
    output = tensors.get("output.weight", tensors["token_embd.weight"])
    return x @ dequantise(output).T


def mla(
    hparams: HParams,
    w: Layer,
    x: Array,
    rows: list[Array],
    round_row: Callable[[Array], Array] | None,
    record: Record,
) -> Array:
    """Multi-head latent attention of one layer: x (n_tok, n_embd), normed -> (n_tok, n_embd); extends rows[w.il]."""
    h = hparams
    n_past, n_tok = len(rows[w.il]), len(x)
    pos = np.arange(n_past, n_past + n_tok)

    if h.q_lora_rank:
        q = rms_norm(x @ w["attn_q_a"].T, w["attn_q_a_norm"], h.rms_eps) @ w["attn_q_b"].T
    else:
        q = x @ w["attn_q"].T
    q_nope, q_rope = np.split(q.reshape(n_tok, h.n_head, h.n_embd_head_qk), [h.n_embd_head_nope], axis=-1)
    q = np.concatenate([q_nope, rope(q_rope, pos, h.inv_freq, h.rope_magnitude)], axis=-1)

    latent, k_rope = np.split(x @ w["attn_kv_a_mqa"].T, [h.kv_lora_rank], axis=-1)
    latent = rms_norm(latent, w["attn_kv_a_norm"], h.rms_eps)
    row = np.concatenate([latent, rope(k_rope, pos, h.inv_freq, h.rope_magnitude)], axis=-1)
    rows[w.il] = np.concatenate([rows[w.il], row if round_row is None else round_row(row)])

    w_uk, w_uv = up_projections(h, w)
    k, v = expand(rows[w.il], w_uk, w_uv)
    out = attention(q, k, v, pos + 1, h.kq_scale).reshape(n_tok, -1) @ w["attn_output"].T
    record[w.il, "q"], record[w.il, "row"], record[w.il, "attn_out"] = q, row, out
    return out


def up_projections(hparams: HParams, w: Layer) -> tuple[Array, Array]:
    """W_UK (n_head, n_embd_head_nope, kv_lora_rank) and W_UV (n_head, n_embd_head_v, kv_lora_rank), from any form."""
    h = hparams
    if h.form == "legacy":
        kv_b = w["attn_kv_b"].reshape(h.n_head, h.n_embd_head_nope + h.n_embd_head_v, h.kv_lora_rank)
        return kv_b[:, : h.n_embd_head_nope], kv_b[:, h.n_embd_head_nope :]
    k_b = w["attn_k_b"].reshape(h.n_head, h.kv_lora_rank, h.n_embd_head_nope)
    v_b = w["attn_v_b"].reshape(h.n_head, h.n_embd_head_v, h.kv_lora_rank)
    return k_b.transpose(0, 2, 1), v_b


def expand(rows: Array, w_uk: Array, w_uv: Array) -> tuple[Array, Array]:
    """rows (n_kv, kv_lora_rank + n_rot) -> K (n_kv, n_head, nope + n_rot) and V (n_kv, n_head, v) of every head."""
    latent, k_rope = np.split(rows, [w_uk.shape[-1]], axis=-1)
    k_nope = np.einsum("tc,hnc->thn", latent, w_uk, optimize=True)
    k_rope = np.broadcast_to(k_rope[:, None], (*k_nope.shape[:2], k_rope.shape[-1]))
    return np.concatenate([k_nope, k_rope], axis=-1), np.einsum("tc,hvc->thv", latent, w_uv, optimize=True)


def attention(q: Array, k: Array, v: Array, n_kv: npt.ArrayLike, kq_scale: float) -> Array:
    """Softmax attention with a K and a V per head.

    q     (n_tok, n_head, width)    k (n_ctx, n_head, width)    v (n_ctx, n_head, width_v)
    n_kv  (n_tok,) int: query it sees keys 0 … n_kv[it]-1, and none of the others is read
    -> (n_tok, n_head, width_v); zeros where n_kv is 0
    """
    out = np.zeros((*q.shape[:2], v.shape[-1]))
    for it, n in enumerate(np.broadcast_to(n_kv, len(q))):
        if n:
            scores = np.einsum("hd,thd->ht", q[it], k[:n], optimize=True) * kq_scale
            out[it] = np.einsum("ht,thv->hv", softmax(scores), v[:n], optimize=True)
    return out


def mla_attention_from_rows(q: Array, rows: Array, n_kv: npt.ArrayLike, kv_lora_rank: int, kq_scale: float) -> Array:
    """What `mla_decode` computes: absorbed queries over K rows, V being the latent part of the same rows.

    q     (n_tok, n_head, kv_lora_rank + n_rot)    rows (n_ctx, kv_lora_rank + n_rot)
    n_kv  (n_tok,) int, or one for all: rows of each query; rows beyond are not read
    -> (n_tok, n_head, kv_lora_rank); zeros where n_kv is 0
    """
    q, rows = np.asarray(q, np.float64), np.asarray(rows, np.float64)
    keys = np.broadcast_to(rows[:, None], (len(rows), q.shape[1], rows.shape[1]))
    return attention(q, keys, keys[:, :, :kv_lora_rank], n_kv, kq_scale)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x (…, n) over the root of its mean square, times weight (n,)."""
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps) * weight


def rope(x: Array, pos: npt.ArrayLike, inv_freq: Array, magnitude: float = 1.0, style: str = "norm") -> Array:
    """Rotate pairs of x (n_tok, …, n_rot) by pos (n_tok,) times inv_freq (n_rot / 2,).

    style  'norm': pairs (2j, 2j + 1), as deepseek2 · 'neox': pairs (j, j + n_rot / 2), as minicpm3
    """
    angle = np.asarray(pos, np.float64)[:, None] * inv_freq  # (n_tok, n_rot / 2)
    angle = angle.reshape(len(x), *(1,) * (x.ndim - 2), -1)
    cos, sin = np.cos(angle) * magnitude, np.sin(angle) * magnitude
    half = x.shape[-1] // 2
    first, second = {
        "norm": (slice(0, None, 2), slice(1, None, 2)),
        "neox": (slice(0, half), slice(half, None)),
    }[style]
    out = np.empty(x.shape)
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out


def ffn(hparams: HParams, w: Layer, y: Array, record: Record) -> Array:
    """The feed-forward part of one layer, dense or MoE: y (n_tok, n_embd), normed -> (n_tok, n_embd)."""
    h = hparams
    if w.il < h.n_layer_dense_lead or not h.n_expert:
        return swiglu(y, w["ffn_gate"], w["ffn_up"], w["ffn_down"])
    logits = y @ w["ffn_gate_inp"].T  # (n_tok, n_expert)
    experts, weights = route(
        logits, h.n_expert_used, gating=h.expert_gating, bias=w.get("exp_probs_b.bias"), n_groups=h.n_expert_groups,
        n_group_used=h.n_group_used, norm=h.expert_weights_norm, scale=h.expert_weights_scale,
    )  # fmt: skip
    out = moe(y, experts, weights, w.expert)
    if h.n_expert_shared:
        out = out + swiglu(y, w["ffn_gate_shexp"], w["ffn_up_shexp"], w["ffn_down_shexp"])
    record[w.il, "router_logits"], record[w.il, "experts"] = logits, experts
    record[w.il, "expert_weights"], record[w.il, "ffn_out"] = weights, out
    return out


def swiglu(y: Array, gate: Array, up: Array, down: Array) -> Array:
    """y (n_tok, n_embd), gate and up (n_ff, n_embd), down (n_embd, n_ff) -> down(silu(gate y) * up y)."""
    z = y @ gate.T
    return (z * sigmoid(z) * (y @ up.T)) @ down.T


def route(
    logits: Array,
    n_expert_used: int,
    *,
    gating: str = "softmax",
    bias: Array | None = None,
    n_groups: int = 1,
    n_group_used: int = 1,
    norm: bool = False,
    scale: float = 1.0,
) -> tuple[IntArray, Array]:
    """Choose experts: logits (n_tok, n_expert) -> experts and their weights, (n_tok, n_expert_used) each, best first.

    gating    'softmax' over all experts | 'sigmoid'
    bias      (n_expert,) added where experts and groups are chosen, never to the weights
    n_groups  more than 1: only the experts of the n_group_used groups with the largest sum of two best count
    norm      weights are divided by their sum, then multiplied by scale
    Of equals the lower index comes first.
    """
    probs = softmax(logits) if gating == "softmax" else sigmoid(logits)
    choice = probs if bias is None else probs + bias
    if n_groups > 1:
        grouped = choice.reshape(len(choice), n_groups, -1).copy()
        best_two = np.sort(grouped, axis=-1)[..., -2:].sum(axis=-1)  # (n_tok, n_groups)
        dropped = np.argsort(-best_two, axis=-1, kind="stable")[:, n_group_used:]
        np.put_along_axis(grouped, dropped[..., None], -np.inf, axis=1)
        choice = grouped.reshape(choice.shape)
    experts = np.argsort(-choice, axis=-1, kind="stable")[:, :n_expert_used]
    weights = np.take_along_axis(probs, experts, axis=-1)
    if norm:
        weights = weights / np.maximum(weights.sum(axis=-1, keepdims=True), MIN_WEIGHT_SUM)
    return experts, weights * scale


def moe(y: Array, experts: IntArray, weights: Array, expert: Callable[[int], tuple[Array, Array, Array]]) -> Array:
    """Weighted sum of the chosen experts' outputs; `expert(e)` gives gate, up and down of expert e."""
    out = np.zeros_like(y)
    for e in np.unique(experts):
        token, slot = np.nonzero(experts == e)
        out[token] += weights[token, slot, None] * swiglu(y[token], *expert(int(e)))
    return out


def softmax(x: Array) -> Array:
    """Over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def sigmoid(x: Array) -> Array:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def round_f16(x: Array) -> Array:
    return x.astype(np.float16).astype(np.float64)


def round_bf16(x: Array) -> Array:
    """To the nearest bfloat16, ties to even."""
    bits = x.astype(np.float32).view(np.uint32)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(np.float64)


def dequantise(tensor: QuantTensor, rows: int | IntArray | slice = slice(None)) -> Array:
    """Float64 values of tensor[rows], chosen along the first axis, without touching the others."""
    data = np.ascontiguousarray(tensor.data[rows])
    if tensor.type.name == "F32":
        return data.view("<f4").astype(np.float64)
    import gguf  # only the oracle needs it, and only then

    kind = gguf.GGMLQuantizationType(tensor.type.id)
    return gguf.quants.dequantize(data, kind).astype(np.float64)


class Layer:
    """The weights of layer il by their short names, in float64: w["attn_norm"], w.get("exp_probs_b.bias")."""

    def __init__(self, tensors: Weights, il: int) -> None:
        self.tensors, self.il = tensors, il

    def __getitem__(self, name: str) -> Array:
        return dequantise(self.tensors[f"blk.{self.il}.{name}.weight"])

    def get(self, name: str) -> Array | None:
        tensor = self.tensors.get(f"blk.{self.il}.{name}")
        return None if tensor is None else dequantise(tensor)

    def expert(self, e: int) -> tuple[Array, Array, Array]:
        """gate, up (n_ff_exp, n_embd) and down (n_embd, n_ff_exp) of expert e."""
        merged = self.tensors.get(f"blk.{self.il}.ffn_gate_up_exps.weight")
        if merged is not None:
            gate, up = np.split(dequantise(merged, e), 2)
        else:
            gate, up = (dequantise(self.tensors[f"blk.{self.il}.ffn_{part}_exps.weight"], e) for part in ("gate", "up"))
        return gate, up, dequantise(self.tensors[f"blk.{self.il}.ffn_down_exps.weight"], e)
