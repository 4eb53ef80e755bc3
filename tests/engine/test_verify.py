"""What `konly verify` tells: good files are good, bad weights are named, and so is the op of a kernel that is wrong."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import poke
from synthetic import QUANTS, write_model

import cpu_kernels
from engine import Engine, EngineError
from engine.gguf_file import read
from engine.stream import Stream
from engine.verify import ops as ops_of_verify
from engine.verify import verify
from engine.verify.verdict import MODES, watch
from engine.verify.weights import bad_weights

TOKENS = np.random.default_rng(7).integers(2, 258, 9)


@pytest.fixture
def toy(model_file: Path) -> Path:
    return write_model(model_file, quant="q8_0", q_lora_rank=64)


def broken(op: str, when: Callable[..., bool] = lambda *_: True, by: float = 1.5) -> Any:
    """The CPU's ops, one of which writes by times what it should, where `when` holds of its arguments."""
    ops = types.SimpleNamespace(**vars(cpu_kernels))

    def wrong(run: Any, *args: Any, **options: Any) -> None:
        if not when(*args):
            getattr(cpu_kernels, op)(run, *args, **options)
            return
        run.sync()
        getattr(cpu_kernels, op)(run, *args, **options)
        run.sync()
        args[-1][:] *= np.float32(by)

    setattr(ops, op, wrong)
    return ops


def with_ops(engine: Engine, ops: Any) -> Engine:
    engine.model = dataclasses.replace(engine.model, ops=ops)
    return engine


def test_the_default_model_is_good() -> None:
    engine = Engine()
    report = verify(engine, engine.tokenize("Once upon a time there was")[:6])
    assert (report["verdict"], report["problems"]) == ("good", [])
    assert [row["layer"] for row in report["layers"]] == list(range(engine.hparams.n_layer))
    for row in report["layers"]:
        assert 0 < row["attention"] < 5e-4 and 0 < row["ffn"] < 5e-4  # int8 activations; 8e-3 is allowed
    assert report["logits"]["same_top"] == 1.0


@pytest.mark.parametrize("type_k", ["f16", "bf16", "q8"])
def test_every_type_of_cache_is_good(toy: Path, type_k: str) -> None:
    assert verify(Engine(toy, type_k=type_k), TOKENS)["verdict"] == "good"


def test_a_model_without_rounding_is_followed_to_nine_digits(model_file: Path) -> None:
    report = verify(Engine(write_model(model_file, q_lora_rank=64), type_k="f16"), TOKENS)
    assert max(row["attention"] for row in report["layers"]) < 1e-8  # rows in f16, by both
    assert max(row["ffn"] for row in report["layers"]) < 1e-11
    assert report["logits"]["drift"] < 1e-6


def test_each_op_is_compared_over_its_own_inputs(toy: Path) -> None:
    engine = Engine(toy, type_k="q8")
    layers = range(-1, engine.hparams.n_layer)
    seen = [op for mode in MODES for op in watch(engine.model, "q8", TOKENS, mode, layers)[0].seen.values()]
    ops = [op for layer in seen for op in layer]
    assert {name.split()[0] for name, _, _ in ops} == set(ops_of_verify.CHECKS)
    assert all(found <= tolerance / 3 for _, found, tolerance in ops)


@pytest.mark.parametrize(
    ("op", "when", "named"),
    [
        ("swiglu", lambda gate, *_: gate.shape[1] == 320, "layer 0, ffn: NMSE"),
        ("mla_prefill", lambda *_: True, "layer 1, attention: NMSE"),
        ("experts", lambda x, ids, weights, gate, *_: "blk.2" in gate.name, "layer 2, ffn: NMSE"),
        ("route", lambda *_: True, "layer 1, router: NMSE"),
        ("embed_rows", lambda *_: True, "the embedding: NMSE"),
    ],
)
def test_a_wrong_kernel_is_named_with_its_layer(toy: Path, op: str, when: Callable[..., bool], named: str) -> None:
    report = verify(with_ops(Engine(toy), broken(op, when)), TOKENS)
    assert report["verdict"] == "bad kernels"
    (problem,) = [problem for problem in report["problems"] if problem.startswith(named)]
    assert f"; {op}" in problem and "is off" in problem


