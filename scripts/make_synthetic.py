"""Write synthetic deepseek2 GGUF files: real MLA shapes, random weights of a sensible scale.

    python scripts/make_synthetic.py v2lite v2lite.gguf                     # DeepSeek-V2-Lite, Q4_K_M, 10 GB
    python scripts/make_synthetic.py tiny-v3 tiny.gguf --quant f32 --form legacy

The same seed is the same model in every form of file and, up to rounding, in every weight type: each tensor
has a generator of its own, seeded by its name; attn_k_b and attn_v_b are cut from one attn_kv_b, and
ffn_gate_up_exps is ffn_gate_exps and ffn_up_exps joined.
Gains are chosen so that attention scores have unit spread or a little more: a uniform softmax would hide
faults.  Large quantised tensors are random picks from a pool of quantised Gaussian blocks.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import math
import os
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T
from quantise import HALF_AT, quantise, scale_blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A deepseek2 model; the defaults are DeepSeek-V2-Lite, and names are those of HParams."""

    n_layer: int = 27
    n_layer_nextn: int = 0
    n_embd: int = 2048
    n_ff: int = 10944
    n_head: int = 16
    n_vocab: int = 102400
    n_ctx_train: int = 163840
    q_lora_rank: int = 0
    kv_lora_rank: int = 512
    n_rot: int = 64
    n_embd_head_nope: int = 128
    n_embd_head_v: int = 128
    rms_eps: float = 1e-6
    rope_freq_base: float = 10000.0
    rope_scaling: str = "yarn"  # none | linear | yarn
    rope_factor: float = 40.0
    n_ctx_orig: int = 4096
    yarn_log_multiplier: float = 0.0707
    rope_attn_factor: float = 1.0
    n_layer_dense_lead: int = 1
    n_expert: int = 64
    n_expert_used: int = 6
    n_expert_shared: int = 2
    n_ff_exp: int = 1408
    expert_gating: str | None = "softmax"  # softmax | sigmoid | None: no key in the file
    expert_weights_norm: bool = False
    expert_weights_scale: float = 1.0
    n_expert_groups: int = 0  # 0: no key
    n_group_used: int = 0
    selection_bias: bool = False  # exp_probs_b
    tied: bool = False  # no output.weight
    merged_gate_up: bool = False  # ffn_gate_up_exps
    form: str = "modern"  # modern: attn_k_b, attn_v_b | legacy: attn_kv_b | 2d: attn_kv_b and 2-D attn_k_b, attn_v_b
    keep_kv_b: bool = True  # form 2d: False leaves attn_kv_b out
    q_gain: float = 1.0  # spread of the attention scores
    residual_gain: float = 1.0
    router_gain: float = 2.0
    bias_gain: float = 0.05

    @property
    def n_embd_head_qk(self) -> int:
        return self.n_embd_head_nope + self.n_rot


V2_LITE = Shape()
TINY = Shape(
    n_layer=26, n_embd=256, n_ff=512, n_head=4, n_expert=8, n_expert_used=2, n_expert_shared=1, n_ff_exp=256,
    n_vocab=1024, q_gain=2.0, residual_gain=0.5, router_gain=6.0,
)  # fmt: skip
KINDS = {
    "v2lite": V2_LITE,
    # DeepSeek-V3, 550 GB in Q6_K: for plans, with --sparse
    "v3": Shape(
        n_layer=61, n_embd=7168, n_ff=18432, n_head=128, n_vocab=129280, q_lora_rank=1536, n_layer_dense_lead=3,
        n_expert=256, n_expert_used=8, n_expert_shared=1, n_ff_exp=2048, expert_gating="sigmoid", n_expert_groups=8,
        n_group_used=4, selection_bias=True, expert_weights_norm=True, expert_weights_scale=2.5,
    ),
    # all its attention, hardly any FFN or vocabulary: attention dominates
    "v2lite-attn": dataclasses.replace(V2_LITE, n_ff=512, n_layer_dense_lead=27, n_expert=0, n_vocab=4096),
    # 26 layers, since llama.cpp knows models without q_lora by 26 or 27 layers
    "tiny-mla": TINY,
    "tiny-dense": dataclasses.replace(TINY, n_expert=0, n_layer_dense_lead=26, rope_scaling="none", n_ctx_train=8192),
    "tiny-v3": dataclasses.replace(
        TINY, n_layer=4, q_lora_rank=256, expert_gating="sigmoid", selection_bias=True, expert_weights_norm=True,
        expert_weights_scale=2.5, router_gain=2.0,
    ),
    "nano-mla": dataclasses.replace(
        TINY, n_layer=4, q_lora_rank=64, kv_lora_rank=64, n_rot=32, n_embd_head_nope=32, n_embd_head_v=32,
    ),
}  # fmt: skip

