"""What `konly inspect` tells about a file, without running it: `describe(path)` gives plain data, ready for JSON.

Opens every sound GGUF file. One that konly cannot run is described as far as it goes, and `problems` says why not.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from typing import Any

from . import memory
from .errors import EngineError
from .gguf_file import GGUFFile, read
from .hparams import HParams
from .k_cache import TYPES_K, KCacheLayout
from .tensor import GGML_TYPES, QuantTensor

FORMS = {
    "modern": "attn_k_b and attn_v_b for each head",
    "2d": "attn_k_b and attn_v_b with the heads flattened; runs K-only",
    "legacy": "attn_kv_b, as converters wrote it until April 2025; llama.cpp gives such a file a full per-head cache, "
    "here it runs K-only",
}
RESERVE = 256 << 20  # for Python, the kernels and scratch, when n_ctx is fitted into memory


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Shapes, parameters, tensor types, and what the K-cache costs. Sizes in bytes, contexts in tokens.

    {"path", "nbytes", "name", "arch", "tensor_types": {type: {"count", "nbytes", "runs"}}, "n_params", "problems": […]}
    and, if konly knows the architecture: "hparams", "form", "form_note", "n_params_active", "mtp_nbytes",
    "memory_available", "k_cache": {type_k: {"bytes_per_token", "n_ctx_train_nbytes", "n_ctx_fits"}}
    """
    file = read(path)
    told: dict[str, Any] = {
        "path": str(file.path),
        "nbytes": file.nbytes,
        "name": _string(file, "general.name"),
        "arch": _string(file, "general.architecture"),
        "tensor_types": _tensor_types(file),
        "n_params": sum(map(_n_params, file.tensors.values())),
        "problems": [],
    }
    try:
        hparams = HParams.from_gguf(file)
    except EngineError as error:
        told["problems"].append(str(error).removeprefix(f"{file.path}: "))
        return told
    mtp = [tensor for tensor in file.tensors.values() if _layer(tensor) >= hparams.n_layer]
    used = used_tensors(file, hparams)
    told |= {
        "hparams": dataclasses.asdict(hparams),
        "form": hparams.form,
        "form_note": FORMS[hparams.form],
        "n_params": sum(map(_n_params, used)),
        "n_params_active": sum(_n_params_active(tensor, file, hparams) for tensor in used),
        "mtp_nbytes": sum(tensor.nbytes for tensor in mtp),
        "memory_available": memory.available(),
    }
    told["k_cache"] = {type_k: _k_cache(hparams, type_k, file.nbytes, told["memory_available"]) for type_k in TYPES_K}
    told["problems"] += [
        f"tensor {tensor.name!r} has type {tensor.type.name}, which has no CPU kernel; requantise to Q4_K"
        for tensor in used
        if tensor.type.id not in GGML_TYPES
    ]
    return told


def used_tensors(file: GGUFFile, hparams: HParams) -> list[QuantTensor]:
    """Those that a step reads: neither MTP blocks nor attn_kv_b beside attn_k_b and attn_v_b."""
    return [tensor for tensor in file.tensors.values() if _layer(tensor) < hparams.n_layer and not _twin(tensor, file)]


def _string(file: GGUFFile, key: str) -> str | None:
    value = file.metadata.get(key)
    return value if isinstance(value, str) else None


def _tensor_types(file: GGUFFile) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for tensor in file.tensors.values():
        entry = found.setdefault(tensor.type.name, {"count": 0, "nbytes": 0, "runs": tensor.type.id in GGML_TYPES})
        entry["count"] += 1
        entry["nbytes"] += tensor.nbytes
    return dict(sorted(found.items(), key=lambda item: -item[1]["nbytes"]))


def _n_params(tensor: QuantTensor) -> int:
    return math.prod(tensor.shape)


def _layer(tensor: QuantTensor) -> int:
    """Index of the block that a tensor belongs to; -1: none."""
    match = re.match(r"blk\.(\d+)\.", tensor.name)
    return int(match[1]) if match else -1


def _twin(tensor: QuantTensor, file: GGUFFile) -> bool:
    """Whether this is attn_kv_b in a file which has the same weights as attn_k_b and attn_v_b, too."""
    return ".attn_kv_b." in tensor.name and tensor.name.replace("_kv_b", "_k_b") in file.tensors


def _n_params_active(tensor: QuantTensor, file: GGUFFile, hparams: HParams) -> int:
    """Parameters that one token meets in matrix products: of the experts those used, of token_embd's rows none."""
    if tensor.name == "token_embd.weight" and "output.weight" in file.tensors:
        return 0
    if "_exps." in tensor.name and hparams.n_expert:
        return _n_params(tensor) * hparams.n_expert_used // hparams.n_expert
    return _n_params(tensor)


def _k_cache(hparams: HParams, type_k: str, weights_nbytes: int, available: int | None) -> dict[str, Any]:
    layout = KCacheLayout(
        n_layer=hparams.n_layer,
        n_ctx=hparams.n_ctx_train,
        kv_lora_rank=hparams.kv_lora_rank,
        n_rot=hparams.n_rot,
        type_k=type_k,
    )
    fits = None
    if available is not None:
        fits = max(0, available - weights_nbytes - RESERVE) // layout.bytes_per_token
    return {
        "bytes_per_token": layout.bytes_per_token,
        "n_ctx_train_nbytes": layout.bytes_per_token * hparams.n_ctx_train,
        "n_ctx_fits": None if fits is None else min(fits, hparams.n_ctx_train),
    }
