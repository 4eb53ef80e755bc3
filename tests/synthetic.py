"""Toy GGUF files for tests: `write_model(path, **options)`, deterministic by seed.

Every option of scripts/make_synthetic.py's Shape can be given, and `quant`, `types` and `seed` of its `write`:

    write_model(tmp_path / "toy.gguf", n_expert=0)                                      # dense, F32
    write_model(path, kind="tiny-v3", form="legacy", quant="q8_0", types={"attn_output": "iq4_xs"})
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))  # last, for it holds a test.py
import make_synthetic
from make_synthetic import KINDS, QUANTS, TYPES, Shape, list_tensors, pick_type, write
from quantise import quantise

__all__ = [
    "KINDS",
    "QUANTS",
    "TOY",
    "TYPES",
    "Shape",
    "list_tensors",
    "make_synthetic",
    "pick_type",
    "quantise",
    "write_model",
]

# two or three layers of every kind of block; odd where nothing forbids it; rows of 64, 96, 128 and 256 values
TOY = Shape(
    n_layer=3, n_embd=256, n_ff=320, n_head=3, n_vocab=300, n_ctx_train=4096,
    kv_lora_rank=128, n_rot=32, n_embd_head_nope=64, n_embd_head_v=96,
    rope_scaling="none", n_layer_dense_lead=1,
    n_expert=8, n_expert_used=3, n_expert_shared=1, n_ff_exp=128, bias_gain=0.2,
    q_gain=1.5, residual_gain=0.7,
)  # fmt: skip


def write_model(
    path: Path,
    kind: str = "toy",
    *,
    quant: str = "f32",
    types: dict[str, str] | None = None,
    seed: int = 1,
    sparse: bool = False,
    **options: Any,
) -> Path:
    """Write the model `kind` ("toy" or one of make_synthetic's) with these options changed; returns the path.

    sparse  the data is a hole in the file, all zeros: for tests of headers
    """
    shape = dataclasses.replace(TOY if kind == "toy" else KINDS[kind], **options)
    write(path, shape, quant, types=types, seed=seed, sparse=sparse)
    return path
