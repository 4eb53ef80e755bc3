"""experts under the shim, against float64 products of dequantised weights."""

from __future__ import annotations

import dataclasses
import importlib

import numpy as np
import pytest
from compare import assert_close
from shim import ShimRun, instances
from weights import BF16, F32, Q4_K, Q6_K, Q8_0, Weight, rows, weight

from engine import reference
from gpu_kernels import can_stream, experts, experts_streamed, streamed, upload
from gpu_kernels.device import CARDS, Limits

matmul, moe = (importlib.import_module(f"gpu_kernels.{name}") for name in ("matmul", "moe"))
instances(matmul.matvec(t, 1) for t in (F32, BF16, Q8_0, Q4_K, Q6_K))
instances(v.kernel(CARDS[90], t) for v in moe.choose(CARDS[90], [Q8_0], 9) for t in (BF16, Q8_0, Q4_K, Q6_K))

NMSE_PROMPT = 1e-4  # bf16 products, one after another


def added(
    x: np.ndarray, ids: np.ndarray, weights: np.ndarray, mats: list[Weight], order: int = 0, limits: Limits = CARDS[90]
) -> tuple[np.ndarray, np.ndarray]:
    """What experts adds, and what it should."""
    before = rows(*x.shape, seed=9)
    out, run = before.copy(), ShimRun(order, limits)
    experts(run, x, ids, weights, *(upload(run, w) for w in mats), out)
    gate, up, down = mats
    expected = reference.moe(
        x.astype(np.float64), ids, weights, lambda e: (gate.values[e], up.values[e], down.values[e])
    )
    return out.astype(np.float64) - before, expected


