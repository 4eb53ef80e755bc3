"""Multi-head latent attention: x -> q, one K-cache row per token; attention over the rows; output added to x.

    x ─ attn_norm ─┬─ (q_a ─ norm ─) q ───► q_nope | q_rope ── rope
                   └─ kv_a_mqa ───────────► latent | k_rope ── norm, rope ── k_store ──► K-cache row
    few tokens, MQA mode    q_nope·W_UK -> mla_decode over rows (V is their latent part) -> ·W_UV
    many tokens, MHA mode   mla_prefill expands K and V tile by tile from the same rows
    ─ attn_output ─► added to x

Source: DeepSeek-V2 (arXiv 2405.04434) §2.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..hparams import HParams
from ..step import Step
from ..tensor import QuantTensor

MAX_DECODE_TOKENS = 16  # query tokens of one mla_decode


@dataclass(frozen=True)
class MLA:
    """Weights of one layer's attention. Either q, or q_a, q_a_norm and q_b."""

    norm: np.ndarray  # (n_embd,)
    q: QuantTensor | None  # (n_head * n_embd_head_qk, n_embd)
    q_a: QuantTensor | None  # (q_lora_rank, n_embd)
    q_a_norm: np.ndarray | None  # (q_lora_rank,)
    q_b: QuantTensor | None  # (n_head * n_embd_head_qk, q_lora_rank)
    kv_a_mqa: QuantTensor  # (kv_lora_rank + n_rot, n_embd)
    kv_a_norm: np.ndarray  # (kv_lora_rank,)
    w_uk: QuantTensor  # (n_head, kv_lora_rank, nope)
    w_uv: QuantTensor  # (n_head, n_embd_head_v, kv_lora_rank)
    output: QuantTensor  # (n_embd, n_head * n_embd_head_v)


def attend(step: Step, layer: MLA, hp: HParams, il: int) -> None:
    """Queue the attention of layer il on step.x (n_tok, n_embd), in place."""
    ops, run, n_tok, type_k = step.ops, step.run, step.n_tok, step.type_k
    eps, nope = hp.rms_eps, hp.n_embd_head_nope

    y = step.array("y", hp.n_embd)
    q = step.array("q", hp.n_head, hp.n_embd_head_qk)
    kv_a = step.array("kv_a", hp.kv_lora_rank + hp.n_rot)
    flat_q = q.reshape(n_tok, -1)
    ops.rms_norm(run, step.x, layer.norm, eps, y)
    if layer.q is not None:
        ops.matmul(run, [layer.q, layer.kv_a_mqa], y, [flat_q, kv_a])
    else:
        q_a = step.array("q_a", hp.q_lora_rank)
        ops.matmul(run, [layer.q_a, layer.kv_a_mqa], y, [q_a, kv_a])
        ops.rms_norm(run, q_a, layer.q_a_norm, eps, q_a)
        ops.matmul(run, layer.q_b, q_a, flat_q)
    for some, rows in step.parts:
        ops.k_store(
            run, kv_a[some], layer.kv_a_norm, eps, step.cos_sin[some], step.positions[some], rows[il], type_k,
            hp.kv_lora_rank, hp.n_rot,
        )  # fmt: skip

    out = step.array("attn_out", hp.n_head, hp.n_embd_head_v)
    if step.mha:
        ((_, rows),) = step.parts
        ops.rope(run, q[:, :, nope:], step.cos_sin, q[:, :, nope:])
        ops.mla_prefill(
            run, q, rows[il], type_k, step.n_past, hp.kv_lora_rank, hp.n_rot, hp.kq_scale,
            layer.w_uk, layer.w_uv, layer.kv_a_norm, out,
        )  # fmt: skip
    else:
        _absorbed(step, layer, hp, il, q, out)
    ops.matmul(run, layer.output, out.reshape(n_tok, -1), step.x, accumulate=True)


def _absorbed(step: Step, layer: MLA, hp: HParams, il: int, q: np.ndarray, out: np.ndarray) -> None:
    ops, run = step.ops, step.run
    nope, rank = hp.n_embd_head_nope, hp.kv_lora_rank
    q_abs = step.absorbed("q_abs", hp.n_head, rank + hp.n_rot)
    latent = step.absorbed("attn_latent", hp.n_head, rank)
    ops.matmul_heads(run, layer.w_uk, q[:, :, :nope], q_abs[:, :, :rank])
    ops.rope(run, q[:, :, nope:], step.cos_sin, q_abs[:, :, rank:])
    if step.type_k == "q8":
        ops.rotate_query(run, q_abs, layer.kv_a_norm, rank)
    for tokens, rows in step.parts:
        for t in range(tokens.start, tokens.stop, MAX_DECODE_TOKENS):
            some = slice(t, min(t + MAX_DECODE_TOKENS, tokens.stop))
            ops.mla_decode(
                run, q_abs[some], rows[il], step.type_k, step.n_kv[some], rank, hp.n_rot, hp.kq_scale, latent[some]
            )
    if step.type_k == "q8":
        ops.unrotate_output(run, latent, layer.kv_a_norm)
    ops.matmul_heads(run, layer.w_uv, latent, out)
