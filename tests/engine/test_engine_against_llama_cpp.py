"""The engine's kernels against llama.cpp: the same file, the same tokens, logits side by side.

Prefill (one step of 72 tokens, attention in MHA mode) and decode (a token at a time, MQA mode) must both agree.
Tolerances are relative RMS of the logits; llama.cpp's own two attention paths differ by up to 6e-4 on these models. For
which models and why: test_reference_against_llama_cpp.py, which also compares tiny-mla's router logits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from compare import assert_relative_rms
from llama_cpp_peer import LlamaCpp, mean_kl, peer_logits, top1_agreement
from synthetic import write_model

from engine import Engine
from engine.model import MIN_MHA_TOKENS

TOKENS = np.random.default_rng(7).integers(2, 258, 72)
MANY = np.random.default_rng(7).integers(2, 258, 400)  # some 280 of them clear: one that flips is 0.4 %
assert len(TOKENS) >= MIN_MHA_TOKENS
pytestmark = pytest.mark.usefixtures("llama_cpp")


def prefill(engine: Engine, tokens: np.ndarray = TOKENS) -> np.ndarray:
    engine.clear()
    return engine.step(tokens, logits="all")


def decode(engine: Engine, tokens: np.ndarray = TOKENS) -> np.ndarray:
    engine.clear()
    return np.stack([engine.step([token]) for token in tokens])


def write_with_peer_logits(path: Path, kind: str, quant: str, form: str, tokens: np.ndarray = TOKENS) -> np.ndarray:
    """Write the model in this form; the peer's logits. llama.cpp loads no 2-D form: there of its modern twin, which has
    the same bytes (legacy files have W_UK quantised the other way round: not the same model at 4 bits)."""
    write_model(path, kind, quant=quant, form="modern" if form == "2d" else form)
    logits = peer_logits(path, tokens)
    if form == "2d":
        write_model(path, kind, quant=quant, form=form)
    return logits


@pytest.mark.parametrize("form", ["modern", "legacy", "2d"])
@pytest.mark.parametrize(("quant", "tolerance"), [("f32", 2e-3), ("f16", 5e-3)])
@pytest.mark.parametrize("kind", ["tiny-dense", "tiny-v3", "nano-mla"])
def test_prefill_and_decode_equal_llama_cpp(
    model_file: Path, kind: str, quant: str, tolerance: float, form: str
) -> None:
    peer = write_with_peer_logits(model_file, kind, quant, form)
    engine = Engine(model_file, type_k="f16")
    assert_relative_rms(prefill(engine), peer, tolerance)
    assert_relative_rms(decode(engine), peer, tolerance)


@pytest.mark.parametrize("form", ["modern", "legacy", "2d"])
@pytest.mark.parametrize("quant", ["q8_0", "q4_k_m"])
def test_a_deep_quantised_model_agrees_in_distribution(model_file: Path, quant: str, form: str) -> None:
    """At Q4_K_M a KL of 4e-3 to 6e-3 was found, the float64 oracle's being 3e-3 to 4e-3, and top-1 of 99 %."""
    peer = write_with_peer_logits(model_file, "tiny-dense", quant, form, MANY)
    engine = Engine(model_file, type_k="f16")
    for ours in (prefill(engine, MANY), decode(engine, MANY)):
        assert mean_kl(ours, peer) < 1e-2
        assert top1_agreement(ours, peer) > 0.97


def test_a_long_prompt_in_ubatches_and_what_follows_equal_llama_cpp(model_file: Path) -> None:
    """600 tokens: the second ubatch attends over rows of the first, and decoding over both."""
    write_model(model_file, "tiny-v3")
    tokens = np.random.default_rng(8).integers(2, 258, 604)
    engine = Engine(model_file, n_ctx=1024, type_k="f16")
    assert engine.model.n_ubatch == 512
    with LlamaCpp(model_file, n_ctx=1024) as peer:
        assert_relative_rms(prefill(engine, tokens[:600]), peer.eval(tokens[:600], 0), 2e-3)
        for it in range(600, 604):
            assert_relative_rms(engine.step(tokens[it : it + 1]), peer.eval(tokens[it : it + 1], it)[0], 2e-3)


def test_the_default_model_agrees_in_distribution() -> None:
    """Its Q8_0 experts and q8_0-like roundings included; on a text of its own kind."""
    engine = Engine(type_k="f16")
    tokens = np.array(engine.tokenize("Once upon a time, a fox found a red kite in the garden. " * 6))
    peer = peer_logits(engine.path, tokens)
    for ours in (prefill(engine, tokens), decode(engine, tokens)):
        assert mean_kl(ours, peer) < 1e-2
        assert top1_agreement(ours, peer) > 0.97
