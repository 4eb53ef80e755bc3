"""Where a model runs: 'cpu', 'gpu' or 'auto' -> the modules of ops and of arrays.

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
    Run(n_threads) · prepare(tapes, progress) · Cancelled                        queue, tape and replay; see the leaves
    roofline.limits(run) · attention_kinds(type_k, mha) · matmul_kind(type_id, k, n_tok)            for `konly bench`

What the host does with arrays is in host.py, and in arrays.py of gpu_kernels, under the same names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from . import host
from .errors import BackendError

BACKENDS = ("cpu", "gpu", "auto")


@dataclass(frozen=True)
class Backend:
    """Where a model runs.

    name     'cpu' | 'gpu' | 'gpu, experts on the CPU'
    ops      the vocabulary above
    arrays   host.py or gpu_kernels' arrays.py
    card     its limits, as gpu_kernels has them; None on the CPU
    dry      of a card: the ops with runs that execute nothing, but tell what memory they would take
    experts_on_cpu   the routed experts' weights stay where they are
    n_ubatch   tokens of a prompt that are computed together, unless a user says otherwise
    """

    name: str
    ops: Any
    arrays: ModuleType
    card: Any = None
    dry: Any = None
    experts_on_cpu: bool = False
    n_ubatch: int = 512


class DryOps:
    """A card's ops for a plan: they queue on runs without a card, arrays are in main memory."""

    def __init__(self, ops: ModuleType, card: Any):
        self._ops, self._card = ops, card
        self.arrays = host

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def Run(self, n_threads: int | None = None) -> Any:
        return self._ops.DryRun(self._card)


def cpu() -> Backend:
    """BackendError, one sentence, on a CPU that no kernel can be compiled for."""
    import cpu_kernels

    if not cpu_kernels.isa.ISA.f16:
        raise BackendError(
            f"the CPU ({cpu_kernels.isa.CPU_NAME}) has no F16C instructions, which the kernels need (Intel Core since"
            " 2012, AMD since 2011); a virtual machine may hide them: give it the host's CPU model"
        )
    return Backend("cpu", cpu_kernels, host)


def gpu() -> Backend:
    """BackendError, one sentence, without a card that can be used."""
    import gpu_kernels

    try:
        card = gpu_kernels.device.limits()
    except gpu_kernels.GpuError as error:
        raise BackendError(f"backend 'gpu' asked for, but {error}; or use --backend cpu") from None
    return on_card(gpu_kernels, card)


def on_card(ops: ModuleType, card: Any) -> Backend:
    return Backend("gpu", ops, ops.arrays, card, DryOps(ops, card), n_ubatch=2048)


def hybrid(of_card: Backend) -> Backend:
    """The card, with the routed experts computed by the CPU's kernels."""
    from .hybrid import HybridOps

    ops, dry = (HybridOps(ops, cpu().ops) for ops in (of_card.ops, of_card.dry))
    return replace(of_card, name="gpu, experts on the CPU", ops=ops, dry=dry, experts_on_cpu=True)


def candidates(backend: str, experts: str | None, has_experts: bool) -> list[Backend]:
    """What may be tried, best first. experts: 'gpu' | 'cpu', where the routed ones are computed; None: as it fits.

    BackendError for other names, for experts 'cpu' on a model without, and without a card that was asked for.
    """
    if backend not in BACKENDS:
        raise BackendError(f"backend is {backend!r}; expected cpu, gpu or auto")
    if experts not in (None, "cpu", "gpu"):
        raise BackendError(f"experts is {experts!r}; expected cpu or gpu")
    if backend == "cpu":
        if experts == "gpu":
            raise BackendError("experts on the GPU asked for, but the backend is cpu; use --backend gpu")
        return [cpu()]
    if experts is not None and not has_experts:
        raise BackendError("this model has no routed experts, so there is nothing to place; leave --experts out")
    try:
        card = gpu()
    except BackendError:
        if backend == "gpu":
            raise
        return [cpu()]
    found = [] if experts == "cpu" else [card]
    if experts == "cpu" or (experts is None and has_experts and backend == "auto"):
        found.append(hybrid(card))
    return found if backend == "gpu" else [*found, cpu()]