TYPES = {
    kind.name.lower(): kind
    for kind in (T.F32, T.F16, T.BF16, T.Q8_0, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K,
                 T.Q6_K, T.IQ4_NL, T.IQ4_XS)
}  # fmt: skip
QUANTS = (*TYPES, "q4_k_m")
FILE_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k": 12, "q4_k": 15,
    "q4_k_m": 15, "q5_k": 17, "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30, "bf16": 32,
}  # fmt: skip
# what llama-quantize takes instead where a row is no multiple of the block
FALLBACKS = {T.Q2_K: T.Q4_0, T.Q3_K: T.Q4_0, T.Q4_K: T.Q5_0, T.Q5_K: T.Q5_1, T.Q6_K: T.Q8_0, T.IQ4_XS: T.IQ4_NL}

POOL_VALUES = 1 << 21
EXACT_VALUES = 1 << 18  # up to this size a tensor is quantised value by value


@dataclasses.dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]  # numpy order: the input dimension last
    std: float
    mean: float = 0.0


def write(
    path: str | os.PathLike[str],
    shape: Shape,
    quant: str = "q4_k_m",
    *,
    types: Mapping[str, str] | None = None,
    seed: int = 1,
    tokenizer: str | os.PathLike[str] | None = None,
    sparse: bool = False,
) -> dict[str, int]:
    """Write one GGUF file and return the bytes of each weight type in it.

    quant      name of a ggml type for all matrices, or "q4_k_m", llama-quantize's mix with its fallbacks
    types      exceptions: pattern of tensor names ("attn_k_b", "blk.0.ffn_*") -> name of a ggml type
    tokenizer  GGUF file whose byte-level BPE is copied; without it a dummy tokenizer of bytes
    sparse     the data is a hole in the file (all zeros): headers of big models in no time
    """
    tensors = list(list_tensors(shape))
    kinds = [_override(t, types or {}) or pick_type(t, shape, quant) for t in tensors]
    sizes = [_nbytes(t, kind) for t, kind in zip(tensors, kinds, strict=True)]
    writer = gguf.GGUFWriter(path, "deepseek2")
    add_metadata(writer, shape, quant)
    add_tokenizer(writer, shape.n_vocab, tokenizer)
    for t, kind, size in zip(tensors, kinds, sizes, strict=True):
        writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if not sparse:
        filler = Filler(shape, seed)
        for t, kind in zip(tensors, kinds, strict=True):
            writer.write_tensor_data(filler.data(t, kind))
    writer.close()
    if sparse:
        header = _padded(os.path.getsize(path))
        os.truncate(path, header + sum(map(_padded, sizes)))
    totals: dict[str, int] = {}
    for kind, size in zip(kinds, sizes, strict=True):
        totals[kind.name] = totals.get(kind.name, 0) + size
    return totals


def list_tensors(s: Shape) -> Iterator[Tensor]:
    """Every tensor of the file in order."""
    yield Tensor("token_embd.weight", (s.n_vocab, s.n_embd), 1.0)
    yield _norm("output_norm.weight", s.n_embd)
    if not s.tied:
        yield _linear("output.weight", s.n_vocab, s.n_embd, gain=2.0)
    for il in range(s.n_layer + s.n_layer_nextn):
        for t in _attention_tensors(s):
            yield dataclasses.replace(t, name=f"blk.{il}.{t.name}")
        for t in _ffn_tensors(s) if s.n_expert and il >= s.n_layer_dense_lead else _dense_tensors(s):
            yield dataclasses.replace(t, name=f"blk.{il}.{t.name}")
        for t in _nextn_tensors(s) if il >= s.n_layer else ():
            yield dataclasses.replace(t, name=f"blk.{il}.{t.name}")


