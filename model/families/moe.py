"""config.json of families with a mixture of experts."""

from collections.abc import Callable
from typing import Any

from configs.errors import UsageError
from model.architecture import Architecture, Experts
from model.families.fields import activation, activation_name, need, refuse, rope, rope_config, sizes_of

# Fields that change the maths, and the only value of each that is supported.
MUST_BE = {
    "attention_dropout": 0.0,
    "quantization_config": None,
    "router_jitter_noise": 0.0,
    "decoder_sparse_step": 1,
    "use_sliding_window": False,
}
AUX = 0.001  # router_aux_loss_coef, where a config says nothing


def base(config: dict[str, Any], experts: Experts, eps: float = 1e-6, theta: float = 10_000.0, **own: Any) -> Any:
    """What these families share with Llama."""
    refuse(config, MUST_BE)
    heads, hidden = need(config, "num_attention_heads"), need(config, "hidden_size")
    scaling = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    sizes: dict[str, Any] = {
        "vocab_size": need(config, "vocab_size"),
        "d_model": hidden,
        "num_layers": need(config, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or hidden // heads,
        "d_ff": config.get("intermediate_size") or experts.d_ff,
        "max_position": config.get("max_position_embeddings", 32_768),
        "rope": rope(scaling, config.get("rope_theta") or theta),
        "norm_eps": config.get("rms_norm_eps", eps),
        "activation": activation(config, "hidden_act", "silu"),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "init_std": config.get("initializer_range", 0.02),
    }
    return Architecture(**{**sizes, "experts": experts, "family": config["model_type"], **own})


def base_config(arch: Architecture, name: str, **own: Any) -> dict[str, Any]:
    scaling, e = rope_config(arch.rope), arch.experts
    assert e is not None
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": arch.family,
        **sizes_of(arch),
        "hidden_act": activation_name(arch),
        "num_experts_per_tok": e.top_k,
        "output_router_logits": e.aux_loss_coef > 0,
        "router_aux_loss_coef": e.aux_loss_coef or AUX,
        "rope_theta": arch.rope.theta,  # transformers 4 reads these two,
        "rope_scaling": None if arch.rope.kind == "default" else scaling,
        "rope_parameters": scaling,  # transformers 5 this one
        **own,
    }


def aux(config: dict[str, Any]) -> float:
    """The weight of the load-balance loss: transformers adds it where the router's logits are asked for."""
    return config.get("router_aux_loss_coef", AUX) if config.get("output_router_logits") else 0.0


def mixtral(config: dict[str, Any]) -> Architecture:
    """Mixtral (transformers modeling_mixtral.py, MixtralForCausalLM)."""
    experts = Experts(
        count=need(config, "num_local_experts"),
        top_k=need(config, "num_experts_per_tok"),
        d_ff=need(config, "intermediate_size"),
        aux_loss_coef=aux(config),
    )
    window = config.get("sliding_window")
    return base(config, experts, 1e-5, 1e6, windows=(window,) * config["num_hidden_layers"] if window else ())


