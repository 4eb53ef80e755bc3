"""Toy models of every routing, rope and file variant: options of synthetic.write_model."""

VARIANTS = {
    "softmax": {},
    "softmax, normalised": {"expert_weights_norm": True},
    "softmax, scaled": {"expert_weights_scale": 16.0},
    "scale 0": {"expert_weights_scale": 0.0},
    "no gating key": {"expert_gating": None},
    "sigmoid": {"expert_gating": "sigmoid"},
    "sigmoid, bias": {"expert_gating": "sigmoid", "selection_bias": True},
    "sigmoid, bias, normalised, scaled": {
        "expert_gating": "sigmoid", "selection_bias": True, "expert_weights_norm": True, "expert_weights_scale": 2.5,
    },
    "groups": {
        "expert_gating": "sigmoid", "selection_bias": True, "n_expert": 12, "n_expert_groups": 4, "n_group_used": 2,
    },
    "two shared experts": {"n_expert_shared": 2},
    "merged gate_up": {"merged_gate_up": True},
    "dense": {"n_expert": 0},
    "two dense layers first": {"n_layer_dense_lead": 2},
    "tied": {"tied": True},
    "a large eps": {"rms_eps": 0.1},
    "an MTP block": {"n_layer_nextn": 1},
    "q from one matrix": {"q_lora_rank": 0, "n_layer": 26, "n_layer_dense_lead": 25},
    "yarn": {"rope_scaling": "yarn"},
    "yarn, no log multiplier": {"rope_scaling": "yarn", "yarn_log_multiplier": 0.0},
    "yarn, attention factor": {"rope_scaling": "yarn", "rope_attn_factor": 1.3},
    "linear": {"rope_scaling": "linear", "rope_factor": 4.0},
    "linear, attention factor": {"rope_scaling": "linear", "rope_factor": 4.0, "rope_attn_factor": 1.3},
    "legacy, yarn": {"rope_scaling": "yarn", "form": "legacy"},
}  # fmt: skip