def _attention_tensors(s: Shape) -> Iterator[Tensor]:
    yield _norm("attn_norm.weight", s.n_embd)
    if s.q_lora_rank:
        yield _linear("attn_q_a.weight", s.q_lora_rank, s.n_embd)
        yield _norm("attn_q_a_norm.weight", s.q_lora_rank)
        yield _linear("attn_q_b.weight", s.n_head * s.n_embd_head_qk, s.q_lora_rank, gain=s.q_gain)
    else:
        yield _linear("attn_q.weight", s.n_head * s.n_embd_head_qk, s.n_embd, gain=s.q_gain)
    yield _linear("attn_kv_a_mqa.weight", s.kv_lora_rank + s.n_rot, s.n_embd)
    yield _norm("attn_kv_a_norm.weight", s.kv_lora_rank)
    std = s.kv_lora_rank**-0.5  # all of these are parts of kv_b, whose input is the latent
    if s.form == "legacy" or (s.form == "2d" and s.keep_kv_b):
        yield Tensor("attn_kv_b.weight", (s.n_head * (s.n_embd_head_nope + s.n_embd_head_v), s.kv_lora_rank), std)
    if s.form == "modern":
        yield Tensor("attn_k_b.weight", (s.n_head, s.kv_lora_rank, s.n_embd_head_nope), std)
        yield Tensor("attn_v_b.weight", (s.n_head, s.n_embd_head_v, s.kv_lora_rank), std)
    if s.form == "2d":
        yield Tensor("attn_k_b.weight", (s.n_head * s.kv_lora_rank, s.n_embd_head_nope), std)
        yield Tensor("attn_v_b.weight", (s.n_head * s.n_embd_head_v, s.kv_lora_rank), std)
    yield _linear("attn_output.weight", s.n_embd, s.n_head * s.n_embd_head_v, gain=s.residual_gain)
    yield _norm("ffn_norm.weight", s.n_embd)


def _dense_tensors(s: Shape) -> Iterator[Tensor]:
    yield _linear("ffn_gate.weight", s.n_ff, s.n_embd)
    yield _linear("ffn_up.weight", s.n_ff, s.n_embd)
    yield _linear("ffn_down.weight", s.n_embd, s.n_ff, gain=s.residual_gain)


def _ffn_tensors(s: Shape) -> Iterator[Tensor]:
    yield _linear("ffn_gate_inp.weight", s.n_expert, s.n_embd, gain=s.router_gain)
    if s.selection_bias:
        yield Tensor("exp_probs_b.bias", (s.n_expert,), s.bias_gain)
    if s.merged_gate_up:
        yield _linear("ffn_gate_up_exps.weight", s.n_expert, 2 * s.n_ff_exp, s.n_embd)
    else:
        yield _linear("ffn_gate_exps.weight", s.n_expert, s.n_ff_exp, s.n_embd)
        yield _linear("ffn_up_exps.weight", s.n_expert, s.n_ff_exp, s.n_embd)
    yield _linear("ffn_down_exps.weight", s.n_expert, s.n_embd, s.n_ff_exp, gain=s.residual_gain)
    if s.n_expert_shared:
        yield _linear("ffn_gate_shexp.weight", s.n_expert_shared * s.n_ff_exp, s.n_embd)
        yield _linear("ffn_up_shexp.weight", s.n_expert_shared * s.n_ff_exp, s.n_embd)
        yield _linear("ffn_down_shexp.weight", s.n_embd, s.n_expert_shared * s.n_ff_exp, gain=s.residual_gain)


def _nextn_tensors(s: Shape) -> Iterator[Tensor]:
    yield _linear("nextn.eh_proj.weight", s.n_embd, 2 * s.n_embd)
    yield _norm("nextn.enorm.weight", s.n_embd)
    yield _norm("nextn.hnorm.weight", s.n_embd)
    yield _norm("nextn.shared_head_norm.weight", s.n_embd)


def _linear(name: str, *shape: int, gain: float = 1.0) -> Tensor:
    return Tensor(name, shape, gain / math.sqrt(shape[-1]))


def _norm(name: str, n: int) -> Tensor:
    return Tensor(name, (n,), 0.1, mean=1.0)


def pick_type(t: Tensor, s: Shape, quant: str) -> T:
    """The type llama-quantize gives this tensor; a pure `quant` goes to every matrix but the router."""
    if len(t.shape) < 2 or t.name.endswith("ffn_gate_inp.weight"):
        return T.F32
    kind = _q4_k_m(t.name, s) if quant == "q4_k_m" else TYPES[quant]
    return fit_type(kind, t.shape[-1])


def fit_type(kind: T, n: int) -> T:
    """`kind`, or the first of its fallbacks whose block divides rows of n values."""
    while n % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = FALLBACKS.get(kind, T.F16)
    return kind


