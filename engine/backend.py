"""Where a model runs: 'cpu', 'gpu' or 'auto' -> the module of ops.

Both backends are modules with one vocabulary; the signatures of the wrappers in cpu_kernels are the contract. An op
queues work on `run`, its first argument. Arrays are (rows, …) f32 with the last axis contiguous; weights have
`.data` (…, row bytes) u8, `.type.id` and `.shape`.

    embed_rows(run, weight, tokens, out)                 out[t] = weight[tokens[t]]
    rms_norm(run, x, weight, eps, out)
    matmul(run, weight, x, out, accumulate=False)        out (n_tok, m) = x (n_tok, k) @ weight (m, k).T; or lists of
                                                         weights and outs that share x
    matmul_heads(run, weight, x, out)                    out[t, h] = weight[h] @ x[t, h]
    rope(run, x, cos_sin, out, neox=False)               out may be x
    k_store(run, kv_a, norm_weight, eps, cos_sin, positions, rows, type_k, kv_lora_rank, n_rot, neox)
    k_shift(run, rope, cos_sin, rows, type_k, kv_lora_rank, n_rot, neox)         turns the rope part of the first rows
    rotate_query(run, q, norm_weight, kv_lora_rank) · unrotate_output(run, x, norm_weight)          for type_k q8
    mla_decode(run, q, rows, type_k, n_kv, kv_lora_rank, n_rot, kq_scale, out)                      MQA mode
    mla_prefill(run, q, rows, type_k, n_past, kv_lora_rank, n_rot, kq_scale, w_uk, w_uv, norm_weight, out)  MHA mode
    swiglu(run, gate, up, out)
    route(run, logits, bias, gating, n_group, n_group_used, norm, scale, ids, weights)
    experts(run, x, ids, weights, gate, up, down, out)   out += the experts' weighted sum
    roofline.limits(run) · attention_kinds(type_k, mha) · matmul_kind(type_id, k, n_tok)            for `konly bench`
"""

from __future__ import annotations

from types import ModuleType

from .errors import BackendError


def ops(backend: str) -> ModuleType:
    """The ops of a backend. 'auto' takes what is there: the CPU, until the GPU path exists."""
    if backend in ("cpu", "auto"):
        import cpu_kernels

        return cpu_kernels
    if backend == "gpu":
        raise BackendError("backend 'gpu' asked for, but this version has no GPU path; use --backend cpu")
    raise BackendError(f"backend is {backend!r}; expected cpu, gpu or auto")
