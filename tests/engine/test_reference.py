"""The oracle's parts, by hand-made cases and identities; the whole is held by test_reference_against_llama_cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from compare import assert_close
from synthetic import write_model

from engine import reference
from engine.gguf_file import read
from engine.hparams import HParams

RNG = np.random.default_rng(3)
TOKENS = RNG.integers(2, 258, 21)
EXACT = 1e-12  # float64, in another order


def test_rms_norm() -> None:
    expected = np.array([1.0, 2.0, 2.0]) / np.sqrt(3.0 + 0.5) * np.array([1.0, 10.0, -1.0])
    assert_close(
        reference.rms_norm(np.array([[1.0, 2.0, 2.0]]), np.array([1.0, 10.0, -1.0]), 0.5), expected[None], rtol=EXACT
    )


def test_rope_turns_neighbours_or_halves() -> None:
    x, quarter = np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([np.pi / 2, 0.0])
    assert_close(reference.rope(x, [1], quarter), np.array([[-2.0, 1.0, 3.0, 4.0]]), atol=EXACT)
    assert_close(reference.rope(x, [1], quarter, style="neox"), np.array([[-3.0, 2.0, 1.0, 4.0]]), atol=EXACT)


def test_rope_scores_depend_on_the_distance_alone() -> None:
    inv_freq = 10000.0 ** -np.arange(0, 1, 1 / 8)
    q, k = RNG.standard_normal((2, 1, 16))
    score = [reference.rope(q, [p + 5], inv_freq) @ reference.rope(k, [p], inv_freq).T for p in (0, 100)]
    assert_close(score[0], score[1], rtol=1e-9)


def test_rope_multiplies_by_the_magnitude_and_takes_heads() -> None:
    x, inv_freq = RNG.standard_normal((3, 2, 8)), np.array([1.0, 0.1, 0.01, 0.001])
    out = reference.rope(x, [4, 5, 6], inv_freq, magnitude=1.25)
    assert_close(np.linalg.norm(out, axis=-1), 1.25 * np.linalg.norm(x, axis=-1), rtol=EXACT)
    assert_close(out[:, 1], reference.rope(x[:, 1], [4, 5, 6], inv_freq, magnitude=1.25), rtol=EXACT)


@pytest.mark.parametrize("n_kv", [0, 1, 37])
def test_attention_reads_n_kv_rows_and_no_more(n_kv: int) -> None:
    q, k, v = RNG.standard_normal((2, 3, 8)), RNG.standard_normal((40, 3, 8)), RNG.standard_normal((40, 3, 5))
    k[n_kv:] = v[n_kv:] = np.nan
    out = reference.attention(q, k, v, n_kv, 0.5)
    expected = np.zeros((2, 3, 5))
    for it, ih in np.ndindex(2, 3):
        p = np.array([np.exp(0.5 * q[it, ih] @ k[t, ih]) for t in range(n_kv)])
        for t in range(n_kv):
            expected[it, ih] += p[t] / p.sum() * v[t, ih]
    assert_close(out, expected, atol=EXACT)


def test_attention_sees_its_own_number_of_rows_per_query() -> None:
    q, k, v = RNG.standard_normal((3, 2, 8)), RNG.standard_normal((9, 2, 8)), RNG.standard_normal((9, 2, 8))
    together = reference.attention(q, k, v, [0, 4, 9], 1.0)
    alone = [reference.attention(q[it : it + 1], k, v, n, 1.0) for it, n in enumerate([0, 4, 9])]
    assert_close(together, np.concatenate(alone), atol=EXACT)


def test_attention_of_huge_scores_is_finite() -> None:
    q = k = v = np.full((1, 1, 4), 1e3)
    assert_close(reference.attention(q, k, v, 1, 1.0), v)


def test_absorbed_equals_expanded() -> None:
    n_head, nope, n_rot, n_embd_head_v, kv_lora_rank = 3, 16, 8, 24, 32
    w_uk = RNG.standard_normal((n_head, nope, kv_lora_rank))
    w_uv = RNG.standard_normal((n_head, n_embd_head_v, kv_lora_rank))
    rows, q = RNG.standard_normal((50, kv_lora_rank + n_rot)), RNG.standard_normal((4, n_head, nope + n_rot))
    n_kv, kq_scale = [1, 20, 49, 50], 0.07

    k, v = reference.expand(rows, w_uk, w_uv)
    expanded = reference.attention(q, k, v, n_kv, kq_scale)

    q_absorbed = np.concatenate([np.einsum("thn,hnc->thc", q[..., :nope], w_uk), q[..., nope:]], axis=-1)
    latent = reference.mla_attention_from_rows(q_absorbed, rows, n_kv, kv_lora_rank, kq_scale)
    assert_close(np.einsum("thc,hvc->thv", latent, w_uv), expanded, rtol=1e-9, atol=1e-9)


def test_route_takes_the_lower_of_equals_first() -> None:
    experts, weights = reference.route(np.zeros((1, 6)), 3)
    assert experts.tolist() == [[0, 1, 2]]
    assert_close(weights, np.full((1, 3), 1 / 6), rtol=EXACT)


def test_route_adds_the_bias_to_the_choice_alone() -> None:
    logits, bias = np.array([[0.0, 2.0, 1.0, -1.0]]), np.array([0.0, -1.0, 0.0, 1.0])
    experts, weights = reference.route(logits, 2, gating="sigmoid", bias=bias)
    assert experts.tolist() == [[3, 2]]
    assert_close(weights, 1 / (1 + np.exp([[1.0, -1.0]])), rtol=EXACT)


def test_route_ranks_groups_by_their_best_two() -> None:
    # the best expert (5) is in the group whose two best are worse than those of groups 0 and 1
    probs = np.array([[0.6, 0.5, 0.55, 0.52, 0.01, 0.9]])
    logits = np.log(probs / (1 - probs))
    experts, _ = reference.route(logits, 3, gating="sigmoid", n_groups=3, n_group_used=2)
    assert experts.tolist() == [[0, 2, 3]]


def test_route_normalises_then_scales() -> None:
    logits = np.array([[1.0, 0.0, -1.0, 3.0]])
    _, weights = reference.route(logits, 2, norm=True, scale=2.5)
    assert_close(weights, 2.5 * np.exp([[3.0, 1.0]]) / (np.exp(3.0) + np.exp(1.0)), rtol=EXACT)


def test_route_of_vanishing_weights_is_finite() -> None:
    _, weights = reference.route(np.full((1, 4), -1e4), 2, gating="sigmoid", norm=True)
    assert_close(weights, np.zeros((1, 2)))


def test_moe_is_the_weighted_sum_of_chosen_experts() -> None:
    n_tok, n_expert, n_embd, n_ff = 5, 4, 6, 7
    gate, up = RNG.standard_normal((2, n_expert, n_ff, n_embd))
    down = RNG.standard_normal((n_expert, n_embd, n_ff))
    y, weights = RNG.standard_normal((n_tok, n_embd)), RNG.random((n_tok, 2))
    experts = np.array([[0, 1], [3, 0], [1, 3], [0, 3], [3, 1]])  # nobody wants expert 2
    expected = np.zeros_like(y)
    for it, ie in np.ndindex(experts.shape):
        e, z = experts[it, ie], gate[experts[it, ie]] @ y[it]
        expected[it] += weights[it, ie] * (down[e] @ (z / (1 + np.exp(-z)) * (up[e] @ y[it])))
    assert_close(reference.moe(y, experts, weights, lambda e: (gate[e], up[e], down[e])), expected, atol=EXACT)


def test_bf16_rounds_as_gguf_does() -> None:
    x = RNG.standard_normal(1000).astype(np.float32)
    expected = gguf.quants.dequantize(
        gguf.quants.quantize(x, gguf.GGMLQuantizationType.BF16), gguf.GGMLQuantizationType.BF16
    )
    assert_close(reference.round_bf16(x.astype(np.float64)), expected.astype(np.float64))


@pytest.mark.parametrize("n_first", [1, 20])
def test_chunks_equal_the_whole(tmp_path: Path, n_first: int) -> None:
    model = load(write_model(tmp_path / "toy.gguf", rope_scaling="yarn"))
    past: list[np.ndarray] = []
    chunks = [reference.forward(*model, part, past=past) for part in np.split(TOKENS, [n_first])]
    assert_close(np.concatenate(chunks), reference.forward(*model, TOKENS), rtol=1e-9, atol=1e-9)
    assert [len(rows) for rows in past] == [len(TOKENS)] * 3


SAME_MODELS: dict[str, dict[str, Any]] = {
    "legacy": {"form": "legacy"},
    "2d": {"form": "2d"},
    "2d without kv_b": {"form": "2d", "keep_kv_b": False},
    "merged gate_up": {"merged_gate_up": True},
    "MTP block": {"n_layer_nextn": 1},
    "scale 0": {"expert_weights_scale": 0.0},
    "one group": {"n_expert_groups": 1, "n_group_used": 1},
}


@pytest.mark.parametrize("options", SAME_MODELS.values(), ids=SAME_MODELS)
def test_the_same_model_written_otherwise_has_the_same_logits(tmp_path: Path, options: dict[str, Any]) -> None:
    plain, other = toy_logits(tmp_path), toy_logits(tmp_path, **options)
    assert_close(other, plain, rtol=1e-9, atol=1e-9)


DIFFERENT_MODELS: dict[str, dict[str, Any]] = {
    "sigmoid": {"expert_gating": "sigmoid"},
    "bias": {"selection_bias": True},
    "norm": {"expert_weights_norm": True},
    "groups": {"n_expert_groups": 4, "n_group_used": 2},
    "yarn": {"rope_scaling": "yarn"},
    "tied": {"tied": True},
    "seed": {"seed": 2},
}


@pytest.mark.parametrize("options", DIFFERENT_MODELS.values(), ids=DIFFERENT_MODELS)
def test_every_option_matters(tmp_path: Path, options: dict[str, Any]) -> None:
    plain, changed = toy_logits(tmp_path), toy_logits(tmp_path, **options)
    assert np.square(changed - plain).sum() > 1e-3 * np.square(plain).sum()


def test_rows_are_rounded_where_the_cache_would(tmp_path: Path) -> None:
    model = load(write_model(tmp_path / "toy.gguf"))
    past: list[np.ndarray] = []
    record: reference.Record = {}
    rounded = reference.forward(*model, TOKENS, past=past, round_row=reference.round_f16, record=record)
    assert_close(past[1], reference.round_f16(record[1, "row"]))
    plain = reference.forward(*model, TOKENS)
    relative = np.sqrt(np.square(rounded - plain).sum() / np.square(plain).sum())
    assert 1e-6 < relative < 2 / 1024


def test_attention_scores_have_unit_spread(tmp_path: Path) -> None:
    """Else attention would be a mean, which hides faults."""
    hparams, tensors = load(write_model(tmp_path / "toy.gguf"))
    past: list[np.ndarray] = []
    record: reference.Record = {}
    reference.forward(hparams, tensors, TOKENS, past=past, record=record)
    for il in range(hparams.n_layer):
        layer = reference.Layer(tensors, il)
        k, _ = reference.expand(past[il], *reference.up_projections(hparams, layer))
        scores = np.einsum("qhd,khd->hqk", record[il, "q"], k) * hparams.kq_scale
        assert 0.5 < scores.std() < 4


def toy_logits(folder: Path, **options: Any) -> np.ndarray:
    return reference.forward(*load(write_model(folder / "toy.gguf", **options)), TOKENS)


def load(path: Path) -> tuple[HParams, dict[str, Any]]:
    file = read(path)
    return HParams.from_gguf(file), file.tensors
