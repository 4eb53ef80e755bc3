"""Context shift: what stays is exact, whatever type_k is, and a hundred shifts are as good as one.

In a model of one layer a row depends on its token and position alone, so a shifted cache can be built afresh.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare import assert_relative_rms
from synthetic import write_model

from engine import Engine, EngineError
from engine.stream import Stream

TOKENS = np.random.default_rng(3).integers(2, 258, 96)
TYPES_K = ("f16", "bf16", "q8")
ROUNDING = {
    "f16": 5e-4,
    "bf16": 4e-3,
    "q8": 4e-3,
}  # relative RMS of the rope part: half a unit in its last place, and a second


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shift")
    return write_model(folder / "one.gguf", n_layer=1, n_expert=0, q_lora_rank=64, rope_scaling="yarn")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("toy") / "toy.gguf", q_lora_rank=64)


def feed(stream: Stream, tokens: np.ndarray) -> None:
    """In short steps, in which every row has the arithmetic of one alone."""
    for start in range(0, len(tokens), 16):
        stream.step(tokens[start : start + 16])


def built(path: Path, type_k: str, tokens: np.ndarray, first_position: int) -> Engine:
    engine = Engine(path, type_k=type_k)
    engine.cache.first_position = first_position
    feed(engine, tokens)
    return engine


def rope(stream: Stream, il: int = 0) -> np.ndarray:
    """(n_kv, n_rot) f32"""
    bits = stream.cache.rope(il, slice(0, stream.n_kv))
    if stream.type_k == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def latent(stream: Stream, il: int = 0) -> np.ndarray:
    """(n_kv, …) bytes: everything in a row but the rope part."""
    layout = stream.cache.layout
    rows = stream.cache.rows[il][: stream.n_kv]
    return np.delete(rows, np.s_[layout.rope_offset : layout.rope_offset + 2 * layout.n_rot], axis=1)


def turned(x: np.ndarray, engine: Stream, positions: int) -> np.ndarray:
    """(n, n_rot) turned by some positions, in float64."""
    angle = positions * engine.hparams.inv_freq
    a, b = x[:, ::2].astype(np.float64), x[:, 1::2].astype(np.float64)
    pairs = [a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)]
    return np.stack(pairs, axis=2).reshape(x.shape)


@pytest.mark.parametrize("type_k", TYPES_K)
@pytest.mark.parametrize("n_keep", [0, 1, 7])
def test_rows_equal_those_built_at_their_positions(one_layer: Path, type_k: str, n_keep: int) -> None:
    engine = Engine(one_layer, type_k=type_k)
    feed(engine, TOKENS)
    engine.shift(n_keep, 20)
    kept = np.concatenate([TOKENS[:n_keep], TOKENS[n_keep + 20 :]])
    fresh = built(one_layer, type_k, kept, first_position=20)
    assert engine.tokens == kept.tolist() and engine.n_kv == 76 and engine.first_position == 20
    assert (latent(engine) == latent(fresh)).all()
    assert (rope(engine)[n_keep:] == rope(fresh)[n_keep:]).all()
    if n_keep:
        assert_relative_rms(rope(engine)[:n_keep], rope(fresh)[:n_keep], ROUNDING[type_k])


@pytest.mark.parametrize("type_k", TYPES_K)
def test_the_rotation_is_right_to_one_millionth_before_it_is_rounded(one_layer: Path, type_k: str) -> None:
    engine = Engine(one_layer, type_k=type_k)
    feed(engine, TOKENS)
    before = rope(engine)[:30]
    engine.shift(30, 50)
    after, exact = rope(engine)[:30], turned(before, engine, 50)
    half_a_unit = np.abs(exact) * (2**-11 if type_k == "f16" else 2**-8)
    length = np.hypot(before[:, ::2], before[:, 1::2]).repeat(2, axis=1)
    assert (np.abs(after - exact) <= half_a_unit + 1e-6 * length + 2**-25).all()


@pytest.mark.parametrize("type_k", TYPES_K)
def test_a_hundred_shifts_do_not_drift(one_layer: Path, type_k: str) -> None:
    engine = Engine(one_layer, type_k=type_k)
    feed(engine, TOKENS[:20])
    once = rope(engine)[:8]
    for i in range(100):
        engine.step(TOKENS[i % 80 : i % 80 + 11])
        engine.shift(8, 11)
    assert engine.first_position == 1100 and engine.tokens[:8] == TOKENS[:8].tolist()
    assert_relative_rms(rope(engine)[:8], turned(once, engine, 1100), ROUNDING[type_k])


@pytest.mark.parametrize("type_k", TYPES_K)
def test_the_next_logits_are_those_of_a_stream_that_never_held_the_rest(one_layer: Path, type_k: str) -> None:
    engine, fresh = Engine(one_layer, type_k=type_k), Engine(one_layer, type_k=type_k)
    feed(engine, TOKENS)
    engine.shift(5, 40)
    feed(fresh, np.concatenate([TOKENS[:5], TOKENS[45:]]))
    tolerance = {"f16": 1e-3, "bf16": 1e-2, "q8": 1e-2}[type_k]
    assert_relative_rms(engine.step([9]), fresh.step([9]), tolerance)


@pytest.mark.parametrize("type_k", TYPES_K)
def test_in_deep_layers_too_the_latent_is_not_touched(toy: Path, type_k: str) -> None:
    engine = Engine(toy, type_k=type_k)
    engine.step(TOKENS)
    before = [(latent(engine, il).copy(), rope(engine, il)) for il in range(engine.hparams.n_layer)]
    engine.shift(3, 10)
    for il, (bytes_before, rope_before) in enumerate(before):
        assert (latent(engine, il) == np.delete(bytes_before, np.s_[3:13], axis=0)).all()
        assert (rope(engine, il)[3:] == rope_before[13:]).all()
        assert_relative_rms(rope(engine, il)[:3], turned(rope_before[:3], engine, 10), ROUNDING[type_k])


@pytest.mark.parametrize("n_keep_later", [2, 6, 12])
def test_another_n_keep_later_turns_what_was_first_stored(one_layer: Path, n_keep_later: int) -> None:
    engine = Engine(one_layer, type_k="f16")
    feed(engine, TOKENS[:40])
    engine.shift(6, 10)
    engine.shift(n_keep_later, 5)
    kept = np.concatenate([TOKENS[:6], TOKENS[16:40]])
    kept = np.delete(kept, np.s_[n_keep_later : n_keep_later + 5])
    fresh = built(one_layer, "f16", kept, first_position=15)
    assert engine.tokens == kept.tolist()
    assert_relative_rms(rope(engine), rope(fresh), ROUNDING["f16"])


def test_after_truncate_the_next_shift_turns_the_new_rows(one_layer: Path) -> None:
    engine = Engine(one_layer, type_k="f16")
    feed(engine, TOKENS[:40])
    engine.shift(8, 10)
    engine.truncate(4)
    feed(engine, TOKENS[50:80])
    engine.shift(8, 10)
    kept = np.concatenate([TOKENS[:4], TOKENS[50:54], TOKENS[64:80]])
    assert engine.tokens == kept.tolist()
    assert_relative_rms(rope(engine), rope(built(one_layer, "f16", kept, 20)), ROUNDING["f16"])
    engine.clear()
    assert engine.first_position == 0


def test_to_shift_by_nothing_changes_nothing(toy: Path) -> None:
    engine = Engine(toy, type_k="f16")
    good = engine.step(TOKENS)
    engine.shift(5, 0)
    assert engine.n_kv == 96 and engine.first_position == 0
    engine.truncate(95)
    assert_relative_rms(engine.step(TOKENS[95:]), good, 1e-3)


@pytest.mark.parametrize(
    ("n_keep", "n_discard", "message"),
    [
        (-1, 2, "n_keep is -1"),
        (2, -1, "n_discard is -1"),
        (2, 2.0, "n_discard is 2.0"),
        (True, 2, "n_keep is True"),
        (None, 2, "n_keep is None"),
        (2**63, 2**63, "more than n_kv = 10"),
        (4, 7, "n_keep 4 \\+ n_discard 7 are more than n_kv = 10"),
    ],
)
def test_what_cannot_be_shifted_is_refused(toy: Path, n_keep: Any, n_discard: Any, message: str) -> None:
    engine = Engine(toy)
    engine.step(TOKENS[:10])
    rows = engine.cache.rows[0].copy()
    with pytest.raises(EngineError, match=message):
        engine.shift(n_keep, n_discard)
    assert engine.n_kv == 10 and (engine.cache.rows[0] == rows).all()


def test_an_interrupted_shift_leaves_an_empty_stream_that_works(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(toy)
    good = engine.step(TOKENS)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.model.ops, "k_shift", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.shift(5, 10)
    assert engine.n_kv == 0 and engine.tokens == [] and engine.first_position == 0
    assert (engine.step(TOKENS) == good).all()


@pytest.mark.parametrize("n_keep", [None, 0, 9])
def test_a_text_longer_than_the_context_goes_on(n_keep: int | None) -> None:
    engine = Engine(n_ctx=48)
    prompt = engine.tokenize("Once upon a time, there was a little dog named Max.")
    text = "".join(
        engine.generate(prompt, max_tokens=200, temperature=0, context_shift=True, n_keep=n_keep, ignore_eos=True)
    )
    assert engine.stats.n_generated == 200 and engine.stats.finish_reason == "length" and len(text) > 400
    assert engine.first_position > 100 and engine.n_kv == len(engine.tokens) <= 48
    assert engine.tokens[: n_keep or 0] == prompt[: n_keep or 0]


def test_n_keep_must_leave_room() -> None:
    with pytest.raises(EngineError, match="n_keep is 48; expected less than n_ctx = 48"):
        Engine(n_ctx=48).generate("One day", context_shift=True, n_keep=48)


def test_cancel_before_a_shift_is_not_lost_and_one_during_it_waits() -> None:
    engine = Engine(n_ctx=48)
    pieces = engine.generate("Once upon a time", max_tokens=300, context_shift=True, ignore_eos=True)
    while engine.n_kv < 48:
        next(pieces)
    engine.cancel()
    list(pieces)
    assert engine.stats.finish_reason == "cancelled" and 0 < engine.n_kv < 48
    engine.cancel()
    engine.shift(2, 3)
    assert engine.first_position > 3
