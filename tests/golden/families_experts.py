"""The families with experts among those of tests/golden/families.py: class, model_type and fields of each."""

from typing import Any

LOCAL, FULL = "sliding_attention", "full_attention"
GROUPED: dict[str, Any] = {
    "moe_intermediate_size": 12,
    "num_experts_per_tok": 3,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e2,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}
PLAIN = {"rope_type": "default", "rope_theta": 1e2}


def _row(name: str, kind: str, **fields: Any) -> tuple[str, str, dict[str, Any]]:
    return name, kind, fields


ROWS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": _row(
        "MixtralForCausalLM", "mixtral", rms_norm_eps=1e-5, head_dim=8, intermediate_size=12, num_local_experts=4,
        num_experts_per_tok=2, sliding_window=5, rope_parameters=PLAIN,
    ),
    "qwen2_moe": _row(
        "Qwen2MoeForCausalLM", "qwen2_moe", rms_norm_eps=1e-5, num_experts=6, num_experts_per_tok=2,
        moe_intermediate_size=12, shared_expert_intermediate_size=16, norm_topk_prob=False, rope_parameters=PLAIN,
    ),
    "qwen3_moe": _row(
        "Qwen3MoeForCausalLM", "qwen3_moe", rms_norm_eps=1e-5, head_dim=8, num_experts=6, num_experts_per_tok=2,
        moe_intermediate_size=12, norm_topk_prob=True, mlp_only_layers=[0], rope_parameters=PLAIN,
        attention_bias=True,
    ),
    "glm4_moe": _row(
        "Glm4MoeForCausalLM", "glm4_moe", rms_norm_eps=1e-5, head_dim=8, **GROUPED, norm_topk_prob=True,
        use_qk_norm=True, attention_bias=True, rope_parameters={**PLAIN, "partial_rotary_factor": 0.5},
    ),
    "deepseek_v2": _row(
        "DeepseekV2ForCausalLM", "deepseek_v2", rms_norm_eps=1e-5, **{**GROUPED, **LATENT}, q_lora_rank=None,
        topk_method="group_limited_greedy", norm_topk_prob=False, rope_parameters=PLAIN,
    ),
    "deepseek_v3": _row(
        "DeepseekV3ForCausalLM", "deepseek_v3", rms_norm_eps=1e-5, **{**GROUPED, **LATENT}, q_lora_rank=14,
        norm_topk_prob=True, attention_bias=True, rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
    ),
    "gpt_oss": _row(
        "GptOssForCausalLM", "gpt_oss", rms_norm_eps=1e-5, head_dim=8, intermediate_size=12, num_local_experts=6,
        num_experts_per_tok=2, swiglu_alpha=1.5, swiglu_limit=1.0, sliding_window=5, attention_bias=True,
        layer_types=[LOCAL, FULL, LOCAL, FULL], rope_parameters={**YARN, "truncate": False},
    ),
}  # fmt: skip
