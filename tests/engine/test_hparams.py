"""HParams: keys, defaults, refusals, and the reference values of YaRN."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare import assert_close
from gguf_bytes import F64, I32, U64, RawTensor, f32_tensor, gguf_bytes, key
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import EngineError, ModelFormatError, UnsupportedModelError
from engine.gguf_file import read
from engine.hparams import HParams

KEYS: dict[str, Any] = {  # a modern file with experts; sizes that are all different
    "block_count": 5,
    "context_length": 4096,
    "embedding_length": 48,
    "feed_forward_length": 96,
    "vocab_size": 300,
    "attention.head_count": 4,
    "attention.head_count_kv": 1,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.kv_lora_rank": 32,
    "attention.key_length": 40,
    "attention.value_length": 32,
    "attention.key_length_mla": 24,
    "attention.value_length_mla": 20,
    "rope.dimension_count": 8,
    "leading_dense_block_count": 1,
    "expert_count": 16,
    "expert_used_count": 3,
    "expert_shared_count": 2,
    "expert_feed_forward_length": 28,
}
LEGACY: dict[str, Any] = {  # what differs in a file of 2024
    "attention.key_length_mla": None,
    "attention.value_length_mla": None,
    "attention.head_count_kv": 4,
    "attention.key_length": 24,
    "attention.value_length": 20,
}
MODERN_TENSORS = {"attn_q": (96, 48), "attn_k_b": (4, 32, 16), "attn_v_b": (4, 20, 32)}

Load = Callable[..., HParams]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(
        changes: dict[str, Any] | None = None,
        tensors: dict[str, tuple[int, ...]] = MODERN_TENSORS,
        arch: str = "deepseek2",
        more: list[bytes] | None = None,
    ) -> HParams:
        """HParams of a file with KEYS, changed; None leaves a key out, bytes are a raw key."""
        values = {k: v for k, v in (KEYS | (changes or {})).items() if v is not None}
        keys = [v if isinstance(v, bytes) else key(f"deepseek2.{k}", v) for k, v in values.items()]
        path = tmp_path / "model.gguf"
        infos: list[RawTensor] = [f32_tensor(f"blk.0.{name}.weight", *shape) for name, shape in tensors.items()]
        path.write_bytes(gguf_bytes([key("general.architecture", arch), *keys, *(more or [])], infos))
        return HParams.from_gguf(read(path))

    return load


# keys


def test_every_key_has_its_field(load: Load) -> None:
    h = load({"rope.freq_base": 5000.0, "expert_weights_scale": 2.5, "expert_weights_norm": True})
    assert (h.arch, h.form, h.n_layer, h.n_layer_nextn) == ("deepseek2", "modern", 5, 0)
    assert (h.n_ctx_train, h.n_embd, h.n_ff, h.n_head, h.n_vocab) == (4096, 48, 96, 4, 300)
    assert (h.q_lora_rank, h.kv_lora_rank, h.n_rot) == (0, 32, 8)
    assert (h.n_embd_head_nope, h.n_embd_head_v, h.n_embd_head_qk) == (16, 20, 24)
    assert h.rms_eps == np.float32(1e-5)
    assert (h.rope_freq_base, h.rope_scaling, h.rope_factor) == (5000.0, "none", 1.0)
    assert (h.n_layer_dense_lead, h.n_expert, h.n_expert_used, h.n_expert_shared, h.n_ff_exp) == (1, 16, 3, 2, 28)
    assert (h.expert_weights_scale, h.expert_weights_norm, h.expert_gating) == (2.5, True, "softmax")
    assert (h.n_expert_groups, h.n_group_used) == (1, 1)


def test_absent_keys_have_llama_cpp_defaults(load: Load) -> None:
    h = load({"leading_dense_block_count": None, "expert_shared_count": None})
    assert h.rope_freq_base == 10000.0
    assert h.n_ctx_orig == 4096
    assert (h.yarn_log_multiplier, h.rope_attn_factor) == (0.0, 1.0)
    assert (h.n_layer_dense_lead, h.n_expert_shared) == (0, 0)
    assert (h.expert_weights_scale, h.expert_weights_norm) == (1.0, False)


def test_an_expert_weights_scale_of_0_means_no_scaling(load: Load) -> None:
    assert load({"expert_weights_scale": 0.0}).expert_weights_scale == 1.0


def test_mtp_blocks_are_not_layers(load: Load) -> None:
    h = load({"nextn_predict_layers": 2})
    assert (h.n_layer, h.n_layer_nextn) == (3, 2)


def test_a_model_without_experts_is_dense_in_all_layers(load: Load) -> None:
    h = load({"expert_count": None, "expert_used_count": None, "leading_dense_block_count": None})
    assert (h.n_expert, h.n_layer_dense_lead, h.n_ff) == (0, 5, 96)


def test_a_model_whose_leading_layers_are_all_dense_needs_no_expert_keys(load: Load) -> None:
    h = load({"leading_dense_block_count": 5, "expert_feed_forward_length": None, "expert_used_count": None})
    assert (h.n_expert, h.n_layer_dense_lead) == (0, 5)


def test_a_model_without_dense_layers_needs_no_feed_forward_length(load: Load) -> None:
    assert load({"leading_dense_block_count": 0, "feed_forward_length": None}).n_ff == 0


def test_without_vocab_size_the_tokens_are_counted(load: Load) -> None:
    more = [key("tokenizer.ggml.tokens", ["a", "b", "c"])]
    assert load({"vocab_size": None}, more=more).n_vocab == 3


@pytest.mark.parametrize("kind", [I32, U64])
def test_any_width_of_integer_is_accepted(load: Load, kind: int) -> None:
    assert load({"block_count": key("deepseek2.block_count", 5, kind)}).n_layer == 5


def test_a_double_is_accepted_for_a_float(load: Load) -> None:
    name = "attention.layer_norm_rms_epsilon"
    assert load({name: key(f"deepseek2.{name}", 1e-6, F64)}).rms_eps == 1e-6


def test_a_number_per_layer_is_accepted_if_all_are_equal(load: Load) -> None:
    assert load({"feed_forward_length": [96] * 5}).n_ff == 96


def test_a_number_per_layer_which_differs_is_not_supported(load: Load) -> None:
    with pytest.raises(UnsupportedModelError, match=r"'deepseek2\.feed_forward_length' differs between layers"):
        load({"feed_forward_length": [96, 96, 48, 96, 96]})


def test_the_shipped_model_is_modern_with_q_lora_and_sigmoid_experts() -> None:
    with as_file(files("engine") / "data" / "tiny-mla-tales-Q8_0.gguf") as path:
        h = HParams.from_gguf(read(path))
    assert (h.form, h.n_layer, h.n_embd, h.n_head, h.n_vocab) == ("modern", 5, 256, 4, 4096)
    assert (h.q_lora_rank, h.kv_lora_rank, h.n_rot, h.n_embd_head_nope, h.n_embd_head_v) == (128, 128, 32, 64, 64)
    assert (h.n_expert, h.n_expert_used, h.expert_gating, h.expert_weights_norm) == (8, 2, "sigmoid", True)


# the generations of files


def test_k_b_and_v_b_per_head_with_mla_keys_are_modern(load: Load) -> None:
    assert load().form == "modern"


def test_kv_b_alone_is_legacy_and_its_lengths_are_those_of_the_heads(load: Load) -> None:
    h = load(LEGACY, {"attn_q": (96, 48), "attn_kv_b": (144, 32)})
    assert (h.form, h.n_embd_head_nope, h.n_embd_head_v) == ("legacy", 16, 20)


def test_kv_b_alone_is_legacy_whatever_the_keys_say(load: Load) -> None:
    h = load({}, {"attn_q": (96, 48), "attn_kv_b": (144, 32)})
    assert (h.form, h.n_embd_head_nope, h.n_embd_head_v) == ("legacy", 16, 20)


@pytest.mark.parametrize("kv_b", [{}, {"attn_kv_b": (144, 32)}])
def test_flattened_k_b_and_v_b_are_2d_with_and_without_kv_b(load: Load, kv_b: dict[str, tuple[int, ...]]) -> None:
    tensors = {"attn_q": (96, 48), "attn_k_b": (128, 16), "attn_v_b": (80, 32), **kv_b}
    assert load(LEGACY, tensors).form == "2d"


@pytest.mark.parametrize("missing", ["attn_k_b", "attn_v_b"])
def test_half_of_k_b_and_v_b_is_refused(load: Load, missing: str) -> None:
    with pytest.raises(ModelFormatError, match=r"model\.gguf: expected tensors blk\.0\.attn_k_b\.weight and attn_v_b"):
        load({}, {k: v for k, v in MODERN_TENSORS.items() if k != missing})


def test_k_b_per_head_without_mla_keys_is_refused(load: Load) -> None:
    with pytest.raises(ModelFormatError, match="key_length_mla"):
        load(LEGACY)


@pytest.mark.parametrize("name", ["key_length_mla", "value_length_mla"])
@pytest.mark.parametrize("absent", [None, 0])
def test_one_of_the_mla_keys_without_the_other_is_refused(load: Load, name: str, absent: int | None) -> None:
    with pytest.raises(ModelFormatError, match="expected both or neither"):
        load({f"attention.{name}": absent})


def test_q_lora_is_seen_by_its_tensors(load: Load) -> None:
    tensors = {**MODERN_TENSORS, "attn_q_a": (12, 48)}
    del tensors["attn_q"]
    assert load({"attention.q_lora_rank": 12}, tensors).q_lora_rank == 12


def test_attn_q_outweighs_a_q_lora_rank_key(load: Load) -> None:
    assert load({"attention.q_lora_rank": 12}).q_lora_rank == 0


def test_q_lora_tensors_without_the_key_are_refused(load: Load) -> None:
    tensors = {**MODERN_TENSORS, "attn_q_a": (12, 48)}
    del tensors["attn_q"]
    with pytest.raises(ModelFormatError, match=r"attention\.q_lora_rank' is missing"):
        load({}, tensors)


def test_a_file_without_any_q_is_refused(load: Load) -> None:
    with pytest.raises(ModelFormatError, match=r"neither tensor blk\.0\.attn_q\.weight nor"):
        load({}, {"attn_k_b": (4, 32, 16), "attn_v_b": (4, 20, 32)})


# gating


@pytest.mark.parametrize(("func", "gating"), [(None, "softmax"), (0, "softmax"), (1, "softmax"), (2, "sigmoid")])
def test_gating_is_what_the_key_says_and_softmax_without(load: Load, func: int | None, gating: str) -> None:
    assert load({"expert_gating_func": func}).expert_gating == gating


@pytest.mark.parametrize(
    ("n_layer", "n_vocab", "gating"),
    [(47, 154880, "sigmoid"), (48, 154880, "sigmoid"), (46, 154880, "softmax"), (47, 154879, "softmax")],
)
def test_early_glm_4_7_flash_files_are_sigmoid(load: Load, n_layer: int, n_vocab: int, gating: str) -> None:
    assert load({"block_count": n_layer, "vocab_size": n_vocab}).expert_gating == gating


def test_the_gating_key_outweighs_the_glm_rule(load: Load) -> None:
    assert load({"block_count": 47, "vocab_size": 154880, "expert_gating_func": 1}).expert_gating == "softmax"


def test_another_gating_is_not_supported(load: Load) -> None:
    with pytest.raises(UnsupportedModelError, match=r"'deepseek2\.expert_gating_func' is 4; supported: 1 .*2"):
        load({"expert_gating_func": 4})


# groups


def test_groups_are_read(load: Load) -> None:
    h = load({"expert_group_count": 4, "expert_group_used_count": 2})
    assert (h.n_expert_groups, h.n_group_used) == (4, 2)


@pytest.mark.parametrize("count", [0, 1])
def test_a_single_group_is_no_group_limit(load: Load, count: int) -> None:
    h = load({"expert_group_count": count, "expert_group_used_count": 1})
    assert (h.n_expert_groups, h.n_group_used) == (1, 1)


@pytest.mark.parametrize(
    ("count", "used", "name"),
    [
        (3, 1, "expert_group_count"),
        (16, 4, "expert_group_count"),
        (4, 0, "expert_group_used_count"),
        (4, 4, "expert_group_used_count"),
        (4, None, "expert_group_used_count"),
        (8, 1, "expert_group_used_count"),  # 2 experts, of which 3 would be used
    ],
)
def test_impossible_groups_are_refused(load: Load, count: int, used: int | None, name: str) -> None:
    with pytest.raises(ModelFormatError, match=f"'deepseek2.{name}' is "):
        load({"expert_group_count": count, "expert_group_used_count": used})


# refusals


def test_another_architecture_is_refused_by_name(load: Load) -> None:
    message = r"model\.gguf: architecture 'llama' is not supported; supported: deepseek2$"
    with pytest.raises(UnsupportedModelError, match=message):
        load(arch="llama")


def test_an_absurd_architecture_is_shown_shortened(load: Load) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        load(arch="\x1b" * 100_000)
    assert len(str(caught.value)) < 1000 and "\x1b" not in str(caught.value)


def test_attention_temperature_is_refused(load: Load) -> None:
    with pytest.raises(UnsupportedModelError, match=r"attention\.temperature_scale"):
        load({"attention.temperature_scale": 0.1})


def test_an_attention_temperature_of_0_is_none(load: Load) -> None:
    assert load({"attention.temperature_scale": 0.0}).n_layer == 5


@pytest.mark.parametrize("name", ["longrope", "x" * 1000])
def test_another_rope_scaling_is_not_supported(load: Load, name: str) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"'deepseek2\.rope\.scaling.type' is .*; supported: none, linear, yarn"
    ):
        load({"rope.scaling.type": name})


REQUIRED = [
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
    "attention.kv_lora_rank",
    "rope.dimension_count",
    "expert_used_count",
    "expert_feed_forward_length",
]


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_required_key_is_named(load: Load, name: str) -> None:
    with pytest.raises(ModelFormatError, match=f"model.gguf: key 'deepseek2.{name}' is missing"):
        load({name: None})


@pytest.mark.parametrize("name", [*REQUIRED, "rope.freq_base", "expert_weights_norm", "rope.scaling.type"])
def test_a_key_of_another_type_is_refused(load: Load, name: str) -> None:
    with pytest.raises(ModelFormatError, match=f"key 'deepseek2.{name}' has type array of strings, expected "):
        load({name: ["text"]})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("block_count", 0),
        ("block_count", 513),
        ("nextn_predict_layers", 5),
        ("context_length", 0),
        ("embedding_length", 2**31),
        ("attention.head_count", 0),
        ("attention.head_count", 1025),
        ("vocab_size", 0),
        ("vocab_size", 2**21 + 1),
        ("attention.kv_lora_rank", 0),
        ("attention.key_length_mla", 8),
        ("rope.dimension_count", 0),
        ("rope.dimension_count", 7),
        ("rope.dimension_count", 24),
        ("expert_count", 1025),
        ("expert_used_count", 0),
        ("expert_used_count", 17),
        ("expert_feed_forward_length", 0),
        ("attention.layer_norm_rms_epsilon", 0.0),
        ("attention.layer_norm_rms_epsilon", -1e-5),
        ("attention.layer_norm_rms_epsilon", math.nan),
        ("rope.freq_base", 1.0),
        ("rope.freq_base", math.inf),
        ("rope.scaling.factor", 0.5),
        ("rope.scaling.factor", -2.0),
        ("rope.scaling.factor", math.nan),
        ("rope.scaling.original_context_length", 0),
        ("rope.scaling.yarn_log_multiplier", math.inf),
        ("rope.scaling.attn_factor", 0.0),
        ("expert_weights_scale", math.nan),
    ],
)
def test_a_value_which_makes_no_sense_is_refused(load: Load, name: str, value: float) -> None:
    with pytest.raises(ModelFormatError, match=r"model\.gguf: key 'deepseek2\.\S+' is .*, expected"):
        load({name: value})


def test_a_negative_integer_is_refused(load: Load) -> None:
    with pytest.raises(ModelFormatError, match="block_count' is -1, expected 1 to 512"):
        load({"block_count": key("deepseek2.block_count", -1, I32)})


def test_no_tokens_and_no_vocab_size_is_refused(load: Load) -> None:
    with pytest.raises(EngineError, match=r"'tokenizer\.ggml\.tokens' is missing"):
        load({"vocab_size": None})


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    changes=st.dictionaries(
        st.sampled_from([*KEYS, "rope.freq_base", "rope.scaling.factor", "rope.scaling.attn_factor"]),
        st.one_of(st.none(), st.booleans(), st.integers(0, 2**32 - 1), st.integers(0, 64), st.floats(width=32)),
        max_size=4,
    ),
    scaling=st.sampled_from(["none", "linear", "yarn"]),
)
def test_any_values_are_read_or_refused_and_nothing_else(load: Load, changes: dict[str, Any], scaling: str) -> None:
    try:
        h = load({"rope.scaling.type": scaling, **changes})
    except EngineError:
        return
    assert np.isfinite(h.inv_freq).all() and math.isfinite(h.kq_scale) and math.isfinite(h.rope_magnitude)


# rope and scale: reference values computed once from llama.cpp's formulas, f64


def rope_params(load: Load, **fields: Any) -> HParams:
    """The heads of DeepSeek-V2 and V3, 128 + 64, unless `fields` say otherwise."""
    return replace(load(), **({"n_rot": 64, "n_embd_head_nope": 128, "n_ctx_orig": 4096} | fields))


V2_LITE = {"rope_scaling": "yarn", "rope_factor": 40.0, "yarn_log_multiplier": 0.0707}
V3 = {"rope_scaling": "yarn", "rope_factor": 40.0, "yarn_log_multiplier": 0.1}
KIMI_K2 = {"rope_scaling": "yarn", "rope_factor": 32.0, "yarn_log_multiplier": 0.1, "rope_freq_base": 50000.0}
GLM_4_7_FLASH = {"n_embd_head_nope": 192, "rope_freq_base": 1e6}
MODELS = {"V2-Lite": V2_LITE, "V3": V3, "Kimi-K2": KIMI_K2, "no YaRN": {}, "GLM-4.7-Flash": GLM_4_7_FLASH}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("V2-Lite", 0.114721387),
        ("V3", 0.135233779),
        ("Kimi-K2", 0.130860800),
        ("no YaRN", 0.0721687836),
        ("GLM-4.7-Flash", 0.0625),
    ],
)
def test_kq_scale_has_its_reference_value(load: Load, model: str, expected: float) -> None:
    assert rope_params(load, **MODELS[model]).kq_scale == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("model", MODELS)
def test_the_rotation_of_every_real_model_keeps_magnitudes(load: Load, model: str) -> None:
    assert rope_params(load, **MODELS[model]).rope_magnitude == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("model", ["V2-Lite", "V3"])
def test_inv_freq_has_its_reference_values(load: Load, model: str) -> None:
    pairs = [0, 1, 9, 10, 11, 16, 22, 23, 31]
    expected = [1.0, 0.749894209, 0.0749894209, 0.0562341325, 0.0390069266, 0.0055]
    expected += [1.77827941e-4, 3.33380358e-5, 3.33380358e-6]
    inv_freq = rope_params(load, **MODELS[model]).inv_freq
    assert inv_freq.shape == (32,)
    # the reference has nine digits
    assert_close(inv_freq[pairs], np.array(expected), rtol=3e-9, dtype=np.float64)


def test_inv_freq_of_kimi_k2_is_interpolated_between_pairs_8_and_20(load: Load) -> None:
    inv_freq = rope_params(load, **KIMI_K2).inv_freq
    plain = 50000.0 ** (-np.arange(32) / 32.0)
    assert_close(inv_freq[:9], plain[:9], rtol=1e-12)
    assert_close(inv_freq[20:], plain[20:] / 32.0, rtol=1e-12)
    between = inv_freq[9:20] / plain[9:20]
    assert (between < 1.0).all() and (between > 1.0 / 32.0).all() and (np.diff(between) < 0).all()


def test_inv_freq_without_scaling_is_a_geometric_series(load: Load) -> None:
    assert_close(rope_params(load).inv_freq, 10000.0 ** (-np.arange(32) / 32.0), rtol=1e-12, dtype=np.float64)


def test_linear_scaling_divides_every_frequency(load: Load) -> None:
    scaled = rope_params(load, rope_scaling="linear", rope_factor=4.0)
    assert_close(scaled.inv_freq, rope_params(load).inv_freq / 4.0, rtol=1e-12)
    assert scaled.rope_magnitude == 1.0


def test_linear_scaling_scales_kq_too(load: Load) -> None:
    # what llama.cpp computes for deepseek2, as its logits show; no known file has it
    growth = 1.0 + 0.1 * math.log(4.0)
    h = rope_params(load, rope_scaling="linear", rope_factor=4.0)
    assert h.kq_scale == pytest.approx(growth**2 / math.sqrt(192))


def test_yarn_without_a_log_multiplier_scales_rotation_and_kq(load: Load) -> None:
    # odd, but what llama.cpp computes: the growth goes into cos and sin of q and of k, and squared into kq_scale
    growth = 1.0 + 0.1 * math.log(40.0)
    h = rope_params(load, rope_scaling="yarn", rope_factor=40.0)
    assert h.rope_magnitude == pytest.approx(growth)
    assert h.kq_scale == pytest.approx(growth**2 / math.sqrt(192))


def test_the_attention_factor_of_the_file_multiplies_rotation_and_kq(load: Load) -> None:
    h = rope_params(load, **V3, rope_attn_factor=1.5)
    assert h.rope_magnitude == pytest.approx(1.5)
    assert h.kq_scale == pytest.approx(1.5**2 * 0.135233779, rel=1e-8)


def test_yarn_with_a_tiny_original_context_is_finite(load: Load) -> None:
    inv_freq = rope_params(load, **V3 | {"n_ctx_orig": 1}).inv_freq
    assert np.isfinite(inv_freq).all()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ("none", 1.0)),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 40.0}, ("none", 1.0)),
        ({"rope.scaling.factor": 4.0}, ("linear", 4.0)),
        ({"rope.scale_linear": 4.0}, ("linear", 4.0)),
        ({"rope.scaling.factor": 0.0}, ("none", 1.0)),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, ("linear", 4.0)),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 40.0}, ("yarn", 40.0)),
        ({"rope.scaling.type": "yarn"}, ("yarn", 1.0)),
    ],
)
def test_rope_scaling_and_its_factor_are_read(load: Load, changes: dict[str, Any], expected: tuple[str, float]) -> None:
    h = load(changes)
    assert (h.rope_scaling, h.rope_factor) == expected


def test_the_yarn_betas_of_the_file_are_ignored(load: Load) -> None:
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 40.0}
    with_betas = load({**yarn, "rope.scaling.yarn_beta_fast": 1.0, "rope.scaling.yarn_attn_factor": 3.0})
    assert with_betas == load(yarn)
