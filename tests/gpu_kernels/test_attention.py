"""mla_decode under the shim: against float64, against the CPU's over the CPU's rows, and what a launch looks like."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from compare import assert_close
from shim import ShimRun, instances

import cpu_kernels
from engine import reference
from engine.k_cache import KCacheLayout
from gpu_kernels.attention import MAX_SPLITS, Variant, WarpgroupVariant, choose, geometry, kernels, mla_decode
from gpu_kernels.device import CARDS, Limits
from gpu_kernels.k_cache import k_store, rotate_query, row_bytes, unrotate_output
from gpu_kernels.k_cache import kernels as row_kernels

TYPES = ["f16", "bf16", "q8"]
LAYOUTS = [(512, 64), (256, 64), (256, 32), (128, 32)]  # rows of 576, 320, 288 and 160 values
# against float64 over the exact rows: queries and probabilities are rounded to 16 bits as well. q8: as the CPU's
NMSE = {"f16": 2e-6, "bf16": 1e-4, "q8": 5e-4}
SCALE = 0.1
H100, A100, RTX, T4, B200 = CARDS[90], CARDS[80], CARDS[86], CARDS[75], CARDS[100]
# (card, heads): between them they take every variant
CHOICES = [(H100, 16), (A100, 16), (RTX, 16), (B200, 32), (A100, 32), (B200, 128), (H100, 128)]

instances(k for t in TYPES for layout in LAYOUTS for k in kernels(choose(H100, t, *layout, 16), t, *layout))
instances(k for t in TYPES for card, n in CHOICES for k in kernels(choose(card, t, 512, 64, n), t, 512, 64))
instances(k for t in TYPES for k in kernels(choose(H100, t, 512, 32, 20), t, 512, 32))
instances(k for t in TYPES for layout in [*LAYOUTS, (512, 32)] for k in row_kernels(t, *layout).values())


class Case:
    """Rows that the CPU stored, those from n_kv on NaN, and queries whose scores have a spread of about one."""

    def __init__(self, type_k: str, rank: int, n_rot: int, n_head: int, n_tok: int, n_ctx: int, n_kv: int) -> None:
        rng = np.random.default_rng(rank + n_kv)
        self.type_k, self.rank, self.n_rot = type_k, rank, n_rot
        kv_a = rng.standard_normal((n_ctx, rank + n_rot), dtype=np.float32)
        self.gamma = rng.lognormal(0, 0.5, rank).astype(np.float32)
        cos_sin = np.concatenate([np.ones((n_ctx, n_rot // 2)), np.zeros((n_ctx, n_rot // 2))], 1).astype(np.float32)
        self.stored = (kv_a, self.gamma, 1e-6, cos_sin, np.arange(n_ctx, dtype=np.int32))
        self.rows = aligned(n_ctx, row_bytes(type_k, rank, n_rot))
        run = cpu_kernels.Run(1)
        cpu_kernels.k_store(run, *self.stored, self.rows, type_k, rank, n_rot)
        run.sync()
        self.rows[n_kv:] = 0xFF
        latent = reference.rms_norm(kv_a[:, :rank].astype(np.float64), self.gamma.astype(np.float64), 1e-6)
        self.exact = np.concatenate([latent, kv_a[:, rank:]], axis=1)
        q = rng.standard_normal((n_tok, n_head, rank + n_rot))
        scores = q[0] @ self.exact[: max(n_kv, 2)].T * SCALE
        self.q = (q / scores.std()).astype(np.float32)

    def decode(self, n_kv: list[int], order: int = 0, card: Limits = H100, n_sm: int = 2) -> np.ndarray:
        """On a card with so few multiprocessors that a split has several tiles."""
        q = aligned(*self.q.shape, dtype=np.float32)
        q[:] = self.q
        out = np.full((*q.shape[:2], self.rank), np.nan, np.float32)
        run = ShimRun(order, dataclasses.replace(card, n_sm=n_sm))
        if self.type_k == "q8":
            rotate_query(run, q, self.gamma, self.rank)
        mla_decode(run, q, self.rows, self.type_k, np.array(n_kv, np.int32), self.rank, self.n_rot, SCALE, out)
        if self.type_k == "q8":
            unrotate_output(run, out, self.gamma)
        return out

    def cpu(self, n_kv: list[int]) -> np.ndarray:
        q, out = self.q.copy(), np.full((*self.q.shape[:2], self.rank), np.nan, np.float32)
        run = cpu_kernels.Run(1)
        if self.type_k == "q8":
            cpu_kernels.rotate_query(run, q, self.gamma, self.rank)
        limits = np.array(n_kv, np.int32)
        cpu_kernels.mla_decode(run, q, self.rows, self.type_k, limits, self.rank, self.n_rot, SCALE, out)
        if self.type_k == "q8":
            cpu_kernels.unrotate_output(run, out, self.gamma)
        run.sync()
        return out

    def check(self, n_kv: list[int], order: int = 0, card: Limits = H100, n_sm: int = 2) -> None:
        expected = reference.mla_attention_from_rows(self.q, self.exact, n_kv, self.rank, SCALE)
        assert_close(self.decode(n_kv, order, card, n_sm), expected, atol=np.inf, nmse=NMSE[self.type_k])


def aligned(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    """Zeros at a multiple of 256 bytes, as a device allocates them."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(size + 256, np.uint8)
    start = -memory.ctypes.data % 256
    return memory[start : start + size].view(dtype).reshape(shape)


