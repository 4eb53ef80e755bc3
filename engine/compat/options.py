"""What Llama's constructor takes: arguments with a meaning here, without one, and those that are refused.

llama-cpp-python has some fifty. Those that set how fast or where something runs are taken, with a warning if somebody
asked for something that does not happen; those that would change what the model says are refused, unless they say what
is so anyway.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from ..errors import EngineError
from ..hparams import HParams

LLAMA_DEFAULT_SEED = 0xFFFFFFFF  # like -1: another one each time

GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_BF16 = 0, 1, 8, 30
TYPES_K = {None: "f16", GGML_TYPE_F16: "f16", GGML_TYPE_Q8_0: "q8", GGML_TYPE_BF16: "bf16"}

# How it runs, not what it says. The values are those that ask for nothing, () means any; others get a warning.
WITHOUT_EFFECT: dict[str, tuple[object, ...]] = {
    "split_mode": (),
    "main_gpu": (0, None),
    "tensor_split": (None,),
    "use_mmap": (True, None),
    "use_mlock": (False, None),
    "n_threads_batch": (),
    "offload_kqv": (),
    "flash_attn": (),
    "op_offload": (),
    "swa_full": (),
    "kv_unified": (),
    "no_perf": (),
    "numa": (False, None),
    "f16_kv": (True, None),
    "n_parts": (-1, None),
    "n_seq_max": (1, None),
    "low_vram": (False, None),
    "mul_mat_q": (),
    "lora_base": (None, ""),
    "lora_scale": (1.0, None),
    "device": (None,),
}

# What it says. The values are those that change nothing; others are refused.
WITH_EFFECT: dict[str, tuple[object, ...]] = {
    "lora_path": (None, ""),
    "kv_overrides": (None, {}),
    "tokenizer": (None,),
    "vocab_only": (False, None),
    "embedding": (False, None),
    "rope_scaling_type": (-1, None),
    "pooling_type": (-1, None),
    "attention_type": (-1, None),
    "yarn_ext_factor": (-1.0, None),
    "yarn_attn_factor": (1.0, -1.0, None),
    "yarn_beta_fast": (32.0, -1.0, None),
    "yarn_beta_slow": (1.0, -1.0, None),
    "spm_infill": (False, None),
}


class LlamaError(EngineError, ValueError):
    """What llama-cpp-python says by a ValueError."""


def check(given: Mapping[str, Any]) -> None:
    """Of the arguments that Llama does not use itself; LlamaError for what cannot be had."""
    for name, value in given.items():
        if name in WITH_EFFECT:
            if value not in WITH_EFFECT[name]:
                raise LlamaError(f"{name}={value!r} cannot be had here; leave it at {WITH_EFFECT[name][0]!r}")
        elif name in WITHOUT_EFFECT:
            if WITHOUT_EFFECT[name] and value not in WITHOUT_EFFECT[name]:
                warnings.warn(f"{name}={value!r} has no effect in konly", stacklevel=3)
        elif name not in ("rope_freq_base", "rope_freq_scale", "yarn_orig_ctx", "type_v"):
            warnings.warn(f"the argument {name} is not known to konly, and has no effect", stacklevel=3)


def check_rope(given: Mapping[str, Any], hp: HParams) -> None:
    """The file's RoPE is the only one. 0 means it, and so do 10000 and 1, which LangChain sends for every model."""
    for name, of_file, defaults in (
        ("rope_freq_base", hp.rope_freq_base, (0.0, 10000.0)),
        ("rope_freq_scale", 1.0 / hp.rope_factor, (0.0, 1.0)),
        ("yarn_orig_ctx", hp.n_ctx_orig, (0,)),
    ):
        value = given.get(name)
        if value is not None and value not in defaults and not math.isclose(value, of_file, rel_tol=1e-6):
            raise LlamaError(f"{name}={value!r}, but the file's is {of_file:g}, and no other can be had; leave it at 0")


def backend_of(n_gpu_layers: int | None) -> str:
    """'cpu' of 0 or None; 'gpu' of -1 or any number of layers: a card gets all of them."""
    if n_gpu_layers is not None and (not isinstance(n_gpu_layers, int) or isinstance(n_gpu_layers, bool)):
        raise LlamaError(f"n_gpu_layers is {n_gpu_layers!r}; expected 0 for the CPU, or -1 for a card")
    return "gpu" if n_gpu_layers else "cpu"


def type_k_of(type_k: Any, type_v: Any = None) -> str:
    """'f16' | 'bf16' | 'q8' of what llama-cpp-python takes: a number of ggml's, or konly's name."""
    name = TYPES_K.get(type_k) if not isinstance(type_k, str) else type_k
    if name is None or name not in TYPES_K.values():
        raise LlamaError(f"type_k is {type_k!r}; expected GGML_TYPE_F16 (1), GGML_TYPE_Q8_0 (8) or GGML_TYPE_BF16 (30)")
    if type_v is not None and type_v != type_k:
        raise LlamaError(f"type_v is {type_v!r}; there is no V-cache: leave it out, or give type_k's {type_k!r}")
    return name