def _q4_k_m(name: str, s: Shape) -> T:
    if name == "output.weight" or (s.tied and name == "token_embd.weight"):
        return T.Q6_K
    if "ffn_down" in name or "attn_kv_b" in name:
        il, eighth = int(name.split(".")[1]), s.n_layer // 8
        if il < eighth or il >= 7 * s.n_layer // 8 or (il - eighth) % 3 == 2:
            return T.Q6_K
    return T.Q4_K


def _override(t: Tensor, types: Mapping[str, str]) -> T | None:
    for pattern, kind in types.items():
        if fnmatch.fnmatch(t.name, f"*{pattern}*"):
            return fit_type(TYPES[kind], t.shape[-1])
    return None


class Filler:
    """Random data for the tensors of one model."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self.shape, self.seed = shape, seed
        self.pools: dict[T, np.ndarray] = {}

    def data(self, t: Tensor, kind: T) -> np.ndarray:
        if any(part in t.name for part in ("attn_k_b", "attn_v_b", "attn_kv_b")):
            return quantise(self._part_of_kv_b(t), kind)
        if "gate_up_exps" in t.name:
            n_expert, rows, n = t.shape
            halves = (dataclasses.replace(t, name=t.name.replace("gate_up", part), shape=(n_expert, rows // 2, n))
                      for part in ("gate", "up"))  # fmt: skip
            return np.concatenate([self.data(half, kind).reshape(n_expert, -1) for half in halves], axis=1)
        n = math.prod(t.shape)
        rng = self._rng(t.name)
        if kind not in HALF_AT or n <= EXACT_VALUES:
            return quantise((rng.standard_normal(n, np.float32) * t.std + t.mean).reshape(t.shape), kind)
        blocks = scale_blocks(self._pool(kind), kind, t.std)
        return blocks[rng.integers(0, len(blocks), n // gguf.GGML_QUANT_SIZES[kind][0])]

    def _part_of_kv_b(self, t: Tensor) -> np.ndarray:
        s = self.shape
        width = s.n_embd_head_nope + s.n_embd_head_v
        rng = self._rng(t.name.rsplit(".attn", 1)[0] + ".attn_kv_b.weight")
        kv_b = rng.standard_normal((s.n_head, width, s.kv_lora_rank), np.float32) * np.float32(t.std)
        if "attn_k_b" in t.name:
            kv_b = kv_b[:, : s.n_embd_head_nope].transpose(0, 2, 1)
        elif "attn_v_b" in t.name:
            kv_b = kv_b[:, s.n_embd_head_nope :]
        return np.ascontiguousarray(kv_b).reshape(t.shape)

    def _pool(self, kind: T) -> np.ndarray:
        if kind not in self.pools:
            block, nbytes = gguf.GGML_QUANT_SIZES[kind]
            values = self._rng(kind.name).standard_normal((POOL_VALUES // block, block), np.float32)
            self.pools[kind] = quantise(values, kind).reshape(-1, nbytes)
        return self.pools[kind]

    def _rng(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])


def add_metadata(w: gguf.GGUFWriter, s: Shape, quant: str) -> None:
    w.add_name(f"synthetic {quant}")
    w.add_file_type(FILE_TYPES[quant])
    w.add_quantization_version(2)
    w.add_block_count(s.n_layer + s.n_layer_nextn)
    if s.n_layer_nextn:
        w.add_nextn_predict_layers(s.n_layer_nextn)
    w.add_context_length(s.n_ctx_train)
    w.add_embedding_length(s.n_embd)
    w.add_feed_forward_length(s.n_ff)
    w.add_head_count(s.n_head)
    w.add_layer_norm_rms_eps(s.rms_eps)
    w.add_vocab_size(s.n_vocab)
    if s.q_lora_rank:
        w.add_q_lora_rank(s.q_lora_rank)
    w.add_kv_lora_rank(s.kv_lora_rank)
    if s.form == "modern":
        w.add_head_count_kv(1)
        w.add_key_length(s.kv_lora_rank + s.n_rot)
        w.add_value_length(s.kv_lora_rank)
        w.add_key_length_mla(s.n_embd_head_qk)
        w.add_value_length_mla(s.n_embd_head_v)
    else:
        w.add_head_count_kv(s.n_head)
        w.add_key_length(s.n_embd_head_qk)
        w.add_value_length(s.n_embd_head_v)
    _add_rope(w, s)
    _add_experts(w, s)


def _add_rope(w: gguf.GGUFWriter, s: Shape) -> None:
    w.add_rope_freq_base(s.rope_freq_base)
    w.add_rope_dimension_count(s.n_rot)
    if s.rope_scaling == "none":
        return
    w.add_rope_scaling_type(gguf.RopeScalingType(s.rope_scaling))
    w.add_rope_scaling_factor(s.rope_factor)
    if s.rope_scaling == "yarn":
        w.add_rope_scaling_orig_ctx_len(s.n_ctx_orig)
    if s.yarn_log_multiplier:
        w.add_rope_scaling_yarn_log_mul(s.yarn_log_multiplier)
    if s.rope_attn_factor != 1.0:
        w.add_rope_scaling_attn_factors(s.rope_attn_factor)


def _add_experts(w: gguf.GGUFWriter, s: Shape) -> None:
    w.add_leading_dense_block_count(s.n_layer_dense_lead if s.n_expert else s.n_layer)
    w.add_expert_feed_forward_length(s.n_ff_exp)
    w.add_expert_shared_count(s.n_expert_shared if s.n_expert else 0)
    w.add_expert_weights_scale(s.expert_weights_scale)
    if not s.n_expert:
        return
    w.add_expert_count(s.n_expert)
    w.add_expert_used_count(s.n_expert_used)
    if s.expert_gating:
        w.add_expert_gating_func(gguf.ExpertGatingFuncType[s.expert_gating.upper()])
    if s.expert_weights_norm:
        w.add_expert_weights_norm(True)
    if s.n_expert_groups:
        w.add_expert_group_count(s.n_expert_groups)
        w.add_expert_group_used_count(s.n_group_used)


def add_tokenizer(w: gguf.GGUFWriter, n_vocab: int, source: str | os.PathLike[str] | None) -> None:
    """Byte-level BPE: copied from `source`, or 256 bytes, two control tokens and one merge."""
    if source:
        fields = gguf.GGUFReader(source).fields
        tokens, types, merges, pre, bos, eos = (
            fields[f"tokenizer.ggml.{key}"].contents()
            for key in ("tokens", "token_type", "merges", "pre", "bos_token_id", "eos_token_id")
        )
        tokens, types = tokens[:n_vocab], types[:n_vocab]
    else:
        tokens = ["<|endoftext|>", "<|bos|>", *_byte_alphabet(), "ab"]
        types = [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * 257
        merges, pre, bos, eos = ["a b"], "gpt-2", 1, 0
    n_padding = n_vocab - len(tokens)
    if n_padding < 0:
        raise ValueError(f"n_vocab is {n_vocab}, but the tokenizer alone has {len(tokens)} tokens")
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(pre)
    w.add_token_list(tokens + [f"[PAD{i}]" for i in range(n_padding)])
    w.add_token_types([int(kind) for kind in types] + [int(gguf.TokenType.UNUSED)] * n_padding)
    w.add_token_merges(merges)
    w.add_bos_token_id(bos)
    w.add_eos_token_id(eos)
    w.add_add_bos_token(False)


def _byte_alphabet() -> list[str]:
    """The printable character that byte-level BPE writes for each byte."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _nbytes(t: Tensor, kind: T) -> int:
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(t.shape) // block * nbytes


def _padded(n: int) -> int:
    return -(-n // 32) * 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--quant", choices=QUANTS, default="q4_k_m")
    parser.add_argument("--form", choices=("modern", "legacy", "2d"), default="modern")
    parser.add_argument("--layers", type=int, help="number of layers, instead of the kind's own")
    parser.add_argument("--tokenizer", type=Path, help="GGUF file to copy a byte-level BPE from")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sparse", action="store_true", help="headers only, the data is a hole in the file")
    args = parser.parse_args()
    shape = dataclasses.replace(KINDS[args.kind], form=args.form)
    if args.layers:
        lead = min(shape.n_layer_dense_lead, args.layers)
        shape = dataclasses.replace(shape, n_layer=args.layers, n_layer_dense_lead=lead)
    start = time.monotonic()
    totals = write(args.out, shape, args.quant, seed=args.seed, tokenizer=args.tokenizer, sparse=args.sparse)
    parts = ", ".join(f"{kind} {size / 2**20:.0f}" for kind, size in totals.items())
    took = time.monotonic() - start
    print(f"{args.out}: {sum(totals.values()) / 2**20:.1f} MiB ({parts}), {took:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
