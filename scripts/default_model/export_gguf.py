"""Write a checkpoint of train.py as GGUF, tokenizer included: export_gguf.py LAST.pt TOKENIZER.json OUT-Q8_0.gguf q8_0

attn_kv_b is cut into the absorbed pair attn_k_b, attn_v_b, and rope rows go from halves to interleaved pairs, as
llama.cpp has them for deepseek2. Types: f32, f16, q8_0; norms, biases and the router stay F32.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import gguf
import numpy as np
import torch
from build_tokenizer import BOS_ID, EOS_ID
from gguf import GGMLQuantizationType as T
from gguf import LlamaFileType
from model import Config

TYPES = {
    "f32": (T.F32, LlamaFileType.ALL_F32),
    "f16": (T.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (T.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
NAME = "tiny-mla-tales"
DESCRIPTION = "Tiny MLA+MoE story model trained from scratch for engine tests and demos"
CHAT_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}\n\n{% endfor %}"
EOS_TEXT = "<|endoftext|>"  # a name that llama.cpp knows as the end of a generation
CONTROL, NORMAL = 3, 1  # tokenizer.ggml.token_type


def tensors(c: Config, state: dict[str, torch.Tensor]) -> Iterator[tuple[str, np.ndarray]]:
    """(GGUF's name, f32 array in numpy's order of axes)."""

    def weight(name: str) -> np.ndarray:
        return state[name].float().numpy()

    half = np.arange(c.n_rot // 2)
    interleaved = np.stack((half, half + c.n_rot // 2), 1).ravel()  # the row that each new row comes from
    yield "token_embd.weight", weight("emb.weight")
    yield "output_norm.weight", weight("norm.weight")
    yield "output.weight", weight("head.weight")
    for il in range(c.n_layer):
        ours, theirs = f"blocks.{il}.", f"blk.{il}."
        yield theirs + "attn_norm.weight", weight(ours + "attn_norm.weight")
        yield theirs + "attn_q_a.weight", weight(ours + "attn.q_a.weight")
        yield theirs + "attn_q_a_norm.weight", weight(ours + "attn.q_norm.weight")
        q_b = weight(ours + "attn.q_b.weight").reshape(c.n_head, c.n_embd_head_qk, c.q_lora_rank).copy()
        q_b[:, c.n_embd_head_nope :] = q_b[:, c.n_embd_head_nope + interleaved]
        yield theirs + "attn_q_b.weight", q_b.reshape(-1, c.q_lora_rank)
        kv_a = weight(ours + "attn.kv_a.weight").copy()
        kv_a[c.kv_lora_rank :] = kv_a[c.kv_lora_rank + interleaved]
        yield theirs + "attn_kv_a_mqa.weight", kv_a
        yield theirs + "attn_kv_a_norm.weight", weight(ours + "attn.kv_norm.weight")
        kv_b = weight(ours + "attn.kv_b.weight").reshape(c.n_head, -1, c.kv_lora_rank)
        yield theirs + "attn_k_b.weight", kv_b[:, : c.n_embd_head_nope].transpose(0, 2, 1)  # (head, kv_lora, nope)
        yield theirs + "attn_v_b.weight", kv_b[:, c.n_embd_head_nope :]  # (head, v, kv_lora)
        yield theirs + "attn_output.weight", weight(ours + "attn.o.weight")
        yield theirs + "ffn_norm.weight", weight(ours + "ffn_norm.weight")
        if il < c.n_layer_dense_lead:
            for part in ("gate", "up", "down"):
                yield f"{theirs}ffn_{part}.weight", weight(f"{ours}ffn.{part}.weight")
        else:
            yield theirs + "ffn_gate_inp.weight", weight(ours + "ffn.router.weight")
            yield theirs + "exp_probs_b.bias", weight(ours + "ffn.bias")
            for part in ("gate", "up", "down"):
                yield f"{theirs}ffn_{part}_exps.weight", weight(f"{ours}ffn.w_{part}")
                yield f"{theirs}ffn_{part}_shexp.weight", weight(f"{ours}ffn.shared.{part}.weight")


def add_metadata(w: gguf.GGUFWriter, c: Config, file_type: LlamaFileType) -> None:
    w.add_name(NAME)
    w.add_description(DESCRIPTION)
    w.add_file_type(file_type)
    w.add_quantization_version(2)
    w.add_context_length(c.n_ctx)
    w.add_embedding_length(c.n_embd)
    w.add_block_count(c.n_layer)
    w.add_vocab_size(c.n_vocab)
    w.add_feed_forward_length(c.n_ff)
    w.add_head_count(c.n_head)
    w.add_head_count_kv(1)
    w.add_layer_norm_rms_eps(c.rms_eps)
    w.add_rope_freq_base(c.rope_freq_base)
    w.add_rope_dimension_count(c.n_rot)
    w.add_leading_dense_block_count(c.n_layer_dense_lead)
    w.add_q_lora_rank(c.q_lora_rank)
    w.add_kv_lora_rank(c.kv_lora_rank)
    w.add_key_length(c.kv_lora_rank + c.n_rot)
    w.add_value_length(c.kv_lora_rank)
    w.add_key_length_mla(c.n_embd_head_qk)
    w.add_value_length_mla(c.n_embd_head_v)
    w.add_expert_count(c.n_expert)
    w.add_expert_used_count(c.n_expert_used)
    w.add_expert_shared_count(c.n_expert_shared)
    w.add_expert_feed_forward_length(c.n_ff_exp)
    w.add_expert_weights_scale(c.expert_weights_scale)
    w.add_expert_weights_norm(True)
    w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def add_tokenizer(w: gguf.GGUFWriter, path: str, n_vocab: int) -> None:
    with open(path, encoding="utf-8") as file:
        model = json.load(file)["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    assert len(tokens) == n_vocab
    tokens[EOS_ID] = EOS_TEXT
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tokens)
    w.add_token_types([CONTROL, CONTROL] + [NORMAL] * (n_vocab - 2))
    w.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    w.add_bos_token_id(BOS_ID)
    w.add_eos_token_id(EOS_ID)
    w.add_pad_token_id(EOS_ID)
    w.add_add_bos_token(True)
    w.add_add_eos_token(False)
    w.add_chat_template(CHAT_TEMPLATE)


def main(checkpoint: str, tokenizer: str, out: str, kind: str) -> None:
    state = torch.load(checkpoint, weights_only=False, map_location="cpu")
    config = Config(**state["config"])
    tensor_type, file_type = TYPES[kind]
    w = gguf.GGUFWriter(out, "deepseek2")
    add_metadata(w, config, file_type)
    add_tokenizer(w, tokenizer, config.n_vocab)
    for name, array in tensors(config, state["model"]):
        array = np.ascontiguousarray(array, dtype=np.float32)
        if array.ndim == 1 or "ffn_gate_inp" in name:
            w.add_tensor(name, array)
        else:
            w.add_tensor(name, gguf.quants.quantize(array, tensor_type), raw_dtype=tensor_type)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    print(f"{out}: after {state['n_steps']} steps, {state['n_tokens']} tokens")


if __name__ == "__main__":
    main(*sys.argv[1:])
