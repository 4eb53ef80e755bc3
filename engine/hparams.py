"""HParams: what a GGUF file says about the model's shape; one field per key, and the project's glossary.

`HParams.from_gguf(file)` reads the keys of `deepseek2`, fills in what older converters left out, and refuses what makes
no sense or what we do not run, naming file and key. Shapes of tensors are the model builder's to check.

Source: src/models/deepseek2.cpp, src/llama-model.cpp and src/llama-context.cpp of llama.cpp (keys, defaults, YaRN).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import ModelFormatError, UnsupportedModelError
from .gguf_file import GGUFFile

SUPPORTED_ARCHITECTURES = ("deepseek2",)

MAX_LAYERS = 512
MAX_HEADS = 1024
MAX_EXPERTS = 1024
MAX_VOCAB = 1 << 21
MAX_WIDTH = 1 << 24  # of any other dimension, and of contexts: 2**24 tokens

YARN_BETA_FAST, YARN_BETA_SLOW = 32.0, 1.0  # llama.cpp ignores the file's, and so its users know the model with these


@dataclass(frozen=True, slots=True)
class HParams:
    """Shape and constants of a model. Sizes are in values, contexts in tokens."""

    arch: str  # general.architecture
    form: str  # 'modern' attn_k_b + attn_v_b per head (3-D) · '2d' the same with heads flattened · 'legacy' attn_kv_b
    n_layer: int  # main layers; the file's block_count also counts n_layer_nextn
    n_layer_nextn: int  # MTP blocks after the main layers, which we skip
    n_ctx_train: int
    n_embd: int
    n_ff: int  # width of the dense FFN; 0 if no layer is dense
    n_head: int
    n_vocab: int

    q_lora_rank: int  # 0: q comes from one matrix, attn_q
    kv_lora_rank: int  # width of the latent
    n_rot: int  # width of the rope part
    n_embd_head_nope: int
    n_embd_head_v: int
    rms_eps: float

    rope_freq_base: float
    rope_scaling: str  # 'none' | 'linear' | 'yarn'
    rope_factor: float  # 1 if rope_scaling is 'none'
    n_ctx_orig: int  # context before YaRN
    yarn_log_multiplier: float  # 0.1 * mscale_all_dim; 0: none
    rope_attn_factor: float

    n_layer_dense_lead: int  # layers before it have a dense FFN; = n_layer if there are no experts
    n_expert: int  # 0: none
    n_expert_used: int
    n_expert_shared: int
    n_ff_exp: int  # width of one expert; the shared ones together are n_expert_shared times as wide
    expert_weights_scale: float  # 1: no scaling (the file may say 0, too)
    expert_weights_norm: bool
    expert_gating: str  # 'softmax' | 'sigmoid'
    n_expert_groups: int  # 1: no group-limited routing
    n_group_used: int

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> HParams:
        arch = file.get("general.architecture", str)
        if arch not in SUPPORTED_ARCHITECTURES:
            shown = arch if len(arch) <= 64 else arch[:64] + "…"
            supported = ", ".join(SUPPORTED_ARCHITECTURES)
            raise UnsupportedModelError(f"{file.path}: architecture {shown!r} is not supported; supported: {supported}")
        keys = _Keys(file, arch)
        keys.refuse_unsupported()
        fields: dict[str, Any] = {"arch": arch, "form": _form(keys)}
        fields |= _read_shape(keys)
        fields |= _read_attention(keys, fields["n_embd"], fields["n_head"])
        fields |= _read_rope(keys, fields["n_ctx_train"])
        fields |= _read_experts(keys, fields["n_layer"], fields["n_vocab"])
        dense = fields["n_layer_dense_lead"] > 0
        fields["n_ff"] = keys.width("feed_forward_length") if dense else 0
        return cls(**fields)

    @property
    def n_embd_head_qk(self) -> int:
        """Width of q and k of one head before absorption: nope + rope."""
        return self.n_embd_head_nope + self.n_rot

    @property
    def inv_freq(self) -> np.ndarray:
        """(n_rot / 2,) float64: radians per position of each pair, with linear or YaRN scaling, at all positions."""
        pair = np.arange(self.n_rot // 2, dtype=np.float64)
        extrapolated = self.rope_freq_base ** (-2.0 * pair / self.n_rot)
        interpolated = extrapolated / self.rope_factor
        if self.rope_scaling != "yarn":
            return interpolated
        low = max(0, math.floor(self._yarn_pair(YARN_BETA_FAST)))
        high = min(self.n_rot - 1, math.ceil(self._yarn_pair(YARN_BETA_SLOW)))
        ramp = 1.0 - np.clip((pair - low) / max(0.001, high - low), 0.0, 1.0)
        return interpolated * (1.0 - ramp) + extrapolated * ramp

    def _yarn_pair(self, n_turns: float) -> float:
        """The pair (a real number) which turns n_turns times within n_ctx_orig."""
        turns = self.n_ctx_orig / (n_turns * 2.0 * math.pi)
        return self.n_rot * math.log(turns) / (2.0 * math.log(self.rope_freq_base))

    @property
    def rope_magnitude(self) -> float:
        """What cos and sin are multiplied by: 1 for every file with a yarn_log_multiplier."""
        magnitude = self._attn_factor
        return magnitude * self._log_growth if self.rope_scaling == "yarn" else magnitude

    @property
    def kq_scale(self) -> float:
        """What q·k is multiplied by before the softmax: mscale² / sqrt(n_embd_head_qk), *not* of the absorbed width."""
        mscale = self._attn_factor * self._log_growth * (1.0 + self.yarn_log_multiplier * math.log(self.rope_factor))
        return mscale * mscale / math.sqrt(self.n_embd_head_qk)

    @property
    def _log_growth(self) -> float:
        return 1.0 + 0.1 * math.log(self.rope_factor)

    @property
    def _attn_factor(self) -> float:
        # YaRN: g(f, m) / g(f, m_all), which is 1 for deepseek2 if the file has a log multiplier (m = m_all), else
        # g(f, 1) = _log_growth; then divided by _log_growth, which llama.cpp's rope kernel multiplies in again.
        if self.rope_scaling == "yarn" and self.yarn_log_multiplier != 0.0:
            return self.rope_attn_factor / self._log_growth
        return self.rope_attn_factor


class _Keys:
    """Typed access to the keys of one architecture, with ranges."""

    def __init__(self, file: GGUFFile, arch: str) -> None:
        self.file = file
        self.arch = arch

    def fail(self, key: str, what: str) -> ModelFormatError:
        return ModelFormatError(f"{self.file.path}: key '{self.arch}.{key}' {what}")

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        full = f"{self.arch}.{key}"
        value = self._same_in_all_layers(full) if full in self.file.metadata or default is None else default
        if not low <= value <= high:
            raise self.fail(key, f"is {value:,}, expected {low:,} to {high:,}")
        return value

    def _same_in_all_layers(self, full: str) -> int:
        """Some writers give a number per layer."""
        values = self.file.metadata.get(full)
        if isinstance(values, np.ndarray) and values.dtype.kind in "iu" and len(values):
            if (values != values[0]).any():
                raise UnsupportedModelError(f"{self.file.path}: key {full!r} differs between layers")
            return int(values[0])
        return self.file.get(full, int)

    def width(self, key: str) -> int:
        return self.integer(key, 1, MAX_WIDTH)

    def number(self, key: str, default: float | None = None) -> float:
        full = f"{self.arch}.{key}"
        value = self.file.get(full, float) if default is None else self.file.get(full, float, default)
        if not math.isfinite(value):
            raise self.fail(key, f"is {value}, expected a finite number")
        return value

    def has_tensor(self, name: str) -> bool:
        return f"blk.0.{name}.weight" in self.file.tensors

    def refuse_unsupported(self) -> None:
        if self.number("attention.temperature_scale", 0.0) != 0.0:
            raise UnsupportedModelError(
                f"{self.file.path}: key '{self.arch}.attention.temperature_scale' is set, which konly does not run yet"
            )


def _form(keys: _Keys) -> str:
    """Which of the three generations of files this is: by the tensors, for the keys alone mislead."""
    tensors = keys.file.tensors
    k_b, v_b = tensors.get("blk.0.attn_k_b.weight"), tensors.get("blk.0.attn_v_b.weight")
    if k_b is not None and v_b is not None:
        if len(k_b.shape) == len(v_b.shape) == 3 and _mla_lengths(keys):
            return "modern"
        if len(k_b.shape) == len(v_b.shape) == 2:
            return "2d"
    if keys.has_tensor("attn_kv_b"):
        return "legacy"
    raise ModelFormatError(
        f"{keys.file.path}: expected tensors blk.0.attn_k_b.weight and attn_v_b.weight with the keys "
        f"'{keys.arch}.attention.key_length_mla' and value_length_mla, or blk.0.attn_kv_b.weight"
    )


def _mla_lengths(keys: _Keys) -> tuple[int, int] | None:
    """(key_length_mla, value_length_mla) where a file has them: the heads' widths before absorption."""
    k = keys.integer("attention.key_length_mla", 0, MAX_WIDTH, 0)
    v = keys.integer("attention.value_length_mla", 0, MAX_WIDTH, 0)
    if bool(k) != bool(v):
        raise keys.fail("attention.key_length_mla", f"is {k} and value_length_mla {v}, expected both or neither")
    return (k, v) if k else None


