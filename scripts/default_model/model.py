"""The default model in torch: deepseek2 as llama.cpp has it, small, to be trained on a CPU.

q-LoRA; one latent and one rope key for all heads (MLA); the first n_layer_dense_lead layers with a dense SwiGLU, the
others with routed experts (sigmoid gate, bias-corrected top-k, normalised weights: DeepSeek-V3 without groups) beside a
shared one. Rope turns pairs (i, i + n_rot / 2) here, for speed; export_gguf.py interleaves the rows.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EMBEDDING_STD = 0.5
HEAD_OF_EMBEDDING = 0.06
EXPERT_ROWS = 128  # oneDNN compiles a primitive per shape, so experts get a multiple of this many rows


@dataclasses.dataclass
class Config:
    """Names as in engine/hparams.py."""

    n_vocab: int = 4096
    n_embd: int = 256
    n_layer: int = 5
    n_layer_dense_lead: int = 1
    n_head: int = 4
    q_lora_rank: int = 128
    kv_lora_rank: int = 128
    n_embd_head_nope: int = 64
    n_rot: int = 32
    n_embd_head_v: int = 64
    n_ff: int = 1024
    n_expert: int = 8
    n_expert_used: int = 2
    n_expert_shared: int = 1
    n_ff_exp: int = 256
    expert_weights_scale: float = 1.0
    rope_freq_base: float = 10000.0
    rms_eps: float = 1e-6
    n_ctx: int = 1024

    @property
    def n_embd_head_qk(self) -> int:
        return self.n_embd_head_nope + self.n_rot


class Model(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.emb = nn.Embedding(config.n_vocab, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, il) for il in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.rms_eps)
        self.head = linear(config.n_embd, config.n_vocab)
        inv_freq = config.rope_freq_base ** (-torch.arange(0, config.n_rot, 2).float() / config.n_rot)
        angles = torch.arange(config.n_ctx).float()[:, None] * inv_freq
        self.register_buffer("cos", angles.cos()[None, :, None], persistent=False)
        self.register_buffer("sin", angles.sin()[None, :, None], persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                std = 0.02 if name.startswith(("emb", "head")) else parameter.shape[-1] ** -0.5
                if name.endswith(("o.weight", "down.weight", "w_down")):
                    std *= (2 * self.config.n_layer) ** -0.5
                nn.init.normal_(parameter, std=std)
        # Wide embeddings keep a token's identity visible in the residual stream; a head that starts proportional to
        # them gives attention one shared copy map for all tokens: names are copied long before 60 maps are learnt.
        nn.init.normal_(self.emb.weight, std=EMBEDDING_STD)
        self.head.weight.data.copy_(self.emb.weight.data * HEAD_OF_EMBEDDING)

    def hidden(self, ids: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, n_embd): what the head is applied to."""
        n_tok = ids.shape[1]
        x = self.emb(ids)
        if torch.is_autocast_enabled("cpu"):
            x = x.bfloat16()
        cos, sin = self.cos[:, :n_tok].to(x.dtype), self.sin[:, :n_tok].to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.norm(x)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, n_vocab) logits."""
        return self.head(self.hidden(ids))


class Block(nn.Module):
    def __init__(self, config: Config, il: int) -> None:
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(config.n_embd, config.rms_eps), MLA(config)
        self.ffn_norm = RMSNorm(config.n_embd, config.rms_eps)
        self.ffn = SwiGLU(config.n_embd, config.n_ff) if il < config.n_layer_dense_lead else MoE(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x), cos, sin)
        return x + self.ffn(self.ffn_norm(x))


class MLA(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.config = c
        self.q_a, self.q_norm = linear(c.n_embd, c.q_lora_rank), RMSNorm(c.q_lora_rank, c.rms_eps)
        self.q_b = linear(c.q_lora_rank, c.n_head * c.n_embd_head_qk)
        self.kv_a, self.kv_norm = linear(c.n_embd, c.kv_lora_rank + c.n_rot), RMSNorm(c.kv_lora_rank, c.rms_eps)
        self.kv_b = linear(c.kv_lora_rank, c.n_head * (c.n_embd_head_nope + c.n_embd_head_v))
        self.o = linear(c.n_head * c.n_embd_head_v, c.n_embd)
        mask = torch.full((c.n_ctx, c.n_ctx), -1e9).triu_(1).bfloat16()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c = self.config
        n_batch, n_tok, _ = x.shape
        q = self.q_b(self.q_norm(self.q_a(x))).view(n_batch, n_tok, c.n_head, c.n_embd_head_qk)
        q_nope, q_rope = q.split([c.n_embd_head_nope, c.n_rot], -1)
        latent, k_rope = self.kv_a(x).split([c.kv_lora_rank, c.n_rot], -1)
        kv = self.kv_b(self.kv_norm(latent)).view(n_batch, n_tok, c.n_head, -1)
        k_nope, v = kv.split([c.n_embd_head_nope, c.n_embd_head_v], -1)
        k_rope = rope(k_rope.view(n_batch, n_tok, 1, c.n_rot), cos, sin).expand(n_batch, n_tok, c.n_head, c.n_rot)
        q = torch.cat((q_nope, rope(q_rope, cos, sin)), -1).transpose(1, 2) * c.n_embd_head_qk**-0.5
        k = torch.cat((k_nope, k_rope), -1).transpose(1, 2)
        # Plain products and softmax: torch's fused CPU kernel took almost half of a step at these sizes.
        scores = torch.matmul(q, k.transpose(2, 3)) + self.mask[:n_tok, :n_tok].to(q.dtype)
        out = torch.matmul(torch.softmax(scores, -1), v.transpose(1, 2))
        return self.o(out.transpose(1, 2).reshape(n_batch, n_tok, c.n_head * c.n_embd_head_v))


class SwiGLU(nn.Module):
    def __init__(self, n_embd: int, n_ff: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = linear(n_embd, n_ff), linear(n_embd, n_ff), linear(n_ff, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MoE(nn.Module):
    """load: tokens that each expert had in the last training step; `bias` is moved by train.py to even it out."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.config = c
        self.router = linear(c.n_embd, c.n_expert)
        self.register_buffer("bias", torch.zeros(c.n_expert))
        self.w_gate = nn.Parameter(torch.empty(c.n_expert, c.n_ff_exp, c.n_embd))
        self.w_up = nn.Parameter(torch.empty(c.n_expert, c.n_ff_exp, c.n_embd))
        self.w_down = nn.Parameter(torch.empty(c.n_expert, c.n_embd, c.n_ff_exp))
        self.shared = SwiGLU(c.n_embd, c.n_ff_exp * c.n_expert_shared)
        self.load = torch.zeros(c.n_expert)

    def forward(self, x: Tensor) -> Tensor:
        c = self.config
        shape, x = x.shape, x.reshape(-1, c.n_embd)
        expert, weight = self._route(x)  # both (rows * n_expert_used,)
        count = torch.bincount(expert, minlength=c.n_expert)
        if self.training:
            self.load = count
        # Rows in the order of their experts, each expert's block padded; padding points at a row of zeros.
        order = expert.argsort(stable=True)
        n_rows, padded = len(x), [-(-n // EXPERT_ROWS) * EXPERT_ROWS for n in count.tolist()]
        shift = torch.tensor([0] + padded[:-1]).cumsum(0) - (count.cumsum(0) - count)
        place = torch.arange(len(order)) + shift[expert[order]]
        source = torch.full((sum(padded),), n_rows)
        source[place] = order // c.n_expert_used
        scale = torch.zeros(sum(padded), dtype=weight.dtype).index_put((place,), weight[order])
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype
        rows = torch.cat((x.to(dtype), torch.zeros(1, c.n_embd, dtype=dtype)))[source]
        outs = [
            F.linear(F.silu(F.linear(h, self.w_gate[e])) * F.linear(h, self.w_up[e]), self.w_down[e])
            for e, h in enumerate(rows.split(padded))
            if len(h)
        ]
        y = torch.cat(outs) * scale[:, None].to(dtype)
        routed = torch.zeros(n_rows + 1, c.n_embd, dtype=dtype).index_add(0, source, y)[:n_rows]
        return (routed + self.shared(x)).view(shape)

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(experts, weights) of all rows, n_expert_used of each, one after another."""
        c = self.config
        with torch.autocast("cpu", enabled=False):
            probability = torch.sigmoid(F.linear(x.float(), self.router.weight.float()))
        expert = (probability.detach() + self.bias).topk(c.n_expert_used, -1).indices
        weight = probability.gather(1, expert)
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20) * c.expert_weights_scale
        return expert.flatten(), weight.flatten()


class RMSNorm(nn.Module):
    def __init__(self, n: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


def linear(n_in: int, n_out: int) -> nn.Linear:
    return nn.Linear(n_in, n_out, bias=False)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, head, n_rot), turned by its position."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
