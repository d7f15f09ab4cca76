"""DeepSeek's config.json: latent attention and experts in groups."""

import math
from typing import Any

from configs.errors import UsageError
from model.architecture import Architecture, Experts, Latent
from model.families.fields import common, need, refuse
from model.families.moe import grouped, grouped_config

# Fields that change the maths, and the only value of each that is supported.
BOTH = {"moe_layer_freq": 1, "attention_dropout": 0.0}
V2_MUST_BE = {**BOTH, "scoring_func": "softmax", "norm_topk_prob": False, "mlp_bias": False}
V3_MUST_BE = {**BOTH, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_interleave": True}
GREEDY, LIMITED = "greedy", "group_limited_greedy"


def deepseek_v2(config: dict[str, Any]) -> Architecture:
    """DeepSeek-V2 (transformers modeling_deepseek_v2.py): the best groups are those of the best expert."""
    refuse(config, V2_MUST_BE)
    method = config.get("topk_method", GREEDY)
    if method not in (GREEDY, LIMITED):
        raise UsageError(f"config.json: topk_method = {method!r} is not supported (only {GREEDY!r} and {LIMITED!r})")
    none = {"groups": 1, "groups_kept": 1} if method == GREEDY else {}
    return _latent(config, "deepseek_v2", grouped(config, "softmax", False, group_best=1, **none), 0)


def deepseek_v3(config: dict[str, Any]) -> Architecture:
    """DeepSeek-V3 and R1 (transformers modeling_deepseek_v3.py): sigmoid scores, and a bias for choosing."""
    refuse(config, V3_MUST_BE)
    return _latent(config, "deepseek_v3", grouped(config, "sigmoid", True), 3)


def _latent(config: dict[str, Any], family: str, experts: Experts, dense: int) -> Architecture:
    read, rope_dim = common(config, family, context=4096, interleaved=True), need(config, "qk_rope_head_dim")
    if read["num_kv_heads"] != read["num_heads"]:
        raise UsageError(
            f"config.json: num_key_value_heads = {read['num_kv_heads']} is not supported with latent attention (only "
            f"num_attention_heads, {read['num_heads']})"
        )
    size, bias = need(config, "qk_nope_head_dim") + rope_dim, bool(config.get("attention_bias", False))
    return Architecture(
        **{**read, "head_dim": size},
        experts=experts,
        latent=Latent(need(config, "kv_lora_rank"), rope_dim, need(config, "v_head_dim"), config.get("q_lora_rank")),
        attention_bias=bias,
        output_bias=bias,
        attention_multiplier=_multiplier(config, size),
        dense_layers=config.get("first_k_dense_replace", dense),
    )


def _multiplier(config: dict[str, Any], size: int) -> float | None:
    """YaRN as DeepSeek has it also scales the scores, by (0.1 mscale_all_dim ln(factor) + 1)^2."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind, whole = scaling.get("rope_type") or scaling.get("type") or "default", scaling.get("mscale_all_dim")
    if kind == "default" or not whole or scaling.get("factor", 1) <= 1:
        return None
    return size**-0.5 * (0.1 * whole * math.log(scaling["factor"]) + 1) ** 2


def _latent_config(arch: Architecture, name: str, **own: Any) -> dict[str, Any]:
    m = arch.latent
    assert m is not None
    sizes = {
        "kv_lora_rank": m.rank,
        "q_lora_rank": m.q_rank,
        "qk_rope_head_dim": m.rope_dim,
        "qk_nope_head_dim": arch.head_dim - m.rope_dim,
        "v_head_dim": m.value_dim,
        "head_dim": m.rope_dim,  # transformers calls it so
    }
    made = grouped_config(arch, name, **sizes, **own)
    if arch.attention_multiplier is not None:  # its inverse, and of that both grow with the same logarithm
        more = math.sqrt(arch.attention_multiplier * arch.head_dim**0.5)
        whole = round((more - 1) / (0.1 * math.log(arch.rope.factor)), 12)
        made["rope_parameters"] = {**made["rope_parameters"], "mscale_all_dim": whole}
        made["rope_scaling"] = made["rope_parameters"]
    return made


def deepseek_v2_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of a DeepSeek-V2."""
    method = LIMITED if arch.experts and arch.experts.groups > 1 else GREEDY
    return _latent_config(arch, "DeepseekV2", topk_method=method)


def deepseek_v3_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of a DeepSeek-V3."""
    return _latent_config(arch, "DeepseekV3", rope_interleave=True)
