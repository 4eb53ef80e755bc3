"""The engine against the float64 oracle: every variant, weight type and type_k; and what a user may rely on."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from compare import assert_close
from synthetic import QUANTS, write_model
from variants import VARIANTS

from engine import ContextFullError, Engine, EngineError, reference
from engine.gguf_file import read
from engine.hparams import HParams

TOKENS = np.random.default_rng(7).integers(2, 258, 72)
ROUND = {"f16": reference.round_f16, "bf16": reference.round_bf16, "q8": None}


def oracle(path: Path, tokens: np.ndarray = TOKENS, type_k: str = "f16") -> np.ndarray:
    file = read(path)
    return reference.forward(HParams.from_gguf(file), file.tensors, tokens, round_row=ROUND[type_k])


def assert_relative_rms(ours: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert_close(ours, expected, atol=np.inf, nmse=tolerance**2, dtype=np.float32)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("toy") / "toy.gguf", q_lora_rank=64)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_equals_the_oracle(tmp_path: Path, options: dict[str, object]) -> None:
    """F32 weights and f16 rows compute in f32; of rows that round differently 3e-4 were found."""
    path = write_model(tmp_path / "model.gguf", **{"q_lora_rank": 64, **options})
    assert_relative_rms(Engine(path).step(TOKENS, logits="all"), oracle(path), 2e-3)


@pytest.mark.parametrize("form", ["modern", "legacy", "2d"])
@pytest.mark.parametrize("quant", QUANTS)
def test_every_weight_type_equals_the_oracle(tmp_path: Path, quant: str, form: str) -> None:
    """Activations are rounded to int8 or bf16 for quantised weights, as in peers: the same 4e-2 as there."""
    path = write_model(tmp_path / "model.gguf", quant=quant, q_lora_rank=64, form=form)
    tokens = TOKENS[:20]
    engine = Engine(path)
    prefill = engine.step(tokens, logits="all")
    engine.clear()
    decode = np.stack([engine.step([t]) for t in tokens])
    expected = oracle(path, tokens)
    tolerance = 2e-3 if quant in ("f32", "f16") else 4e-2
    assert_relative_rms(prefill, expected, tolerance)
    assert_relative_rms(decode, expected, tolerance)


@pytest.mark.parametrize(("type_k", "tolerance"), [("f16", 2e-3), ("bf16", 2e-2), ("q8", 4e-2)])
def test_every_type_k_equals_the_oracle(toy: Path, type_k: str, tolerance: float) -> None:
    engine = Engine(toy, type_k=type_k)
    expected = oracle(toy, type_k=type_k)
    assert_relative_rms(engine.step(TOKENS, logits="all"), expected, tolerance)
    engine.clear()
    assert_relative_rms(np.stack([engine.step([t]) for t in TOKENS]), expected, tolerance)


@pytest.mark.parametrize("type_k", ["f16", "bf16", "q8"])
@pytest.mark.parametrize("chunks", [[72], [1] * 72, [7, 65], [16, 17, 39], [71, 1]])
def test_any_chunking_gives_the_same_logits(toy: Path, type_k: str, chunks: list[int]) -> None:
    tolerance = {"f16": 1e-3, "bf16": 2e-2, "q8": 4e-2}[type_k]
    whole = Engine(toy, type_k=type_k).step(TOKENS, logits="all").astype(np.float64)
    engine, pieces = Engine(toy, type_k=type_k), np.split(TOKENS, np.cumsum(chunks)[:-1])
    assert_relative_rms(np.concatenate([engine.step(p, logits="all") for p in pieces]), whole, tolerance)


@pytest.mark.parametrize("type_k", ["f16", "bf16", "q8"])
@pytest.mark.parametrize("quant", ["f32", "q4_k_m"])
def test_results_are_the_same_bits_for_any_number_of_threads(tmp_path: Path, quant: str, type_k: str) -> None:
    path = write_model(tmp_path / "model.gguf", quant=quant, q_lora_rank=64)

    def logits(n_threads: int) -> np.ndarray:
        engine = Engine(path, type_k=type_k, n_threads=n_threads)
        return np.concatenate(
            [engine.step(TOKENS, logits="all"), *(engine.step([t], logits="all") for t in TOKENS[:5])]
        )

    one, two, three = logits(1), logits(2), logits(3)
    assert (one == two).all() and (one == three).all()


@pytest.mark.parametrize("quant", ["f32", "q4_k_m"])
def test_up_to_16_rows_in_a_step_are_the_bits_of_one_at_a_time(tmp_path: Path, quant: str) -> None:
    path = write_model(tmp_path / "model.gguf", quant=quant, q_lora_rank=64)
    engine = Engine(path)
    alone = np.stack([engine.step([t]) for t in TOKENS[:16]])
    engine.clear()
    assert (engine.step(TOKENS[:16], logits="all") == alone).all()


def test_logits_last_is_the_last_row_of_all(toy: Path) -> None:
    engine = Engine(toy)
    every = engine.step(TOKENS[:10], logits="all")
    engine.clear()
    last = engine.step(TOKENS[:10])
    assert every.shape == (10, 300) and last.shape == (300,)
    assert (every[-1] == last).all()


def test_long_prompts_go_through_in_ubatches(toy: Path) -> None:
    tokens = np.tile(TOKENS, 3)
    whole = Engine(toy).step(tokens, logits="all").astype(np.float64)
    assert_relative_rms(Engine(toy, n_ubatch=50).step(tokens, logits="all"), whole, 1e-3)


def test_truncate_takes_back(toy: Path) -> None:
    engine = Engine(toy)
    engine.step(TOKENS[:10])
    first = engine.step(TOKENS[10:11])
    engine.truncate(10)
    assert engine.n_kv == 10
    assert (engine.step(TOKENS[10:11]) == first).all()


def test_streams_do_not_see_each_other(toy: Path) -> None:
    engine = Engine(toy)
    alone = engine.step(TOKENS[:12])
    engine.clear()
    other = engine.stream()
    other.step(TOKENS[20:40])
    assert (engine.step(TOKENS[:12]) == alone).all()
    assert (engine.n_kv, other.n_kv) == (12, 20)


def test_a_prompt_that_does_not_fit_is_refused_before_any_work(toy: Path) -> None:
    engine = Engine(toy, n_ctx=16)
    engine.step(TOKENS[:4])
    with pytest.raises(ContextFullError, match="prompt of 13 tokens after the 4 in the cache does not fit n_ctx=16"):
        engine.step(TOKENS[:13])
    assert engine.n_kv == 4
    engine.step(TOKENS[:12])
    assert engine.n_kv == 16


@pytest.mark.parametrize("tokens", [[], [300], [-1], [[1, 2]], [1.5], ["a"], None])
def test_wrong_tokens_are_refused(toy: Path, tokens: object) -> None:
    engine = Engine(toy)
    with pytest.raises(EngineError):
        engine.step(tokens)  # type: ignore[arg-type]
    assert engine.n_kv == 0


def test_one_stream_is_for_one_thread_at_a_time(toy: Path) -> None:
    engine = Engine(toy)
    engine._busy.acquire()
    with pytest.raises(EngineError, match="in use by another thread"):
        engine.step([1])


def test_two_streams_in_two_threads_give_what_each_gives_alone(toy: Path) -> None:
    engine = Engine(toy)
    alone = [Engine(toy).step(TOKENS[i : i + 20]) for i in (0, 30)]
    streams, results = [engine.stream(), engine.stream()], {}

    def work(i: int) -> None:
        for _ in range(10):
            streams[i].clear()
            results[i] = streams[i].step(TOKENS[30 * i : 30 * i + 20])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all((results[i] == alone[i]).all() for i in range(2))


def test_cancel_leaves_a_usable_stream(toy: Path) -> None:
    engine = Engine(toy, n_ctx=4096)
    engine.step(TOKENS)
    good = engine.step([5])
    engine.truncate(72)
    timer = threading.Timer(0.02, engine.cancel)
    timer.start()
    try:
        engine.step(np.tile(TOKENS, 40))
    except EngineError as error:
        assert "cancelled" in str(error)
    timer.join()
    engine.truncate(72)
    assert (engine.step([5]) == good).all()
