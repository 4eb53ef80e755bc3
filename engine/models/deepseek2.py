"""deepseek2: DeepSeek-V2/V3, R1, Kimi-K2, Moonlight, GLM-4.7-Flash, GigaChat3, Youtu and what else GGUF files call so.

    token_embd ─ n_layer × ( attention ─ feed-forward ) ─ output_norm ─ output ─► logits

Three forms of files hold the up-projections W_UK and W_UV; all run from the same K-cache:
    modern   attn_k_b (n_head, kv_lora_rank, nope), attn_v_b (n_head, v, kv_lora_rank)
    2d       the same bytes as matrices
    legacy   attn_kv_b (n_head * (nope + v), kv_lora_rank): the V part is used where it lies; the K part lies the wrong
             way round for a block format, so it is transposed once, at load, into F16 (F32 stays F32)
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import fields, is_dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import ModelFormatError, UnsupportedModelError
from ..gguf_file import GGUFFile
from ..hparams import HParams
from ..layers.ffn import Dense, MoE, feed_forward
from ..layers.mla import MLA, attend
from ..step import Step
from ..tensor import GGML_TYPES, QuantTensor

F32, F16 = GGML_TYPES[0], GGML_TYPES[1]
WEIGHTS = ("token_embd", "output_norm", "output", "attention", "ffn_norm", "ffn")
ROUTED = ("gate", "up", "down")  # of MoE


class DeepSeek2:
    """Weights, read-only; views of the mapped file except for the transposed part of legacy files."""

    def __init__(self, hparams: HParams, file: GGUFFile, ops: ModuleType):
        self.hparams = hp = hparams
        for name in ("n_rot", "n_embd_head_nope", "n_embd_head_v", "kv_lora_rank"):
            if getattr(hp, name) % _Tensors.ROW_MULTIPLE:
                raise UnsupportedModelError(
                    f"{file.path}: {name} is {getattr(hp, name)}; konly runs multiples of {_Tensors.ROW_MULTIPLE}"
                )
        take = _Tensors(file)
        self.token_embd = take.matrix("token_embd.weight", hp.n_vocab, hp.n_embd)
        self.output_norm = take.vector("output_norm.weight", hp.n_embd)
        tied = "output.weight" not in file.tensors
        self.output = self.token_embd if tied else take.matrix("output.weight", hp.n_vocab, hp.n_embd)
        self.attention = [self._mla(take, f"blk.{il}.", ops) for il in range(hp.n_layer)]
        self.ffn_norm = [take.vector(f"blk.{il}.ffn_norm.weight", hp.n_embd) for il in range(hp.n_layer)]
        self.ffn = [self._ffn(take, il) for il in range(hp.n_layer)]

    def forward(self, step: Step, logits: np.ndarray | None) -> None:
        """Queue a step. logits (n, n_vocab): written for the last n tokens."""
        ops, run, hp = step.ops, step.run, self.hparams
        ops.embed_rows(run, self.token_embd, step.tokens, step.x)
        for il in range(hp.n_layer):
            attend(step, self.attention[il], hp, il)
            feed_forward(step, self.ffn_norm[il], self.ffn[il], hp)
        if logits is not None:
            y = step.array("y", hp.n_embd)[step.n_tok - len(logits) :]
            ops.rms_norm(run, step.x[step.n_tok - len(logits) :], self.output_norm, hp.rms_eps, y)
            ops.matmul(run, self.output, y, logits)

    def map(self, function: Callable[[Any], Any], keep_experts: bool = False) -> DeepSeek2:
        """The same model with function(weight) for each weight, called once for each; routed experts may stay."""
        known: dict[int, Any] = {}  # a tied output is the embedding

        def mapped(part: Any) -> Any:
            if isinstance(part, QuantTensor | np.ndarray):
                if id(part) not in known:
                    known[id(part)] = function(part)
                return known[id(part)]
            if isinstance(part, list):
                return [mapped(one) for one in part]
            if not is_dataclass(part) or isinstance(part, type):
                return part
            stay = ROUTED if keep_experts and isinstance(part, MoE) else ()
            return replace(part, **{f.name: mapped(getattr(part, f.name)) for f in fields(part) if f.name not in stay})

        other = copy(self)
        for name in WEIGHTS:
            setattr(other, name, mapped(getattr(self, name)))
        return other

    def _mla(self, take: _Tensors, blk: str, ops: ModuleType) -> MLA:
        hp = self.hparams
        q_rows = hp.n_head * hp.n_embd_head_qk
        lora = hp.q_lora_rank
        w_uk, w_uv = self._up_projections(take, blk, ops)
        return MLA(
            norm=take.vector(blk + "attn_norm.weight", hp.n_embd),
            q=None if lora else take.matrix(blk + "attn_q.weight", q_rows, hp.n_embd),
            q_a=take.matrix(blk + "attn_q_a.weight", lora, hp.n_embd) if lora else None,
            q_a_norm=take.vector(blk + "attn_q_a_norm.weight", lora) if lora else None,
            q_b=take.matrix(blk + "attn_q_b.weight", q_rows, lora) if lora else None,
            kv_a_mqa=take.matrix(blk + "attn_kv_a_mqa.weight", hp.kv_lora_rank + hp.n_rot, hp.n_embd),
            kv_a_norm=take.vector(blk + "attn_kv_a_norm.weight", hp.kv_lora_rank),
            w_uk=w_uk,
            w_uv=w_uv,
            output=take.matrix(blk + "attn_output.weight", hp.n_embd, hp.n_head * hp.n_embd_head_v),
        )

    def _up_projections(self, take: _Tensors, blk: str, ops: ModuleType) -> tuple[QuantTensor, QuantTensor]:
        hp = self.hparams
        n_head, rank, nope, n_v = hp.n_head, hp.kv_lora_rank, hp.n_embd_head_nope, hp.n_embd_head_v
        if hp.form == "modern":
            return take.matrix(blk + "attn_k_b.weight", n_head, rank, nope), take.matrix(
                blk + "attn_v_b.weight", n_head, n_v, rank
            )
        if hp.form == "2d":
            k_b = take.matrix(blk + "attn_k_b.weight", n_head * rank, nope)
            v_b = take.matrix(blk + "attn_v_b.weight", n_head * n_v, rank)
            return _by_head(k_b, n_head), _by_head(v_b, n_head)
        kv_b = take.matrix(blk + "attn_kv_b.weight", n_head * (nope + n_v), rank)
        heads = kv_b.data.reshape(n_head, nope + n_v, -1)
        w_uv = QuantTensor(kv_b.name, kv_b.type, (n_head, n_v, rank), heads[:, nope:])
        return _transposed(ops, kv_b, n_head, nope, n_v), w_uv

    def _ffn(self, take: _Tensors, il: int) -> Dense | MoE:
        hp, blk = self.hparams, f"blk.{il}."
        if il < hp.n_layer_dense_lead:
            return self._dense(take, blk, "", hp.n_ff)
        n, width = hp.n_expert, hp.n_ff_exp
        merged = blk + "ffn_gate_up_exps.weight"
        if merged in take.file.tensors:
            both = take.matrix(merged, n, 2 * width, hp.n_embd)
            gate, up = (
                QuantTensor(both.name, both.type, (n, width, hp.n_embd), part)
                for part in (both.data[:, :width], both.data[:, width:])
            )
        else:
            gate = take.matrix(blk + "ffn_gate_exps.weight", n, width, hp.n_embd)
            up = take.matrix(blk + "ffn_up_exps.weight", n, width, hp.n_embd)
        bias = blk + "exp_probs_b.bias"
        return MoE(
            gate_inp=take.matrix(blk + "ffn_gate_inp.weight", n, hp.n_embd),
            bias=take.vector(bias, n) if bias in take.file.tensors else None,
            gate=gate,
            up=up,
            down=take.matrix(blk + "ffn_down_exps.weight", n, hp.n_embd, width),
            shared=self._dense(take, blk, "_shexp", hp.n_expert_shared * width) if hp.n_expert_shared else None,
        )

    def _dense(self, take: _Tensors, blk: str, suffix: str, n_ff: int) -> Dense:
        n_embd = self.hparams.n_embd
        return Dense(
            gate=take.matrix(f"{blk}ffn_gate{suffix}.weight", n_ff, n_embd),
            up=take.matrix(f"{blk}ffn_up{suffix}.weight", n_ff, n_embd),
            down=take.matrix(f"{blk}ffn_down{suffix}.weight", n_embd, n_ff),
        )


class _Tensors:
    """Takes tensors out of a file, each with exactly the shape and a type that the kernels expect."""

    ROW_MULTIPLE = 32  # values: what kernels read at once

    def __init__(self, file: GGUFFile):
        self.file = file

    def _take(self, name: str, shape: tuple[int, ...]) -> QuantTensor:
        tensor = self.file.tensors.get(name)
        if tensor is None:
            raise ModelFormatError(f"{self.file.path}: tensor {name!r} is missing")
        if tensor.shape != shape:
            raise ModelFormatError(
                f"{self.file.path}: tensor {name!r} has shape {tensor.shape}; its hyperparameters say {shape}"
            )
        return tensor

    def vector(self, name: str, n: int) -> np.ndarray:
        """(n,) f32"""
        return self._take(name, (n,)).f32()

    def matrix(self, name: str, *shape: int) -> QuantTensor:
        tensor = self._take(name, shape)
        if tensor.type.id not in GGML_TYPES:
            raise UnsupportedModelError(
                f"{self.file.path}: tensor {name!r} has type {tensor.type.name}, which has no CPU kernel"
                " (see `konly inspect`); requantise to Q4_K"
            )
        if shape[-1] % self.ROW_MULTIPLE:
            raise UnsupportedModelError(
                f"{self.file.path}: rows of tensor {name!r} have {shape[-1]} values; konly runs multiples of"
                f" {self.ROW_MULTIPLE}"
            )
        return tensor


def _by_head(tensor: QuantTensor, n_head: int) -> QuantTensor:
    rows, width = tensor.shape
    data = tensor.data.reshape(n_head, rows // n_head, -1)
    return QuantTensor(tensor.name, tensor.type, (n_head, rows // n_head, width), data)


def _transposed(ops: ModuleType, kv_b: QuantTensor, n_head: int, nope: int, n_v: int) -> QuantTensor:
    """The K part of kv_b, per head (nope, rank), as (n_head, rank, nope)."""
    rank = kv_b.shape[-1]
    of_head = np.arange(n_head, dtype=np.int32)[:, None] * (nope + n_v) + np.arange(nope, dtype=np.int32)
    rows = np.zeros((n_head * nope, rank), np.float32)
    run = ops.Run()
    ops.embed_rows(run, kv_b, of_head.reshape(-1), rows)
    run.sync()
    kind, dtype = (F32, np.float32) if kv_b.type == F32 else (F16, np.float16)
    w_uk = np.ascontiguousarray(rows.reshape(n_head, nope, rank).transpose(0, 2, 1), dtype=dtype)
    return QuantTensor(kv_b.name, kind, w_uk.shape, w_uk.view(np.uint8))
