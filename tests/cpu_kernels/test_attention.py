"""mla_decode against float64 attention over what the rows hold; rows that no token may see hold NaN."""

from __future__ import annotations

import numpy as np
import pytest
from compare import assert_close

from cpu_kernels import attention
from cpu_kernels.attention import mla_decode
from cpu_kernels.k_cache import k_store, rotate_query, unrotate_output
from cpu_kernels.threads import Run
from engine import reference

# against float64 over the exact rows: f16 and bf16 round a row once, q8 rounds it to int8 with a scale
NMSE = {"f16": 1e-6, "bf16": 5e-5, "q8": 5e-4}
TYPES = list(NMSE)
N_KV = [0, 1, 37, 64, 65, 96, 97, 481, 1000]
SCALE = 0.1


class Case:
    """n_ctx rows, the last `unseen` of them NaN, and queries whose scores have a spread of about one."""

    def __init__(self, type_k: str, rank: int, n_rot: int, n_head: int, n_tok: int, n_ctx: int, n_kv: int) -> None:
        rng = np.random.default_rng(rank + n_kv)
        self.type_k, self.rank, self.n_rot = type_k, rank, n_rot
        kv_a = rng.standard_normal((n_ctx, rank + n_rot), dtype=np.float32)
        self.gamma = rng.lognormal(0, 0.5, rank).astype(np.float32)
        cos_sin = np.concatenate([np.ones((n_ctx, n_rot // 2)), np.zeros((n_ctx, n_rot // 2))], 1).astype(np.float32)
        used = rank + 2 * n_rot + 4 if type_k == "q8" else 2 * (rank + n_rot)
        self.rows = np.zeros((n_ctx, -(-used // 16) * 16), np.uint8)
        run = Run(1)
        where = np.arange(n_ctx, dtype=np.int32)
        k_store(run, kv_a, self.gamma, 1e-6, cos_sin, where, self.rows, type_k, rank, n_rot)
        run.sync()
        self.rows[n_kv:] = 0xFF  # NaN in f16, bf16, and in the scale of q8
        latent = reference.rms_norm(kv_a[:, :rank].astype(np.float64), self.gamma.astype(np.float64), 1e-6)
        self.exact = np.concatenate([latent, kv_a[:, rank:]], axis=1)
        q = rng.standard_normal((n_tok, n_head, rank + n_rot))
        scores = q[0] @ self.exact[: max(n_kv, 2)].T * SCALE
        self.q = (q / scores.std()).astype(np.float32)

    def decode(self, n_kv: list[int], n_threads: int = 1, token: int | None = None) -> np.ndarray:
        some = slice(None) if token is None else slice(token, token + 1)
        q, limits = self.q[some].copy(), np.array(n_kv, np.int32)[some].copy()
        out = np.full((*q.shape[:2], self.rank), np.nan, np.float32)
        run = Run(n_threads)
        if self.type_k == "q8":
            rotate_query(run, q, self.gamma, self.rank)
        mla_decode(run, q, self.rows, self.type_k, limits, self.rank, self.n_rot, SCALE, out)
        if self.type_k == "q8":
            unrotate_output(run, out, self.gamma)
        run.sync()
        return out

    def expected(self, n_kv: list[int]) -> np.ndarray:
        return reference.mla_attention_from_rows(self.q, self.exact, n_kv, self.rank, SCALE)

    def check(self, n_kv: list[int]) -> None:
        assert_close(self.decode(n_kv), self.expected(n_kv), atol=np.inf, nmse=NMSE[self.type_k])


@pytest.mark.parametrize("n_kv", N_KV)
@pytest.mark.parametrize("type_k", TYPES)
def test_decode_is_the_reference_s_and_reads_no_row_beyond_n_kv(type_k: str, n_kv: int) -> None:
    Case(type_k, 128, 32, 4, 1, 1003, n_kv).check([n_kv])


@pytest.mark.parametrize(
    "rank, n_rot, n_head", [(512, 64, 16), (256, 32, 40), (256, 64, 20), (64, 32, 4), (512, 64, 128)]
)
@pytest.mark.parametrize("type_k", TYPES)
def test_every_shape(type_k: str, rank: int, n_rot: int, n_head: int) -> None:
    Case(type_k, rank, n_rot, n_head, 1, 120, 101).check([101])


@pytest.mark.parametrize("n_kv", [1, 95, 193])
@pytest.mark.parametrize("rank, n_rot, n_head", [(96, 16, 3), (96, 32, 17), (288, 32, 20), (320, 64, 1)])
@pytest.mark.parametrize("type_k", TYPES)
def test_ranks_that_are_no_multiple_of_128(type_k: str, rank: int, n_rot: int, n_head: int, n_kv: int) -> None:
    """64 dimensions of int8 and 32 of bf16 are computed together, 4 and 2 rows are zipped."""
    Case(type_k, rank, n_rot, n_head, 1, n_kv + 3, n_kv).check([n_kv])


@pytest.mark.parametrize("type_k", TYPES)
def test_splits_of_several_tiles(type_k: str) -> None:
    Case(type_k, 64, 32, 4, 1, 3000, 2777).check([2777])


def test_splits_are_many_when_short_and_few_when_long() -> None:
    before = [attention.rows_before(split) for split in range(200)]
    lengths = np.diff(before)
    assert before[0] == 0 and (lengths % attention.ROWS == 0).all() and (np.diff(lengths) >= 0).all()
    for n_kv, fewest, most in ((500, 4, 6), (16_384, 32, 40), (163_840, 32, 120)):
        n = int(np.searchsorted(before, n_kv))
        assert fewest <= n <= most and lengths[:n].max() <= max(n_kv / 15, 2 * attention.ROWS)


@pytest.mark.parametrize("type_k", ["bf16", "q8"])
def test_a_cpu_without_the_dot_product_of_a_type_widens_its_rows(type_k: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "products", lambda type_k: "f32")
    Case(type_k, 96, 32, 5, 3, 300, 199).check([97, 199, 1])


@pytest.mark.parametrize("type_k", TYPES)
def test_a_row_that_takes_all_attention_is_returned(type_k: str) -> None:
    case = Case(type_k, 128, 32, 5, 1, 300, 200)
    case.q[0] = 5 * case.exact[37:42]
    case.check([200])
    assert_close(case.decode([200])[0], case.exact[37:42, :128], rtol=np.inf, nmse=NMSE[type_k])


@pytest.mark.parametrize("type_k", TYPES)
@pytest.mark.parametrize("part", ["latent", "rope", "both"])
def test_queries_of_zeros_weigh_by_what_is_left(type_k: str, part: str) -> None:
    case = Case(type_k, 128, 32, 5, 1, 300, 200)
    case.q[..., {"latent": slice(128), "rope": slice(128, None), "both": slice(None)}[part]] = 0
    case.check([200])


@pytest.mark.parametrize("type_k", TYPES)
def test_each_token_has_its_own_limit(type_k: str) -> None:
    Case(type_k, 128, 32, 5, 4, 600, 500).check([97, 500, 1, 480])


@pytest.mark.parametrize("type_k", TYPES)
def test_a_token_that_sees_nothing_gives_zeros_beside_one_that_does(type_k: str) -> None:
    case = Case(type_k, 128, 32, 5, 2, 600, 500)
    case.check([500, 0])
    assert not case.decode([500, 0])[1].any()


@pytest.mark.parametrize("type_k", TYPES)
def test_two_threads_give_the_same_bits(type_k: str) -> None:
    case = Case(type_k, 128, 32, 20, 3, 1003, 1000)
    one, two = (case.decode([998, 999, 1000], n_threads=n) for n in (1, 2))
    assert one.tobytes() == two.tobytes()


@pytest.mark.parametrize("n_head", [4, 20])
@pytest.mark.parametrize("type_k", TYPES)
def test_a_token_alone_gives_the_same_bits_as_among_sixteen(type_k: str, n_head: int) -> None:
    case = Case(type_k, 128, 32, n_head, 16, 1003, 1000)
    n_kv = [37, 96, 97, 480, 481, *range(990, 1001)]
    together = case.decode(n_kv)
    for token in range(16):
        np.testing.assert_array_equal(case.decode(n_kv, token=token)[0], together[token])


@pytest.mark.parametrize("type_k", TYPES)
def test_scores_far_from_zero_do_not_overflow(type_k: str) -> None:
    case = Case(type_k, 64, 32, 4, 1, 200, 150)
    case.q *= 200
    assert np.isfinite(case.decode([150])).all()


def test_a_recorded_tape_follows_n_kv() -> None:
    case = Case("f16", 64, 32, 4, 1, 1003, 1000)
    n_kv, out = np.array([1000], np.int32), np.empty((1, 4, 64), np.float32)
    run = Run(1)
    mla_decode(run, case.q, case.rows, "f16", n_kv, 64, 32, SCALE, out)
    tape = run.take()
    for n in (1000, 3, 0, 700):
        n_kv[0] = n
        run.replay(tape)
        assert_close(out, case.expected([n]), atol=np.inf, nmse=NMSE["f16"])


def test_rotary_pairs_in_the_other_order_are_told_apart() -> None:
    """A cache stored as NEOX, queried as NORM: the rope part must weigh enough for this test to see it."""
    rng = np.random.default_rng(3)
    kv_a = rng.standard_normal((50, 96), dtype=np.float32)
    angle = np.arange(50)[:, None] * 10000.0 ** -(np.arange(0, 32, 2) / 32)
    cos_sin = np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    outs = []
    for neox in (False, True):
        rows = np.zeros((50, 192), np.uint8)
        q, out = np.full((1, 4, 96), 1.0, np.float32), np.empty((1, 4, 64), np.float32)
        run = Run(1)
        k_store(
            run, kv_a, np.ones(64, np.float32), 1e-6, cos_sin, np.arange(50, dtype=np.int32), rows, "f16", 64, 32, neox
        )
        mla_decode(run, q, rows, "f16", np.array([50], np.int32), 64, 32, SCALE, out)
        run.sync()
        outs.append(out)
    with pytest.raises(AssertionError, match="nmse"):
        assert_close(outs[0], outs[1], atol=np.inf, nmse=1e-3)
