"""DeepSeek's config.json: latent attention and experts in groups."""

import math
from typing import Any

from configs.errors import UsageError
from model.architecture import Architecture, Experts, Latent
from model.families.fields import need, refuse
from model.families.moe import base, grouped, grouped_config

# Fields that change the maths, and the only value of each that is supported.
V2_MUST_BE = {"scoring_func": "softmax", "norm_topk_prob": False, "moe_layer_freq": 1, "mlp_bias": False}
V3_MUST_BE = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "rope_interleave": True}
GREEDY, LIMITED = "greedy", "group_limited_greedy"


def deepseek_v2(config: dict[str, Any]) -> Architecture:
    """DeepSeek-V2 (transformers modeling_deepseek_v2.py): the best groups are those of the best expert."""
    refuse(config, V2_MUST_BE)
    method = config.get("topk_method", GREEDY)
    if method not in (GREEDY, LIMITED):
        raise UsageError(f"config.json: topk_method = {method!r} is not supported (only {GREEDY!r} and {LIMITED!r})")
    none = {"groups": 1, "groups_kept": 1} if method == GREEDY else {}
    return _latent(config, grouped(config, "softmax", False, group_best=1, **none), 0)


def deepseek_v3(config: dict[str, Any]) -> Architecture:
    """DeepSeek-V3 and R1 (transformers modeling_deepseek_v3.py): sigmoid scores, and a bias for choosing."""
    refuse(config, V3_MUST_BE)
    return _latent(config, grouped(config, "sigmoid", True), 3)


def _latent(config: dict[str, Any], experts: Experts, dense: int) -> Architecture:
    rope_dim, heads = need(config, "qk_rope_head_dim"), need(config, "num_attention_heads")
    if config.get("num_key_value_heads") not in (heads, None):
        raise UsageError(
            f"config.json: num_key_value_heads = {config['num_key_value_heads']} is not supported with latent "
            f"attention (only num_attention_heads, {heads})"
        )
    size, bias = need(config, "qk_nope_head_dim") + rope_dim, bool(config.get("attention_bias", False))
    return base(
        config,
        experts,
        head_dim=size,
        latent=Latent(need(config, "kv_lora_rank"), rope_dim, need(config, "v_head_dim"), config.get("q_lora_rank")),
        attention_bias=bias,
        output_bias=bias,
        query_pre_attn_scalar=_scalar(config, size),
        dense_layers=config.get("first_k_dense_replace", dense),
    )


def _scalar(config: dict[str, Any], size: int) -> float | None:
    """YaRN as DeepSeek has it also scales the scores, by (0.1 mscale_all_dim ln(factor) + 1)^2."""
    scaling = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind, whole = scaling.get("rope_type") or scaling.get("type") or "default", scaling.get("mscale_all_dim")
    if kind == "default" or not whole or scaling.get("factor", 1) <= 1:
        return None
    return size / (0.1 * whole * math.log(scaling["factor"]) + 1) ** 4


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
    return grouped_config(arch, name, **sizes, **own)


def deepseek_v2_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of a DeepSeek-V2."""
    method = LIMITED if arch.experts and arch.experts.groups > 1 else GREEDY
    return _latent_config(arch, "DeepseekV2", topk_method=method)


def deepseek_v3_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of a DeepSeek-V3."""
    return _latent_config(arch, "DeepseekV3", rope_interleave=True)
