"""Weights to the card: what a model takes there, whether that fits, and the upload.

The sizes are those that the engine itself asks for: weights are uploaded to, and steps are recorded on, a card that is
not there (gpu_kernels/dry.py), so nothing is estimated but what CUDA keeps for itself, kernels and graphs: `SLACK`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .backend import Backend, candidates
from .errors import BackendError, UnsupportedModelError
from .hparams import HParams
from .k_cache import KCache, KCacheLayout
from .layers.ffn import MoE
from .models.deepseek2 import DeepSeek2
from .step import Buffers, Step
from .tensor import QuantTensor

SLACK = 192 << 20  # kernels, graphs, the allocator's rounding: 2 MiB a piece at most
DRAFTED = 16  # rows of logits that are kept in pinned memory and on the card
ROUNDING = 512  # bytes, of CuPy's allocator
Progress = Callable[[int, int, str], None]


class Shape(NamedTuple):
    """What an engine's default stream is to be. n_ubatch: None for the backend's own."""

    n_ctx: int
    type_k: str
    n_ubatch: int | None
    min_mha_tokens: int


def choose(
    weights: DeepSeek2, backend: str, experts: str | None, shape: Shape, loading: Progress | None = None
) -> tuple[Backend, DeepSeek2]:
    """The backend to run on, and the weights where it wants them. BackendError, UnsupportedModelError."""
    chosen, parts = candidate(weights, backend, experts, shape)
    if chosen.card is not None:
        check_fits(parts, chosen)
    return chosen, place(weights, chosen, loading)


def candidate(
    weights: DeepSeek2, backend: str, experts: str | None, shape: Shape, free: int | None = None
) -> tuple[Backend, dict[str, int]]:
    """The first backend that the model fits, or the last one; and what it takes of the card there, as need() says.

    free: bytes; None for what is. UnsupportedModelError if the last has no kernel for something.
    """
    *better, last = candidates(backend, experts, any(isinstance(layer, MoE) for layer in weights.ffn))
    for one in better:
        try:
            parts = need(weights, one, shape)
        except UnsupportedModelError:
            continue
        if sum(parts.values()) <= (one.arrays.free_nbytes() if free is None else free):
            return one, parts
    return last, need(weights, last, shape) if last.card is not None else {}


def place(weights: DeepSeek2, backend: Backend, progress: Progress | None = None) -> DeepSeek2:
    """The weights where the backend wants them. progress: called as progress(bytes done, of all, tensor)."""
    if backend.card is None:
        return weights
    run = backend.ops.Run(1)
    known: dict[int, Any] = {}
    weights.map(lambda tensor: known.setdefault(id(tensor), tensor), backend.experts_on_cpu)
    total, done = sum(tensor.nbytes for tensor in known.values()), 0

    def upload(tensor: Any) -> Any:
        nonlocal done
        if progress is not None:
            progress(done, total, getattr(tensor, "name", "norm"))
        done += tensor.nbytes
        return _upload(backend.ops, run, tensor)

    placed = weights.map(upload, backend.experts_on_cpu)
    if progress is not None:
        progress(total, total, "")
    return placed


def _upload(ops: Any, run: Any, tensor: Any) -> Any:
    return ops.upload(run, tensor) if isinstance(tensor, QuantTensor) else run.upload(tensor)


def need(weights: DeepSeek2, backend: Backend, shape: Shape) -> dict[str, int]:
    """Bytes on the card by part: weights, k_cache, buffers, workspace, slack."""
    hp, dry = weights.hparams, backend.dry
    run = dry.Run()
    shape = shape._replace(n_ubatch=shape.n_ubatch or backend.n_ubatch)
    try:
        placed = weights.map(lambda tensor: _upload(dry, run, tensor), backend.experts_on_cpu)
        of_weights = run.kept
        buffers, workspace = of_steps(placed, dry, shape)
    except ValueError as error:
        raise UnsupportedModelError(f"this model has something that no GPU kernel runs: {error}") from error
    layer = layout_of(hp, shape).nbytes // hp.n_layer
    return {
        "weights": of_weights,
        "k_cache": hp.n_layer * (-(-layer // ROUNDING) * ROUNDING),
        "buffers": buffers + DRAFTED * 4 * hp.n_vocab,
        "workspace": workspace,
        "slack": SLACK,
    }


def of_steps(weights: DeepSeek2, ops: Any, shape: Shape, n_threads: int | None = None) -> tuple[int, int]:
    """Bytes of a stream's buffers, and of what ops work in: one token, one with 15 drafts, a ubatch of a prompt."""
    hp, n_ctx = weights.hparams, shape.n_ctx
    cache = KCache(layout_of(hp, shape))
    assert shape.n_ubatch is not None
    n_ubatch = min(shape.n_ubatch, n_ctx)
    longest = min(n_ubatch, shape.min_mha_tokens - 1)  # that absorbs
    buffers, workspace = Buffers(n_ubatch, n_absorbed=longest), 0
    for n_tok in {1, min(16, n_ubatch), max(1, longest), n_ubatch}:
        run = ops.Run(n_threads)
        parts = [(slice(0, n_tok), cache.rows)]
        mha = n_tok >= shape.min_mha_tokens
        step = Step(ops, run, buffers, hp, parts, shape.type_k, n_ctx - n_tok, mha)
        weights.forward(step, np.empty((1, hp.n_vocab), np.float32))
        run.take()
        workspace += run.workspace_nbytes
    cache.release()
    return buffers.nbytes, workspace


def check_fits(parts: dict[str, int], backend: Backend) -> None:
    """BackendError, one sentence with the sizes, unless the parts fit into what is free on the card."""
    total, free = sum(parts.values()), backend.arrays.free_nbytes()
    if total <= free:
        return
    gib = {name: f"{n / 2**30:,.2f}" for name, n in {**parts, "total": total, "free": free}.items()}
    raise BackendError(
        f"{backend.card.name}: this run takes {gib['total']} GiB of the card's memory (weights {gib['weights']},"
        f" K-cache {gib['k_cache']}, buffers {gib['buffers']}, workspace {gib['workspace']}), but {gib['free']} GiB are"
        " free; lower n_ctx, take type_k q8, or use --experts cpu or --backend cpu"
    )


def layout_of(hp: HParams, shape: Shape) -> KCacheLayout:
    return KCacheLayout(hp.n_layer, shape.n_ctx, hp.kv_lora_rank, hp.n_rot, shape.type_k)
