"""route against the reference, experts against float64 products of dequantised weights."""

from __future__ import annotations

import numpy as np
import pytest
from compare import assert_close
from weights import BF16, F32, Q4_K, Q6_K, Q8_0, rows, weight

from cpu_kernels import panels
from cpu_kernels.moe import experts
from cpu_kernels.router import route
from cpu_kernels.threads import Run
from engine import reference


def routed(logits, n_used, bias=None, gating="softmax", n_group=1, n_group_used=1, norm=False, scale=1.0):
    ids, weights = np.zeros((len(logits), n_used), np.int32), np.zeros((len(logits), n_used), np.float32)
    run = Run(2)
    route(run, logits, bias, gating, n_group, n_group_used, norm, scale, ids, weights)
    run.sync()
    return ids, weights


@pytest.mark.parametrize("n_tok", [1, 5, 40])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "n_expert, n_used, gating, biased, n_group, n_group_used",
    [(64, 6, "softmax", False, 1, 1), (64, 6, "sigmoid", True, 8, 3), (20, 4, "softmax", False, 4, 2)],
)
def test_route_is_the_reference(n_tok, norm, n_expert, n_used, gating, biased, n_group, n_group_used):
    logits = rows(n_tok, n_expert)
    bias = rows(n_expert, seed=2) * 0.1 if biased else None
    ids, weights = routed(logits, n_used, bias, gating, n_group, n_group_used, norm, 2.5)
    e_ids, e_weights = reference.route(
        logits.astype(np.float64), n_used, gating=gating, bias=bias, n_groups=n_group, n_group_used=n_group_used,
        norm=norm, scale=2.5,
    )  # fmt: skip
    assert np.array_equal(ids, e_ids)
    assert_close(weights, e_weights, rtol=2e-6)


def test_of_equal_experts_the_first_is_chosen():
    ids, _ = routed(np.zeros((2, 16), np.float32), 3, n_group=4, n_group_used=2)
    assert ids.tolist() == [[0, 1, 2]] * 2


def run_experts(x, ids, weights, gate, up, down, n_threads=2):
    out = rows(*x.shape, seed=9)
    run = Run(n_threads)
    experts(run, x, ids, weights, gate, up, down, out)
    run.sync()
    return out


def choice(n_tok, n_expert, n_used):
    ids = np.argsort(rows(n_tok, n_expert, seed=5), axis=1)[:, :n_used].astype(np.int32)
    return np.ascontiguousarray(ids), np.abs(rows(n_tok, n_used, seed=6))


@pytest.mark.parametrize("n_tok", [1, 3, 16, 17, 65])
@pytest.mark.parametrize(
    "types",
    [(Q8_0, Q8_0, Q8_0), (Q4_K, Q4_K, Q6_K), (BF16, BF16, Q8_0), (Q8_0, F32, F32)],
    ids=["Q8_0", "Q4_K_Q6_K", "BF16_Q8_0", "mixed"],
)
def test_experts_are_added(types, n_tok):
    n_embd, n_ff = 256, 512 if types[2] == Q6_K else 96
    gate, up = weight(types[0], 7, n_ff, n_embd), weight(types[1], 7, n_ff, n_embd, seed=1)
    down = weight(types[2], 7, n_embd, n_ff, seed=2)
    x, (ids, weights) = rows(n_tok, n_embd), choice(n_tok, 7, 3)
    expected = reference.moe(
        x.astype(np.float64), ids, weights, lambda e: (gate.values[e], up.values[e], down.values[e])
    )
    added = run_experts(x, ids, weights, gate, up, down).astype(np.float64) - rows(n_tok, n_embd, seed=9)
    assert_close(added, expected, rtol=np.inf, nmse=1e-3)  # int8 activations twice


def test_experts_of_many_tokens_in_f32_are_exact_and_the_same_on_any_number_of_threads():
    gate, up, down = (weight(F32, 40, *shape, seed=i) for i, shape in enumerate([(96, 64), (96, 64), (64, 96)]))
    x, (ids, weights) = rows(300, 64), choice(300, 40, 3)
    ids[:250, 0] = 7  # one has more than most, many have none
    ids[:250, 1:] = [[3, 5]]
    expected = reference.moe(
        x.astype(np.float64), ids, weights, lambda e: (gate.values[e], up.values[e], down.values[e])
    )
    out = run_experts(x, ids, weights, gate, up, down)
    added = out.astype(np.float64) - rows(300, 64, seed=9)
    assert_close(added, expected, rtol=np.inf, nmse=1e-12)
    assert np.array_equal(out, run_experts(x, ids, weights, gate, up, down, n_threads=1))


def test_an_expert_may_be_chosen_by_more_tokens_than_a_tile_takes():
    gate, up, down = (weight(Q8_0, 2, *shape, seed=i) for i, shape in enumerate([(32, 64), (32, 64), (64, 32)]))
    n_tok = 2 * panels.MAX_ROWS + 5
    x, ids, weights = rows(n_tok, 64), np.ones((n_tok, 1), np.int32), np.ones((n_tok, 1), np.float32)
    expected = reference.moe(
        x.astype(np.float64), ids, weights, lambda e: (gate.values[e], up.values[e], down.values[e])
    )
    added = run_experts(x, ids, weights, gate, up, down).astype(np.float64) - rows(n_tok, 64, seed=9)
    assert_close(added, expected, rtol=np.inf, nmse=1e-3)


@pytest.mark.parametrize("n_tok", [2, 7, 16])
@pytest.mark.parametrize("types", [(Q8_0, Q8_0, Q8_0), (Q4_K, Q4_K, Q6_K)], ids=["Q8_0", "Q4_K_Q6_K"])
def test_a_token_has_the_bits_it_has_alone_and_on_any_number_of_threads(types, n_tok):
    n_embd, n_ff = 256, 512 if types[2] == Q6_K else 96
    gate, up = weight(types[0], 7, n_ff, n_embd), weight(types[1], 7, n_ff, n_embd, seed=1)
    down = weight(types[2], 7, n_embd, n_ff, seed=2)
    x, (ids, weights) = rows(n_tok, n_embd), choice(n_tok, 7, 2)
    ids[:, 0] = np.where(np.arange(n_tok) % 3, 5, ids[:, 0])  # one has many tokens, most some, others one
    ids[:, 1] = np.where(ids[:, 1] == ids[:, 0], 6, ids[:, 1])
    together = run_experts(x, ids, weights, gate, up, down)
    assert np.array_equal(together, run_experts(x, ids, weights, gate, up, down, n_threads=1))
    out = rows(n_tok, n_embd, seed=9)
    for t in range(n_tok):
        run = Run(2)
        one = slice(t, t + 1)
        experts(run, x[one], ids[one].copy(), weights[one].copy(), gate, up, down, out[one])
        run.sync()
    assert np.array_equal(together, out)