def _read_shape(keys: _Keys) -> dict[str, int]:
    n_block = keys.integer("block_count", 1, MAX_LAYERS)
    n_nextn = keys.integer("nextn_predict_layers", 0, MAX_LAYERS, 0)
    if n_nextn >= n_block:
        raise keys.fail("nextn_predict_layers", f"is {n_nextn}, expected less than block_count, {n_block}")
    return {
        "n_layer": n_block - n_nextn,
        "n_layer_nextn": n_nextn,
        "n_ctx_train": keys.width("context_length"),
        "n_embd": keys.width("embedding_length"),
        "n_head": keys.integer("attention.head_count", 1, MAX_HEADS),
        "n_vocab": _n_vocab(keys),
    }


def _n_vocab(keys: _Keys) -> int:
    if f"{keys.arch}.vocab_size" in keys.file.metadata:
        return keys.integer("vocab_size", 1, MAX_VOCAB)
    n_vocab = len(keys.file.get("tokenizer.ggml.tokens", list))
    if not 1 <= n_vocab <= MAX_VOCAB:
        raise ModelFormatError(
            f"{keys.file.path}: key 'tokenizer.ggml.tokens' has {n_vocab:,} tokens, expected 1 to {MAX_VOCAB:,}"
        )
    return n_vocab