def mixtral_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of a Mixtral."""
    assert arch.experts is not None
    own = {"num_local_experts": arch.experts.count, "sliding_window": arch.windows[0] if arch.windows else None}
    return base_config(arch, "Mixtral", **own)


def qwen2_moe(config: dict[str, Any]) -> Architecture:
    """Qwen2-MoE (transformers modeling_qwen2_moe.py, Qwen2MoeForCausalLM): a shared expert with a gate of its own."""
    shared = {"shared_d_ff": need(config, "shared_expert_intermediate_size"), "shared_gate": True}
    bias = bool(config.get("qkv_bias", True))
    return base(config, _qwen(config, **shared), attention_bias=bias, dense_layers=_first_dense(config))


def qwen3_moe(config: dict[str, Any]) -> Architecture:
    """Qwen3-MoE (transformers modeling_qwen3_moe.py, Qwen3MoeForCausalLM)."""
    bias = bool(config.get("attention_bias", False))
    own = {"attention_bias": bias, "output_bias": bias, "qk_norm": True, "dense_layers": _first_dense(config)}
    return base(config, _qwen(config), **own)


def _qwen(config: dict[str, Any], **own: Any) -> Experts:
    return Experts(
        count=need(config, "num_experts" if "num_experts" in config else "num_local_experts"),
        top_k=need(config, "num_experts_per_tok"),
        d_ff=need(config, "moe_intermediate_size"),
        normalise=bool(config.get("norm_topk_prob", False)),
        aux_loss_coef=aux(config),
        **own,
    )


def _first_dense(config: dict[str, Any]) -> int:
    """How many layers at the beginning are dense, if no others are (`mlp_only_layers`)."""
    dense = sorted(config.get("mlp_only_layers") or ())
    if dense != list(range(len(dense))):
        raise UsageError(f"config.json: mlp_only_layers = {dense} is not supported (only the first ones: 0, 1, ...)")
    return len(dense)


def _qwen_config(arch: Architecture, name: str, **own: Any) -> dict[str, Any]:
    e = arch.experts
    assert e is not None
    return base_config(arch, name) | {
        "num_experts": e.count,
        "moe_intermediate_size": e.d_ff,
        "norm_topk_prob": e.normalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(arch.dense_layers)),
        "use_sliding_window": False,
        **own,
    }


def qwen2_moe_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of a Qwen2-MoE."""
    assert arch.experts is not None
    shared = arch.experts.shared_d_ff
    return _qwen_config(arch, "Qwen2Moe", qkv_bias=arch.attention_bias, shared_expert_intermediate_size=shared)


def qwen3_moe_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of a Qwen3-MoE."""
    return _qwen_config(arch, "Qwen3Moe")


def glm4_moe(config: dict[str, Any]) -> Architecture:
    """GLM-4.5 (transformers modeling_glm4_moe.py, Glm4MoeForCausalLM): sigmoid scores, a shared expert without a gate."""
    own = {
        "attention_bias": bool(config.get("attention_bias", False)),
        "qk_norm": bool(config.get("use_qk_norm", False)),
        "dense_layers": config.get("first_k_dense_replace", 1),
    }
    config = {"partial_rotary_factor": 0.5, **config}
    return base(config, grouped(config, "sigmoid", True), 1e-5, **own)


def grouped(config: dict[str, Any], scores: Any, normalise: bool, **own: Any) -> Experts:
    """Experts in groups, as DeepSeek names the fields."""
    d_ff = need(config, "moe_intermediate_size")
    return Experts(
        count=need(config, "n_routed_experts" if "n_routed_experts" in config else "num_local_experts"),
        top_k=need(config, "num_experts_per_tok"),
        d_ff=d_ff,
        scores=scores,
        correction=scores == "sigmoid",
        normalise=bool(config.get("norm_topk_prob", normalise)),
        scale=float(config.get("routed_scaling_factor", 1.0)),
        shared_d_ff=d_ff * (config.get("n_shared_experts") or 0),
        **{"groups": config.get("n_group") or 1, "groups_kept": config.get("topk_group") or 1, **own},
    )


def grouped_config(arch: Architecture, name: str, **own: Any) -> dict[str, Any]:
    """A config.json with experts in groups."""
    e = arch.experts
    assert e is not None
    return base_config(arch, name) | {
        "n_routed_experts": e.count,
        "moe_intermediate_size": e.d_ff,
        "n_shared_experts": e.shared_d_ff // e.d_ff,
        "n_group": e.groups,
        "topk_group": e.groups_kept,
        "norm_topk_prob": e.normalise,
        "routed_scaling_factor": e.scale,
        "first_k_dense_replace": arch.dense_layers,
        "num_nextn_predict_layers": 0,
        **own,
    }


def glm4_moe_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of a GLM-4.5."""
    return grouped_config(arch, "Glm4Moe", use_qk_norm=arch.qk_norm)


FAMILIES: dict[str, tuple[Callable[[dict[str, Any]], Architecture], Callable[[Architecture], dict[str, Any]]]] = {
    "mixtral": (mixtral, mixtral_config),
    "qwen2_moe": (qwen2_moe, qwen2_moe_config),
    "qwen3_moe": (qwen3_moe, qwen3_moe_config),
    "glm4_moe": (glm4_moe, glm4_moe_config),
}
