"""The oracle itself against llama.cpp: what both compute from one file must agree.

Tolerances are relative RMS of the logits.  llama.cpp's own two attention paths differ by up to 6e-4 on these
models, from f16 queries and probabilities; the toys, 3 layers deep, were found within 2e-4 (legacy 4e-4).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from compare import assert_relative_rms
from llama_cpp_peer import LlamaCpp, mean_kl, peer_logits, top1_agreement
from synthetic import QUANTS, write_model
from variants import VARIANTS

from engine import reference
from engine.gguf_file import read
from engine.hparams import HParams

TOKENS = np.random.default_rng(7).integers(2, 258, 72)  # 64 and more go through llama.cpp's f32 attention
pytestmark = pytest.mark.usefixtures("llama_cpp")


@pytest.mark.parametrize("form", ["modern", "legacy", "2d"])
@pytest.mark.parametrize(("quant", "tolerance"), [("f32", 2e-3), ("f16", 5e-3)])
@pytest.mark.parametrize("kind", ["tiny-dense", "tiny-v3", "nano-mla"])
def test_logits_equal_llama_cpp(model_file: Path, kind: str, quant: str, tolerance: float, form: str) -> None:
    write_model(model_file, kind, quant=quant, form=form)
    ours = our_logits(model_file)
    if form == "2d":  # which llama.cpp does not load; the same seed is the same model
        write_model(model_file, kind, quant=quant, form="legacy")
    assert_relative_rms(ours, peer_logits(model_file, TOKENS), tolerance)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_equals_llama_cpp(model_file: Path, options: dict[str, object]) -> None:
    write_model(model_file, **{"q_lora_rank": 64, **options})
    assert_relative_rms(our_logits(model_file), peer_logits(model_file, TOKENS), 1e-3)


@pytest.mark.parametrize("quant", QUANTS)
def test_every_weight_type_is_read_as_llama_cpp_reads_it(model_file: Path, quant: str) -> None:
    """llama.cpp rounds activations to 8 bits for quantised weights: 1.3e-2 to 2.1e-2, doubled."""
    write_model(model_file, quant=quant, q_lora_rank=64)
    assert_relative_rms(our_logits(model_file), peer_logits(model_file, TOKENS), 4e-2)


@pytest.mark.parametrize("form", ["modern", "legacy"])
@pytest.mark.parametrize("quant", ["q8_0", "q4_k_m"])
def test_a_deep_quantised_model_agrees_in_distribution(model_file: Path, quant: str, form: str) -> None:
    write_model(model_file, "tiny-dense", quant=quant, form=form)
    ours, peer = our_logits(model_file), peer_logits(model_file, TOKENS)
    assert mean_kl(ours, peer) < 1e-2
    assert top1_agreement(ours, peer) > 0.97


def test_router_logits_agree_until_an_expert_flips(model_file: Path) -> None:
    """26 layers of random experts are chaotic after the first near-tie that rounding decides otherwise."""
    write_model(model_file, "tiny-mla")
    record: reference.Record = {}
    our_logits(model_file, record=record)
    with LlamaCpp(model_file, record=["ffn_moe_logits"]) as peer:
        peer.eval(TOKENS, 0)
        theirs = {il: peer.recorded[il, "ffn_moe_logits"] for il in range(1, 26)}
    n_agreeing = 0
    for il, logits in theirs.items():
        ours = record[il, "router_logits"]
        assert_relative_rms(ours, logits, 2e-3)
        flipped = (chosen(ours) != chosen(logits)).any(axis=1)
        if flipped.any():
            best = np.sort(ours[flipped], axis=1)
            assert (best[:, -2] - best[:, -3]).max() < 0.02 * ours.std()  # a near-tie, as said
            break
        n_agreeing += 1
    assert n_agreeing >= 8  # 12 and more were found


def chosen(router_logits: np.ndarray) -> np.ndarray:
    return np.sort(np.argsort(-router_logits, axis=1)[:, :2], axis=1)


def test_decode_from_past_rows_equals_llama_cpp(model_file: Path) -> None:
    write_model(model_file, "tiny-v3")
    file = read(model_file)
    past: list[np.ndarray] = []
    ours = partial(reference.forward, HParams.from_gguf(file), file.tensors, past=past, round_row=reference.round_f16)
    with LlamaCpp(model_file) as peer:
        assert_relative_rms(ours(TOKENS[:40]), peer.eval(TOKENS[:40], 0), 2e-3)
        for it in range(40, 46):
            assert_relative_rms(ours(TOKENS[it : it + 1]), peer.eval(TOKENS[it : it + 1], it), 2e-3)


def test_neox_rotation_is_found_out(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(model_file, "nano-mla")
    monkeypatch.setattr(reference, "rope", partial(reference.rope, style="neox"))
    with pytest.raises(AssertionError, match="nmse"):
        assert_relative_rms(our_logits(model_file), peer_logits(model_file, TOKENS), 0.1)


def our_logits(path: Path, record: reference.Record | None = None) -> np.ndarray:
    file = read(path)
    return reference.forward(
        HParams.from_gguf(file), file.tensors, TOKENS, round_row=reference.round_f16, record=record
    )