def _read_attention(keys: _Keys, n_embd: int, n_head: int) -> dict[str, int | float]:
    head_width = max(1, n_embd // n_head)
    n_embd_head_qk, n_embd_head_v = _mla_lengths(keys) or (
        keys.integer("attention.key_length", 1, MAX_WIDTH, head_width),
        keys.integer("attention.value_length", 1, MAX_WIDTH, head_width),
    )
    n_rot = keys.integer("rope.dimension_count", 2, MAX_WIDTH)
    if n_rot % 2:
        raise keys.fail("rope.dimension_count", f"is {n_rot}, expected an even number")
    if n_embd_head_qk <= n_rot:
        raise keys.fail(
            "rope.dimension_count", f"is {n_rot}, expected less than the heads' key length {n_embd_head_qk}"
        )
    rms_eps = keys.number("attention.layer_norm_rms_epsilon")
    if not 0.0 < rms_eps < 1.0:
        raise keys.fail("attention.layer_norm_rms_epsilon", f"is {rms_eps}, expected a number between 0 and 1")
    return {
        "q_lora_rank": _q_lora_rank(keys),
        "kv_lora_rank": keys.width("attention.kv_lora_rank"),
        "n_rot": n_rot,
        "n_embd_head_nope": n_embd_head_qk - n_rot,
        "n_embd_head_v": n_embd_head_v,
        "rms_eps": rms_eps,
    }


def _q_lora_rank(keys: _Keys) -> int:
    """By the tensors that are there: no rule on layer counts tells all 'lite' models."""
    if keys.has_tensor("attn_q"):
        return 0
    if keys.has_tensor("attn_q_a"):
        return keys.width("attention.q_lora_rank")
    raise ModelFormatError(
        f"{keys.file.path}: neither tensor blk.0.attn_q.weight nor blk.0.attn_q_a.weight is there; expected one of them"
    )


def _read_rope(keys: _Keys, n_ctx_train: int) -> dict[str, float | int | str]:
    base = keys.number("rope.freq_base", 10000.0)
    if base <= 1.0:
        raise keys.fail("rope.freq_base", f"is {base}, expected more than 1")
    factor_key = "rope.scaling.factor"
    if f"{keys.arch}.{factor_key}" not in keys.file.metadata:
        factor_key = "rope.scale_linear"  # the key's old name
    factor = keys.number(factor_key, 0.0) or 1.0
    if factor < 1.0:
        raise keys.fail(factor_key, f"is {factor}, expected at least 1 (or 0: none)")
    scaling = keys.file.get(f"{keys.arch}.rope.scaling.type", str, "linear")
    if scaling not in ("none", "linear", "yarn"):
        raise UnsupportedModelError(
            f"{keys.file.path}: key '{keys.arch}.rope.scaling.type' is {scaling[:64]!r}; supported: none, linear, yarn"
        )
    if scaling == "none" or (scaling == "linear" and factor == 1.0):
        scaling, factor = "none", 1.0
    attn_factor = keys.number("rope.scaling.attn_factor", 1.0)
    if attn_factor <= 0.0:
        raise keys.fail("rope.scaling.attn_factor", f"is {attn_factor}, expected more than 0")
    return {
        "rope_freq_base": base,
        "rope_scaling": scaling,
        "rope_factor": factor,
        "n_ctx_orig": keys.integer("rope.scaling.original_context_length", 1, MAX_WIDTH, n_ctx_train),
        "yarn_log_multiplier": keys.number("rope.scaling.yarn_log_multiplier", 0.0),
        "rope_attn_factor": attn_factor,
    }


def _read_experts(keys: _Keys, n_layer: int, n_vocab: int) -> dict[str, Any]:
    n_expert = keys.integer("expert_count", 0, MAX_EXPERTS, 0)
    n_lead = keys.integer("leading_dense_block_count", 0, MAX_LAYERS, 0)
    if n_expert == 0 or n_lead >= n_layer:
        return {
            "n_layer_dense_lead": n_layer,
            "n_expert": 0,
            "n_expert_used": 0,
            "n_expert_shared": 0,
            "n_ff_exp": 0,
            "expert_weights_scale": 1.0,
            "expert_weights_norm": False,
            "expert_gating": "softmax",
            "n_expert_groups": 1,
            "n_group_used": 1,
        }
    n_expert_used = keys.integer("expert_used_count", 1, n_expert)
    n_groups, n_group_used = _read_groups(keys, n_expert, n_expert_used)
    return {
        "n_layer_dense_lead": n_lead,
        "n_expert": n_expert,
        "n_expert_used": n_expert_used,
        "n_expert_shared": keys.integer("expert_shared_count", 0, MAX_EXPERTS, 0),
        "n_ff_exp": keys.width("expert_feed_forward_length"),
        "expert_weights_scale": keys.number("expert_weights_scale", 0.0) or 1.0,
        "expert_weights_norm": keys.file.get(f"{keys.arch}.expert_weights_norm", bool, False),
        "expert_gating": _gating(keys, n_layer, n_vocab),
        "n_expert_groups": n_groups,
        "n_group_used": n_group_used,
    }


def _read_groups(keys: _Keys, n_expert: int, n_expert_used: int) -> tuple[int, int]:
    """(n_expert_groups, n_group_used); (1, 1) unless routing is limited to groups."""
    n_groups = keys.integer("expert_group_count", 0, MAX_EXPERTS, 0)
    if n_groups <= 1:
        return 1, 1
    if n_groups >= n_expert or n_expert % n_groups:
        raise keys.fail("expert_group_count", f"is {n_groups}, expected a divisor of expert_count, {n_expert}")
    n_group_used = keys.integer("expert_group_used_count", 1, n_groups - 1)
    if n_expert_used > n_group_used * (n_expert // n_groups):
        raise keys.fail(
            "expert_group_used_count",
            f"is {n_group_used}, whose experts are fewer than expert_used_count, {n_expert_used}",
        )
    return n_groups, n_group_used


def _gating(keys: _Keys, n_layer: int, n_vocab: int) -> str:
    gating = keys.integer("expert_gating_func", 0, 1 << 31, 0)
    if gating == 0:
        # Early GLM-4.7-Flash files lack the key; softmax would run, and be slightly wrong everywhere.
        return "sigmoid" if n_layer in (47, 48) and n_vocab == 154880 else "softmax"
    if gating not in (1, 2):
        raise UnsupportedModelError(
            f"{keys.file.path}: key '{keys.arch}.expert_gating_func' is {gating}; supported: 1 (softmax), 2 (sigmoid)"
        )
    return "softmax" if gating == 1 else "sigmoid"
