"""The engine against the float64 oracle: every variant, weight type and type_k; and what a user may rely on."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from compare import assert_relative_rms
from gguf_bytes import U16, RawTensor, gguf_bytes, key
from synthetic import QUANTS, write_model
from variants import VARIANTS

from engine import ContextFullError, Engine, EngineError, UnsupportedModelError, reference
from engine.gguf_file import read
from engine.hparams import HParams

TOKENS = np.random.default_rng(7).integers(2, 258, 72)
ROUND = {"f16": reference.round_f16, "bf16": reference.round_bf16, "q8": None}


def oracle(path: Path, tokens: np.ndarray = TOKENS, type_k: str = "f16") -> np.ndarray:
    file = read(path)
    return reference.forward(HParams.from_gguf(file), file.tensors, tokens, round_row=ROUND[type_k])


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("toy") / "toy.gguf", q_lora_rank=64)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_equals_the_oracle(tmp_path: Path, options: dict[str, object]) -> None:
    """F32 weights and f16 rows compute in f32; of rows that round differently 3e-4 were found."""
    path = write_model(tmp_path / "model.gguf", **{"q_lora_rank": 64, **options})
    assert_relative_rms(Engine(path, type_k="f16").step(TOKENS, logits="all"), oracle(path), 2e-3)


@pytest.mark.parametrize("form", ["modern", "legacy", "2d"])
@pytest.mark.parametrize("quant", QUANTS)
def test_every_weight_type_equals_the_oracle(tmp_path: Path, quant: str, form: str) -> None:
    """Activations are rounded to int8 or bf16 for quantised weights, as in peers: the same 4e-2 as there."""
    path = write_model(tmp_path / "model.gguf", quant=quant, q_lora_rank=64, form=form)
    tokens = TOKENS[:20]
    engine = Engine(path, type_k="f16")
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


@pytest.mark.parametrize("type_k", ["f16", "bf16", "q8"])
def test_rows_beyond_n_kv_are_not_read(toy: Path, type_k: str) -> None:
    def logits(fill: int) -> np.ndarray:
        engine = Engine(toy, n_ctx=256, type_k=type_k)
        for rows in engine.cache.rows:
            rows[:] = fill  # 0xFF: NaN in f16, in bf16 and as a scale in f32
        return np.concatenate([engine.step(TOKENS, logits="all"), engine.step(TOKENS[:3], logits="all")])

    assert (logits(0xFF) == logits(0)).all()


def test_a_split_model_gives_the_logits_of_the_whole(toy: Path) -> None:
    whole = gguf.GGUFReader(toy)
    keys = [
        b"".join(part.tobytes() for part in f.parts) for f in whole.fields.values() if not f.name.startswith("GGUF.")
    ]
    tensors = [RawTensor(t.name, t.shape.tolist(), int(t.tensor_type), t.data.tobytes()) for t in whole.tensors]
    parts = [tensors[:7], tensors[7:]]
    for i, part in enumerate(parts):
        split = [key("split.no", i, U16), key("split.count", 2, U16), key("split.tensors.count", len(tensors))]
        path = toy.with_name(f"split-{i + 1:05}-of-00002.gguf")
        path.write_bytes(gguf_bytes((keys if i == 0 else []) + split, part))
    first = toy.with_name("split-00001-of-00002.gguf")
    assert (Engine(first).step(TOKENS[:20]) == Engine(toy).step(TOKENS[:20])).all()


def test_a_10_gb_model_opens_at_once(tmp_path: Path) -> None:
    """0.1 to 0.2 s were measured; its weights are a hole in the file, and nothing reads them."""
    path = write_model(tmp_path / "v2lite.gguf", "v2lite", quant="q4_k_m", sparse=True)
    assert path.stat().st_size > 10e9
    begin = time.perf_counter()
    engine = Engine(path, n_ctx=163_840, type_k="f16")
    assert time.perf_counter() - begin < 1.0
    assert (engine.cache.layout.row_stride, engine.cache_bytes) == (1152, 0)


def test_a_legacy_file_runs_from_a_cache_of_the_same_size(tmp_path: Path) -> None:
    """llama.cpp gives such a file K and V of each head: 3 x (96 + 96) values instead of 160 here."""
    engines = [
        Engine(write_model(tmp_path / f"{form}.gguf", form=form, q_lora_rank=64), type_k="f16")
        for form in ("modern", "legacy")
    ]
    for engine in engines:
        engine.step(TOKENS)
    assert engines[0].cache_bytes == engines[1].cache_bytes == 72 * 3 * 160 * 2


def test_logits_last_is_the_last_row_of_all(toy: Path) -> None:
    engine = Engine(toy)
    every = engine.step(TOKENS[:10], logits="all")
    engine.clear()
    last = engine.step(TOKENS[:10])
    assert every.shape == (10, 300) and last.shape == (300,)
    assert every.dtype == last.dtype == np.float32
    assert (every[-1] == last).all()


def test_long_prompts_go_through_in_ubatches(toy: Path) -> None:
    tokens = np.tile(TOKENS, 3)
    whole = Engine(toy, type_k="f16").step(tokens, logits="all").astype(np.float64)
    assert_relative_rms(Engine(toy, n_ubatch=50, type_k="f16").step(tokens, logits="all"), whole, 1e-3)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_ctx": 0}, "n_ctx is 0; expected an integer from 1 to 16,777,216"),
        ({"n_ctx": 1 << 25}, "n_ctx is 33554432; expected"),
        ({"n_ctx": 10.0}, "n_ctx is 10.0; expected"),
        ({"n_ctx": math.nan}, "n_ctx is nan; expected"),
        ({"n_ctx": True}, "n_ctx is True; expected"),
        ({"n_threads": -1}, "n_threads is -1; expected a positive integer"),
        ({"n_threads": "2"}, "n_threads is '2'; expected"),
        ({"n_ubatch": 0}, "n_ubatch is 0; expected"),
        ({"n_ubatch": "9"}, "n_ubatch is '9'; expected"),
        ({"type_k": "q4"}, "type_k is 'q4'; expected one of f16, bf16, q8"),
        ({"type_k": None}, "type_k is None; expected"),
        ({"backend": "tpu"}, "backend is 'tpu'; expected cpu, gpu or auto"),
        ({"experts": "tpu", "backend": "gpu"}, "experts is 'tpu'; expected cpu or gpu"),
        ({"experts": "gpu"}, "experts on the GPU asked for, but the backend is cpu"),
    ],
)
def test_wrong_arguments_are_refused_by_name(toy: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Engine(toy, **arguments)


def test_wrong_arguments_of_another_stream_are_refused(toy: Path) -> None:
    engine = Engine(toy)
    for arguments in ({"n_ctx": 0}, {"type_k": ""}):
        with pytest.raises(EngineError):
            engine.stream(**arguments)  # type: ignore[arg-type]


def test_any_integer_and_any_kind_of_path_will_do(toy: Path) -> None:
    for path in (toy, str(toy), str(toy).encode()):
        assert Engine(path, n_ctx=np.int64(32), n_threads=np.uint8(1)).n_ctx == 32  # type: ignore[arg-type]


def test_far_more_threads_than_there_are_change_nothing(toy: Path) -> None:
    many = Engine(toy, n_threads=10_000)
    assert many.n_threads <= 64
    assert (many.step(TOKENS[:5]) == Engine(toy, n_threads=1).step(TOKENS[:5])).all()


def test_a_shape_without_kernel_is_an_engine_error(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(toy)

    def refuse(*_: object) -> None:
        raise ValueError("rows of 17 values; expected a multiple of 16")

    monkeypatch.setattr(engine.model.weights, "forward", refuse)
    with pytest.raises(UnsupportedModelError, match="no kernel runs: rows of 17 values"):
        engine.step([1])


def test_an_interrupted_recording_leaves_a_usable_stream(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, forward = Engine(toy), type(Engine(toy).model.weights).forward

    def interrupt(self: Any, step: Any, logits: Any) -> None:
        step.ops.swiglu(step.run, step.x, step.x, step.x)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(engine.model.weights), "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.step(TOKENS)
    monkeypatch.setattr(type(engine.model.weights), "forward", forward)
    assert (engine.step(TOKENS) == Engine(toy).step(TOKENS)).all()


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
