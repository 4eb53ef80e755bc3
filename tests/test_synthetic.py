"""The writer of synthetic models: what it writes is what it says."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from synthetic import KINDS, TYPES, list_tensors, pick_type, quantise, write_model

from engine.gguf_file import read
from engine.hparams import HParams

# relative RMS error of Gaussian values, as measured, times 1.2
ERRORS = {
    "f32": 0, "f16": 2.5e-4, "bf16": 2e-3, "q8_0": 6.5e-3, "q4_0": 0.104, "q4_1": 0.094, "q5_0": 0.052, "q5_1": 0.046,
    "q2_k": 0.4, "q3_k": 0.19, "q4_k": 0.094, "q5_k": 0.046, "q6_k": 0.023, "iq4_nl": 0.097, "iq4_xs": 0.097,
}  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
def test_quantised_values_come_back(name: str) -> None:
    x = np.random.default_rng(0).standard_normal((40, 512), np.float32)
    x[0], x[1], x[2], x[3, :300] = 0, np.abs(x[1]), -np.abs(x[2]), 0  # zeros and one-sided blocks
    back = gguf.quants.dequantize(quantise(x, TYPES[name]), TYPES[name])
    assert np.sqrt(np.square(back - x).sum() / np.square(x).sum()) <= ERRORS[name]
    assert not back[0].any()


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    first, again, other = (
        write_model(tmp_path / f"{i}.gguf", quant="q4_k_m", seed=seed).read_bytes() for i, seed in enumerate((5, 5, 6))
    )
    assert first == again != other


def test_types_are_chosen_by_pattern(tmp_path: Path) -> None:
    path = write_model(tmp_path / "toy.gguf", quant="q8_0", types={"blk.1.attn_output": "f16", "attn_k_b": "q4_k"})
    kinds = {name: tensor.type.name for name, tensor in read(path).tensors.items()}
    assert kinds["blk.1.attn_output.weight"] == "F16"
    assert kinds["blk.0.attn_output.weight"] == "Q8_0"
    assert kinds["blk.0.attn_k_b.weight"] == "Q5_0"  # rows of 64: no Q4_K
    assert kinds["blk.1.ffn_gate_inp.weight"] == kinds["output_norm.weight"] == "F32"


def test_v2lite_has_the_tensors_and_types_of_the_real_file() -> None:
    """Counts and types of DeepSeek-V2-Lite Q4_K_M as llama-quantize makes it."""
    shape = KINDS["v2lite"]
    kinds = {t.name: pick_type(t, shape, "q4_k_m").name for t in list_tensors(shape)}
    assert len(kinds) == 404
    assert sum(np.prod(t.shape) for t in list_tensors(shape)) == pytest.approx(15.706e9, rel=1e-4)
    assert kinds["output.weight"] == "Q6_K"
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"
    assert kinds["blk.3.attn_k_b.weight"] == "Q5_0"
    assert kinds["blk.3.attn_v_b.weight"] == "Q4_K"
    assert kinds["blk.3.ffn_down_exps.weight"] == "Q5_0"
    more_bits = [il for il in range(1, 27) if kinds[f"blk.{il}.ffn_down_shexp.weight"] == "Q6_K"]
    assert more_bits == [1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26]
    assert {kinds[f"blk.{il}.ffn_down_exps.weight"] for il in more_bits} == {"Q8_0"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_header_is_read(tmp_path: Path, kind: str) -> None:
    path = write_model(tmp_path / "model.gguf", kind, sparse=True)
    hparams, shape = HParams.from_gguf(read(path)), KINDS[kind]
    assert hparams.n_layer == shape.n_layer
    assert hparams.kv_lora_rank == shape.kv_lora_rank
    assert hparams.n_expert == shape.n_expert