@pytest.mark.parametrize("n_kv", [0, 1, 31, 32, 33, 129])
@pytest.mark.parametrize("type_k", TYPES)
def test_decode_is_the_reference_s_and_reads_no_row_beyond_n_kv(type_k: str, n_kv: int) -> None:
    Case(type_k, 128, 32, 4, 1, 139, n_kv).check([n_kv], order=-1)


@pytest.mark.parametrize("rank, n_rot", LAYOUTS)
@pytest.mark.parametrize("type_k", TYPES)
def test_rows_that_the_cpu_stored_give_the_cpu_s_result(type_k: str, rank: int, n_rot: int) -> None:
    case = Case(type_k, rank, n_rot, 16, 1, 120, 101)
    case.check([101])
    assert_close(case.decode([101]), case.cpu([101]), atol=np.inf, nmse=2 * NMSE[type_k])


@pytest.mark.parametrize("card, n_head", CHOICES, ids=lambda v: getattr(v, "name", v))
@pytest.mark.parametrize("type_k", TYPES)
def test_every_variant(type_k: str, card: Limits, n_head: int) -> None:
    Case(type_k, 512, 64, n_head - 3, 1, 160, 150).check([150], -2, card)


@pytest.mark.parametrize("n_kv", [0, 1, 64, 65, 128, 191])
@pytest.mark.parametrize("type_k", TYPES)
def test_warpgroups_take_any_number_of_tiles(type_k: str, n_kv: int) -> None:
    """One buffer used or both, an odd tile at the end; lanes of another token in the block."""
    case = Case(type_k, 512, 64, 20, 2, 200, n_kv)
    assert isinstance(choose(H100, type_k, 512, 64, 40), WarpgroupVariant)
    case.check([n_kv, n_kv // 3], order=-1, n_sm=1)


@pytest.mark.parametrize("order", [0, 1, 2, 3, -1, -2])
@pytest.mark.parametrize("type_k", ["bf16", "q8"])
def test_the_order_of_threads_does_not_matter_to_warpgroups(type_k: str, order: int) -> None:
    """Copies land late in even orders and at once in odd ones; two blocks of lanes, of which the second is not full."""
    case = Case(type_k, 512, 64, 23, 3, 460, 450)
    n_kv = [450, 130, 1]
    case.check(n_kv, order, n_sm=2)


def test_warpgroups_of_several_splits_are_merged() -> None:
    case = Case("f16", 512, 64, 20, 1, 650, 640)
    for n_sm in (3, 7):
        case.check([640], -2, n_sm=n_sm)


def test_a_narrower_rope_leaves_the_rest_of_its_piece_out() -> None:
    for type_k in TYPES:
        Case(type_k, 512, 32, 20, 1, 140, 130).check([130], n_sm=1)


@pytest.mark.parametrize("order", [0, 1, 2, 3, -1, -2])
@pytest.mark.parametrize("type_k", ["f16", "q8"])
def test_the_order_of_threads_does_not_matter(type_k: str, order: int) -> None:
    case = Case(type_k, 128, 32, 5, 3, 200, 190)
    n_kv = [97, 190, 1]
    assert np.array_equal(case.decode(n_kv, order), case.decode(n_kv))
    case.check(n_kv, order)


@pytest.mark.parametrize("n_sm", [1, 3, 132])
@pytest.mark.parametrize("type_k", TYPES)
def test_any_number_of_splits(type_k: str, n_sm: int) -> None:
    Case(type_k, 128, 32, 4, 2, 400, 390).check([390, 77], -1, n_sm=n_sm)


def test_more_splits_than_a_warp_has_threads() -> None:
    """So that merging them needs several warps; in orders that let each of them come first."""
    case = Case("f16", 128, 32, 4, 1, 2260, 2250)
    for order in (-1, -2, -3):
        case.check([2250], order, n_sm=132)


@pytest.mark.parametrize("type_k", TYPES)
def test_a_token_that_sees_nothing_gives_zeros_beside_one_that_does(type_k: str) -> None:
    case = Case(type_k, 128, 32, 5, 2, 100, 90)
    case.check([90, 0])
    assert not case.decode([90, 0])[1].any()


@pytest.mark.parametrize("type_k", TYPES)
def test_scores_far_from_zero_do_not_overflow(type_k: str) -> None:
    case = Case(type_k, 128, 32, 4, 1, 100, 90)
    case.q *= 100
    assert np.isfinite(case.decode([90])).all()


@pytest.mark.parametrize("type_k", TYPES)
def test_a_launch_does_not_depend_on_n_kv(type_k: str) -> None:
    """So a captured graph serves every step: n_kv is read from memory."""
    case, launches = Case(type_k, 128, 32, 4, 1, 200, 190), []
    for n in (190, 3):
        run, out = ShimRun(), np.empty((1, 4, 128), np.float32)
        mla_decode(run, case.q, case.rows, type_k, np.array([n], np.int32), 128, 32, SCALE, out)
        launches.append(run.launched)
    assert launches[0] == launches[1]


# ------------------------------------------------------------------------------------------- variants and geometry


@pytest.mark.parametrize("type_k", TYPES)
@pytest.mark.parametrize("rank, n_rot", LAYOUTS)
def test_rows_are_as_wide_as_the_layout_says(type_k: str, rank: int, n_rot: int) -> None:
    assert row_bytes(type_k, rank, n_rot) == KCacheLayout(1, 1, rank, n_rot, type_k).row_stride


@pytest.mark.parametrize("limits", CARDS.values(), ids=lambda v: v.name)
@pytest.mark.parametrize("type_k", TYPES)
@pytest.mark.parametrize("rank, n_rot", LAYOUTS)
@pytest.mark.parametrize("n_lanes", [1, 16, 17, 64, 2048])
def test_what_is_chosen_fits_the_card(limits: Limits, type_k: str, rank: int, n_rot: int, n_lanes: int) -> None:
    if limits is T4 and rank == 512:
        with pytest.raises(ValueError, match=r"512 \+ 64 values need more shared memory than the 65,536 bytes of T4"):
            choose(limits, type_k, rank, n_rot, n_lanes)
        return
    variant = choose(limits, type_k, rank, n_rot, n_lanes)
    shared = variant.shared_bytes(type_k, rank, n_rot)
    assert shared <= limits.shared_per_block
    splits, blocks = geometry(limits, variant, n_lanes, 163_840)
    assert blocks * variant.lanes >= n_lanes > (blocks - 1) * variant.lanes
    assert 1 <= splits <= MAX_SPLITS and (splits == 1 or splits * blocks <= limits.n_sm)


def test_cards_with_more_shared_memory_take_more_lanes_or_longer_tiles() -> None:
    assert choose(H100, "f16", 512, 64, 16) == Variant(1, 64, 2, q_in_registers=True)
    assert choose(B200, "q8", 512, 64, 20) == Variant(2, 64, 2)
    assert choose(B200, "f16", 512, 64, 128) == choose(A100, "bf16", 512, 64, 128) == Variant(4, 32, 2)
    assert choose(RTX, "f16", 512, 64, 128) == Variant(1, 32, 2, q_in_registers=True)
    assert choose(RTX, "f16", 512, 64, 128).shared_bytes("f16", 512, 64) == 98_368


@pytest.mark.parametrize("type_k", TYPES)
def test_warpgroups_are_taken_on_hopper_alone_for_rows_of_512_and_more_than_16_lanes(type_k: str) -> None:
    cases = [(card, rank, n) for card in CARDS.values() if card is not T4 for rank in (256, 512) for n in (16, 17, 128)]
    taken = [case for case in cases if isinstance(choose(case[0], type_k, case[1], 64, case[2]), WarpgroupVariant)]
    assert taken == [(H100, 512, 17), (H100, 512, 128)]


def test_splits_fill_the_card_once_and_are_no_more_than_tiles() -> None:
    assert geometry(H100, Variant(1, 64, 2), 16, 163_840) == (132, 1)
    assert geometry(H100, Variant(4, 32, 2), 128, 163_840) == (66, 2)
    assert geometry(H100, Variant(4, 32, 2), 128, 100) == (4, 2)
    assert geometry(H100, Variant(1, 32, 2), 2048 * 16, 163_840) == (1, 2048)


@pytest.mark.parametrize("n_tok, rank, message", [(17, 128, "1 to 16"), (1, 192, "multiples of 128")])
def test_what_the_kernel_cannot_do_is_refused(n_tok: int, rank: int, message: str) -> None:
    q, rows = np.zeros((n_tok, 4, rank + 32), np.float32), np.zeros((8, 2 * (rank + 32)), np.uint8)
    out = np.zeros((n_tok, 4, rank), np.float32)
    with pytest.raises(ValueError, match=message):
        mla_decode(ShimRun(), q, rows, "f16", np.zeros(n_tok, np.int32), rank, 32, SCALE, out)


def test_turing_has_no_bf16() -> None:
    q, out = np.zeros((1, 4, 160), np.float32), np.zeros((1, 4, 128), np.float32)
    with pytest.raises(ValueError, match="T4 has no bf16 products; use type_k f16 or q8"):
        mla_decode(ShimRun(0, T4), q, aligned(8, 320), "bf16", np.zeros(1, np.int32), 128, 32, SCALE, out)


def test_the_gpu_stores_what_decode_reads() -> None:
    for type_k in TYPES:
        case = Case(type_k, 128, 32, 4, 1, 70, 70)
        case.rows[:] = 0xFF
        k_store(ShimRun(), *case.stored, case.rows, type_k, 128, 32)
        case.check([66])
