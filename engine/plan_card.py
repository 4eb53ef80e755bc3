"""plan_card(): what running a model takes of a card's memory. `konly plan --backend gpu`.

The sizes are placing.py's, the ones that an Engine itself is held to when it opens.
"""

from __future__ import annotations

import os
from typing import Any

from . import models
from .backend import cpu
from .engine import DEFAULT_N_CTX, MAX_N_CTX, default_model
from .gguf_file import read
from .hparams import HParams
from .k_cache import TYPES_K
from .layers.ffn import MoE
from .model import MIN_MHA_TOKENS
from .placing import Shape, candidate, need
from .plan import largest


def plan_card(
    path: str | os.PathLike[str] | None,
    backend: str = "gpu",
    experts: str | None = None,
    ram: int | None = None,
    n_ctx: int | None = None,
    type_k: str = "q8",
    n_ubatch: int | None = None,
) -> dict[str, Any] | None:
    """Plain data, ready for JSON; None if 'auto' comes to the CPU. Sizes in bytes; ram: None for what is free there.

    {"model", "backend", "card", "n_ctx", "type_k", "n_ctx_train", "ram", "fits": bool,
     "on_card": {"weights", "k_cache", "buffers", "workspace", "slack"}, "total",
     "experts": bytes of those that stay in main memory, "largest_n_ctx": {type_k: n, 0 if nothing fits}, "times": None}
    BackendError without a card.
    """
    path = os.fsdecode(path if path is not None else default_model())
    file = read(path)
    hp = HParams.from_gguf(file)
    weights = models.build(hp, file, cpu().ops)
    routed = [layer for layer in weights.ffn if isinstance(layer, MoE)]
    shape = Shape(n_ctx or min(hp.n_ctx_train, DEFAULT_N_CTX), type_k, n_ubatch, MIN_MHA_TOKENS)
    one, parts = candidate(weights, backend, experts, shape, ram)
    if one.card is None:
        return None
    free = one.arrays.free_nbytes() if ram is None else ram

    def longest(kind: str) -> int:
        over = lambda n: sum(need(weights, one, shape._replace(n_ctx=n, type_k=kind)).values()) - free  # noqa: E731
        return largest(over, min(hp.n_ctx_train, MAX_N_CTX))

    return {
        "model": os.path.basename(path),
        "backend": one.name,
        "card": one.card.name,
        "n_ctx": shape.n_ctx,
        "type_k": type_k,
        "n_ctx_train": hp.n_ctx_train,
        "ram": free,
        "fits": sum(parts.values()) <= free,
        "on_card": parts,
        "total": sum(parts.values()),
        "experts": sum(w.nbytes for m in routed for w in (m.gate, m.up, m.down)) if one.experts_on_cpu else 0,
        "largest_n_ctx": {kind: longest(kind) for kind in TYPES_K},
        "times": None,
    }
