"""config.json of families with a mixture of experts."""

from typing import Any

from configs.errors import UsageError
from model.architecture import Architecture, Experts
from model.families.fields import common, need, one_window, refuse, written

# Fields that change the maths, and the only value of each that is supported.
MUST_BE = {"attention_dropout": 0.0, "router_jitter_noise": 0.0, "decoder_sparse_step": 1, "use_sliding_window": False}
AUX = 0.001  # router_aux_loss_coef, where a config says nothing


def aux(config: dict[str, Any]) -> float:
    """The weight of the load-balance loss: transformers adds it where the router's logits are asked for."""
    return config.get("router_aux_loss_coef", AUX) if config.get("output_router_logits") else 0.0


def router_config(arch: Architecture) -> dict[str, Any]:
    """How many experts a token has, and the load-balance loss."""
    e = arch.experts
    assert e is not None
    asked = e.aux_loss_coef > 0
    return {
        "num_experts_per_tok": e.top_k,
        "output_router_logits": asked,
        "router_aux_loss_coef": e.aux_loss_coef if asked else AUX,
    }


def mixtral(config: dict[str, Any]) -> Architecture:
    """Mixtral (transformers modeling_mixtral.py, MixtralForCausalLM)."""
    refuse(config, MUST_BE)
    read = common(config, "mixtral", eps=("rms_norm_eps", 1e-5), context=131_072, theta=1e6)
    experts = Experts(
        count=need(config, "num_local_experts"),
        top_k=need(config, "num_experts_per_tok"),
        d_ff=read["d_ff"],
        aux_loss_coef=aux(config),
    )
    return Architecture(**read, experts=experts, windows=one_window(config, read["num_layers"]))


def mixtral_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of a Mixtral."""
    assert arch.experts is not None
    window = max(arch.windows, default=None)
    own = {"num_local_experts": arch.experts.count, "sliding_window": window}
    return written(arch, "Mixtral", **router_config(arch), **own)


def qwen2_moe(config: dict[str, Any]) -> Architecture:
    """Qwen2-MoE (transformers modeling_qwen2_moe.py, Qwen2MoeForCausalLM): a shared expert with a gate of its own."""
    shared = {"shared_d_ff": need(config, "shared_expert_intermediate_size"), "shared_gate": True}
    return _qwen(config, "qwen2_moe", shared, attention_bias=bool(config.get("qkv_bias", True)))


def qwen3_moe(config: dict[str, Any]) -> Architecture:
    """Qwen3-MoE (transformers modeling_qwen3_moe.py, Qwen3MoeForCausalLM)."""
    bias = bool(config.get("attention_bias", False))
    return _qwen(config, "qwen3_moe", {}, attention_bias=bias, output_bias=bias, qk_norm=True)


def _qwen(config: dict[str, Any], family: str, shared: dict[str, Any], **own: Any) -> Architecture:
    refuse(config, MUST_BE)
    experts = Experts(
        count=need(config, "num_experts" if "num_experts" in config else "num_local_experts"),
        top_k=need(config, "num_experts_per_tok"),
        d_ff=need(config, "moe_intermediate_size"),
        normalise=bool(config.get("norm_topk_prob", False)),
        aux_loss_coef=aux(config),
        **shared,
    )
    dense = sorted(config.get("mlp_only_layers") or ())
    if dense != list(range(len(dense))):
        raise UsageError(f"config.json: mlp_only_layers = {dense} is not supported (only the first ones: 0, 1, ...)")
    config.get("sliding_window")  # of no effect without use_sliding_window
    return Architecture(**common(config, family, context=32_768), experts=experts, dense_layers=len(dense), **own)


def _qwen_config(arch: Architecture, name: str, **own: Any) -> dict[str, Any]:
    e = arch.experts
    assert e is not None
    fields = {
        "num_experts": e.count,
        "moe_intermediate_size": e.d_ff,
        "norm_topk_prob": e.normalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(arch.dense_layers)),
        "use_sliding_window": False,
    }
    return written(arch, name, **router_config(arch), **fields, **own)


def qwen2_moe_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of a Qwen2-MoE."""
    assert arch.experts is not None
    shared = arch.experts.shared_d_ff
    return _qwen_config(arch, "Qwen2Moe", qkv_bias=arch.attention_bias, shared_expert_intermediate_size=shared)


def qwen3_moe_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of a Qwen3-MoE."""
    return _qwen_config(arch, "Qwen3Moe")


def glm4_moe(config: dict[str, Any]) -> Architecture:
    """GLM-4.5 (transformers modeling_glm4_moe.py, Glm4MoeForCausalLM): sigmoid scores, shared experts, no gate."""
    refuse(config, MUST_BE)
    read = common(config, "glm4_moe", eps=("rms_norm_eps", 1e-5), context=131_072, fraction=0.5)
    return Architecture(
        **read,
        experts=grouped(config, "sigmoid", True),
        dense_layers=config.get("first_k_dense_replace", 1),
        attention_bias=bool(config.get("attention_bias", False)),
        qk_norm=bool(config.get("use_qk_norm", False)),
    )


def grouped(config: dict[str, Any], scores: Any, normalise: bool, **own: Any) -> Experts:
    """Experts in groups, as DeepSeek names the fields."""
    d_ff = need(config, "moe_intermediate_size")
    fields = {
        "count": need(config, "n_routed_experts" if "n_routed_experts" in config else "num_local_experts"),
        "top_k": need(config, "num_experts_per_tok"),
        "d_ff": d_ff,
        "scores": scores,
        "correction": scores == "sigmoid",
        "normalise": bool(config.get("norm_topk_prob", normalise)),
        "scale": float(config.get("routed_scaling_factor", 1.0)),
        "groups": config.get("n_group") or 1,
        "groups_kept": config.get("topk_group") or 1,
        "shared_d_ff": d_ff * (config.get("n_shared_experts") or 0),
    }
    return Experts(**{**fields, **own})


def grouped_config(arch: Architecture, name: str, **own: Any) -> dict[str, Any]:
    """A config.json with experts in groups."""
    e = arch.experts
    assert e is not None
    fields = {
        "num_experts_per_tok": e.top_k,
        "n_routed_experts": e.count,
        "moe_intermediate_size": e.d_ff,
        "n_shared_experts": e.shared_d_ff // e.d_ff,
        "n_group": e.groups,
        "topk_group": e.groups_kept,
        "norm_topk_prob": e.normalise,
        "routed_scaling_factor": e.scale,
        "first_k_dense_replace": arch.dense_layers,
        "num_nextn_predict_layers": 0,
    }
    return written(arch, name, **{**fields, **own})


def glm4_moe_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of a GLM-4.5."""
    return grouped_config(arch, "Glm4Moe", use_qk_norm=arch.qk_norm)