def test_only_the_layers_of_a_wrong_kernel_are_blamed(toy: Path) -> None:
    ops = broken("experts", lambda x, ids, weights, gate, *_: "blk.2" in gate.name)
    report = verify(with_ops(Engine(toy), ops), TOKENS)
    assert len(report["problems"]) == 1


def test_steps_that_differ_from_their_ops_are_told(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Stream.step
    monkeypatch.setattr(Stream, "step", lambda *args, **options: step(*args, **options) * np.float32(1.001))
    report = verify(Engine(toy), TOKENS)
    assert report["verdict"] == "bad kernels"
    assert [problem.split(":")[0] for problem in report["problems"]] == ["prompt mode", "token mode"]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(EngineError, match="no tokens"):
        verify(Engine(), [])


# ----------------------------------------------------------------------------------------------------------- files


def what(path: Path) -> dict[str, str]:
    return {bad["tensor"]: bad["what"] for bad in bad_weights(read(path).tensors.values())}


@pytest.mark.parametrize("quant", QUANTS)
def test_sound_weights_of_every_type_are_sound(model_file: Path, quant: str) -> None:
    assert what(write_model(model_file, quant=quant, q_lora_rank=64)) == {}


@pytest.mark.parametrize(("quant", "block"), [("q8_0", 34), ("q4_0", 18), ("q5_1", 24)])
def test_a_scale_that_is_not_a_number_is_found(model_file: Path, quant: str, block: int) -> None:
    write_model(model_file, quant=quant, q_lora_rank=64)
    poke(model_file, "blk.1.attn_output.weight", 7 * 288 // 32 * block, np.float16(np.nan).tobytes())
    found = what(model_file)
    assert list(found) == ["blk.1.attn_output.weight"]
    assert found["blk.1.attn_output.weight"].startswith("weights of 1 of ")
    assert found["blk.1.attn_output.weight"].endswith(" blocks are NaN, the first in row 7")


def test_a_flipped_bit_in_an_exponent_is_absurd(toy: Path) -> None:
    scale = np.array(read(toy).tensors["blk.0.ffn_down.weight"].data.reshape(-1)[34 * 20 : 34 * 20 + 2])
    scale.view(np.uint16)[0] |= 0x4000
    poke(toy, "blk.0.ffn_down.weight", 34 * 20, scale.tobytes())
    assert "times what is usual" in what(toy)["blk.0.ffn_down.weight"]


def test_an_infinite_norm_weight_is_found(toy: Path) -> None:
    poke(toy, "blk.2.attn_kv_a_norm.weight", 4 * 100, np.float32(np.inf).tobytes())
    assert what(toy) == {"blk.2.attn_kv_a_norm.weight": "weights of 1 of 4 blocks are infinite, the first in row 0"}


def test_a_hole_of_zeros_is_found_but_not_in_the_embedding(toy: Path) -> None:
    poke(toy, "blk.1.ffn_up_exps.weight", 34 * 100, bytes(100_000))
    poke(toy, "token_embd.weight", 34 * 100, bytes(70_000))
    assert what(toy) == {"blk.1.ffn_up_exps.weight": "97 KiB from row 12 on are zero, as after an interrupted download"}


def test_a_bad_file_is_the_verdict_and_nothing_is_computed(toy: Path) -> None:
    poke(toy, "blk.1.attn_kv_a_mqa.weight", 0, np.float16(np.inf).tobytes())
    report = verify(Engine(toy), TOKENS)
    assert (report["verdict"], report["layers"]) == ("bad file", [])
    assert report["problems"] == [
        "tensor 'blk.1.attn_kv_a_mqa.weight' (Q8_0): weights of 1 of 1,280 blocks are infinite, the first in row 0"
    ]


def test_blocks_that_nobody_computes_are_not_looked_at(model_file: Path) -> None:
    write_model(model_file, quant="q8_0", q_lora_rank=64, n_layer_nextn=1)
    poke(model_file, "blk.3.attn_output.weight", 0, np.float16(np.nan).tobytes())
    assert verify(Engine(model_file), TOKENS)["verdict"] == "good"
