"""Feed-forward layers: dense SwiGLU, or routed experts with a shared one. The result is added to x.

dense   x + down(silu(gate y) * up y),  y = norm(x)
MoE     x + shared(y) + sum over the chosen experts of weight * expert(y)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..hparams import HParams
from ..step import Step
from ..tensor import QuantTensor


@dataclass(frozen=True)
class Dense:
    gate: QuantTensor  # (n_ff, n_embd)
    up: QuantTensor  # (n_ff, n_embd)
    down: QuantTensor  # (n_embd, n_ff)


@dataclass(frozen=True)
class MoE:
    gate_inp: QuantTensor  # (n_expert, n_embd): the router
    bias: np.ndarray | None  # (n_expert,): added to the probabilities for the choice alone
    gate: QuantTensor  # (n_expert, n_ff_exp, n_embd)
    up: QuantTensor  # (n_expert, n_ff_exp, n_embd)
    down: QuantTensor  # (n_expert, n_embd, n_ff_exp)
    shared: Dense | None


def feed_forward(step: Step, norm: np.ndarray, layer: Dense | MoE, hp: HParams) -> None:
    """Queue one layer's feed-forward on step.x (n_tok, n_embd), in place."""
    y = step.array("y", hp.n_embd)
    step.ops.rms_norm(step.run, step.x, norm, hp.rms_eps, y)
    if isinstance(layer, Dense):
        _dense(step, layer, y)
        return
    if layer.shared is not None:
        _dense(step, layer.shared, y)
    logits = step.array("router", hp.n_expert)
    ids = step.array("expert_ids", hp.n_expert_used, dtype=np.int32)
    weights = step.array("expert_weights", hp.n_expert_used)
    step.ops.matmul(step.run, layer.gate_inp, y, logits)
    step.ops.route(
        step.run, logits, layer.bias, hp.expert_gating, hp.n_expert_groups, hp.n_group_used,
        hp.expert_weights_norm, hp.expert_weights_scale, ids, weights,
    )  # fmt: skip
    step.ops.experts(step.run, y, ids, weights, layer.gate, layer.up, layer.down, step.x)


def _dense(step: Step, layer: Dense, y: np.ndarray) -> None:
    n_ff = layer.gate.shape[0]
    gate, up = step.array("ffn_gate", n_ff), step.array("ffn_up", n_ff)
    step.ops.matmul(step.run, [layer.gate, layer.up], y, [gate, up])
    step.ops.swiglu(step.run, gate, up, gate)
    step.ops.matmul(step.run, layer.down, gate, step.x, accumulate=True)