def choice(n_tok: int, n_expert: int, n_used: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.argsort(rows(n_tok, n_expert, seed=5), axis=1)[:, :n_used].astype(np.int32)
    return np.ascontiguousarray(ids), np.abs(rows(n_tok, n_used, seed=6))


@pytest.mark.parametrize("n_tok", [1, 3, 17])
@pytest.mark.parametrize(
    "types",
    [(Q8_0, Q8_0, Q8_0), (Q4_K, Q4_K, Q6_K), (BF16, BF16, Q8_0), (Q8_0, F32, F32)],
    ids=["Q8_0", "Q4_K_Q6_K", "BF16_Q8_0", "mixed"],
)
def test_experts_are_added(types: tuple[int, int, int], n_tok: int) -> None:
    n_embd, n_ff = 256, 256 if types[2] == Q6_K else 96
    shapes = [(7, n_ff, n_embd), (7, n_ff, n_embd), (7, n_embd, n_ff)]
    mats = [weight(t, *shape, seed=i) for i, (t, shape) in enumerate(zip(types, shapes))]
    found, expected = added(rows(n_tok, n_embd), *choice(n_tok, 7, 3), mats, -1)
    assert_close(found, expected, rtol=np.inf, nmse=1e-3)  # int8 activations twice


def test_experts_in_f32_are_exact() -> None:
    mats = [weight(F32, 9, *shape, seed=i) for i, shape in enumerate([(96, 64), (96, 64), (64, 96)])]
    found, expected = added(rows(5, 64), *choice(5, 9, 2), mats)
    assert_close(found, expected, rtol=np.inf, nmse=1e-12)


@pytest.mark.parametrize("order", [1, 2, -1])
@pytest.mark.parametrize("n_tok, n_expert, n_used", [(17, 30, 6), (70, 3, 2), (130, 5, 1), (40, 1, 1)])
def test_a_prompt_s_experts_in_several_orders_of_threads(n_tok: int, n_expert: int, n_used: int, order: int) -> None:
    mats = [weight(t, n_expert, *shape) for t, shape in ((Q8_0, (96, 160)), (BF16, (96, 160)), (Q8_0, (160, 96)))]
    found, expected = added(rows(n_tok, 160), *choice(n_tok, n_expert, n_used), mats, order)
    assert_close(found, expected, rtol=np.inf, nmse=NMSE_PROMPT)


@pytest.mark.parametrize("limits", [CARDS[75], CARDS[90]], ids=lambda card: card.name)
def test_an_expert_with_all_tokens_and_others_with_none(limits: Limits) -> None:
    mats = [weight(Q8_0, 4, *shape, seed=i) for i, shape in enumerate([(32, 64), (32, 64), (64, 32)])]
    ids = np.full((70, 2), 2, np.int32)
    ids[:, 1] = 0
    found, expected = added(rows(70, 64), ids, np.abs(rows(70, 2, seed=6)), mats, limits=limits)
    assert_close(found, expected, rtol=np.inf, nmse=NMSE_PROMPT)


@pytest.mark.parametrize("n_tok, n_expert, n_used, tokens", [(600, 9, 3, 32), (600, 256, 8, 128), (1, 3, 2, 64)])
def test_slots_are_sorted_and_tiles_cover_each_expert(n_tok: int, n_expert: int, n_used: int, tokens: int) -> None:
    ids = choice(n_tok, n_expert, n_used)[0]
    ids[ids == 1] = 0 if n_expert > 3 else 1  # expert 1 has none
    n_slots, n_tiles = ids.size, ids.size // tokens + n_expert
    order, place, tiles = (np.full(n, -1, np.int32) for n in (n_slots, n_slots, 4 * n_tiles))
    args = (ids, n_slots, 0, tokens, order, place, tiles)
    ShimRun(-1).launch(moe.SORT_SLOTS, (n_expert,), moe.THREADS_SORT, moe.SHARED_SORT, args)
    assert np.array_equal(order, np.argsort(ids.ravel(), kind="stable"))
    assert np.array_equal(place[order], np.arange(n_slots))
    covered = [(e, p) for e, first, last, _ in tiles.reshape(-1, 4) for p in range(first, last)]
    assert covered == [(e, p) for p, e in enumerate(np.sort(ids.ravel()))]
    assert all(last - first <= tokens for _, first, last, _ in tiles.reshape(-1, 4))


@pytest.mark.parametrize("limits", CARDS.values(), ids=lambda card: card.name)
@pytest.mark.parametrize("slots, tokens", [(4, 32), (48, 64), (384, 128)])
def test_tiles_are_as_long_as_experts_fill_them(limits: Limits, slots: int, tokens: int) -> None:
    variants = moe.choose(limits, [Q4_K, Q4_K, Q6_K], slots)
    assert [v.tokens for v in variants] == [min(tokens, 64) if limits.sm == 75 else tokens] * 3
    assert all(v.fits(limits, t) for v, t in zip(variants, (Q4_K, Q4_K, Q6_K)))


def test_experts_of_other_shapes_are_refused() -> None:
    run = ShimRun()
    mats = [upload(run, weight(F32, 2, *shape)) for shape in ((32, 64), (32, 64), (32, 64))]
    with pytest.raises(ValueError, match="experts of shapes"):
        experts(run, rows(1, 64), np.zeros((1, 1), np.int32), rows(1, 1), *mats, rows(1, 64))


def test_tiles_of_some_experts_are_all_written_and_cover_their_slots_alone() -> None:
    ids, begin, n_expert, tokens = choice(600, 9, 3)[0], 2, 3, 32
    n_slots, n_tiles = ids.size, ids.size // tokens + n_expert
    order, place, tiles = (np.full(n, -1, np.int32) for n in (n_slots, n_slots, 4 * n_tiles))
    args = (ids, n_slots, begin, tokens, order, place, tiles)
    ShimRun(-1).launch(moe.SORT_SLOTS, (n_expert,), moe.THREADS_SORT, moe.SHARED_SORT, args)
    flat = ids.ravel()
    here = np.flatnonzero((flat >= begin) & (flat < begin + n_expert))
    expected = here[np.argsort(flat[here], kind="stable")]
    assert (tiles >= 0).all()  # garbage would be read as a tile
    covered = [(e, p) for e, first, last, _ in tiles.reshape(-1, 4) for p in range(first, last)]
    assert covered == [(flat[slot] - begin, p) for p, slot in enumerate(expected)]
    assert np.array_equal(order[: len(here)], expected)


@pytest.mark.parametrize("of_a_piece", [1, 3, 100], ids=lambda n: f"{n} experts a piece")
@pytest.mark.parametrize("merged", [False, True], ids=["", "gate and up merged"])
def test_experts_streamed_from_main_memory_give_what_experts_of_the_card_do(
    monkeypatch: pytest.MonkeyPatch, of_a_piece: int, merged: bool
) -> None:
    shapes = [(7, 96, 256), (7, 96, 256), (7, 256, 96)]
    gate, up, down = (weight(t, *shape, seed=i) for i, (t, shape) in enumerate(zip((Q4_K, Q4_K, Q8_0), shapes)))
    if merged:
        both = np.concatenate([gate.data, up.data], axis=1)  # a tensor of the file, of which both are parts
        gate, up = dataclasses.replace(gate, data=both[:, :96]), dataclasses.replace(up, data=both[:, 96:])
    each = sum(w.data[0].size for w in (gate, up, down))
    monkeypatch.setattr(streamed, "PIECE", of_a_piece * each)
    x, (ids, weights) = rows(20, 256), choice(20, 7, 3)
    found, expected = (rows(20, 256, seed=9) for _ in range(2))
    run = ShimRun(-1)
    experts(run, x, ids, weights, *(upload(run, w) for w in (gate, up, down)), expected)
    for _ in range(2):  # the buffers serve again
        found = rows(20, 256, seed=9)
        experts_streamed(run, x, ids, weights, gate, up, down, found)
    assert_close(found, expected, rtol=np.inf, nmse=1e-12)


def test_few_tokens_and_f32_weights_are_not_streamed() -> None:
    run = ShimRun()
    assert can_stream(run, [Q4_K, Q8_0], 17)
    assert not can_stream(run, [Q4_K, Q8_0], 16) and not can_stream(run, [F32, Q8_0], 300)
