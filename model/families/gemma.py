"""Gemma's config.json."""

import math
from typing import Any

from configs.errors import UsageError
from model.architecture import Architecture, Rope
from model.families.fields import (
    FULL,
    SLIDING,
    activation_name,
    common,
    layer_types,
    refuse,
    rope,
    rope_config,
    sizes_of,
    windows_of,
    written,
)

# Fields that change the maths, and the only value of each that is supported.
GEMMA3_MUST_BE = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "attention_dropout": 0.0,
    "quantization_config": None,
}


ACT = ("hidden_activation", "gelu_pytorch_tanh")


def gemma2(config: dict[str, Any]) -> Architecture:
    """Gemma 2 (transformers modeling_gemma2.py): soft caps of scores and logits, a window in every other layer."""
    read = common(config, "gemma2", act=ACT, tie=True, context=8192, head_dim=256)
    caps = (config.get("attn_logit_softcapping", 50.0), config.get("final_logit_softcapping", 30.0))
    return Architecture(
        **read,
        **_gemma(config, read["d_model"]),
        attention_softcap=caps[0] and float(caps[0]),
        logit_softcap=caps[1] and float(caps[1]),
        windows=windows_of(config, [i % 2 == 0 for i in range(read["num_layers"])], 4096),
    )


def _gemma(config: dict[str, Any], width: int) -> dict[str, Any]:
    refuse(config, {"use_bidirectional_attention": False})
    bias = bool(config.get("attention_bias", False))
    return {
        "attention_bias": bias,
        "output_bias": bias,
        "norm_offset": 1.0,
        "post_norms": True,
        "embed_scale": math.sqrt(width),
        "query_pre_attn_scalar": float(config.get("query_pre_attn_scalar", 256)),
    }


def gemma2_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of Gemma 2."""
    return written(
        arch,
        "Gemma2",
        hidden_activation=activation_name(arch),
        query_pre_attn_scalar=_scalar(arch),
        attn_logit_softcapping=arch.attention_softcap,
        final_logit_softcapping=arch.logit_softcap,
        layer_types=layer_types(arch),
        sliding_window=max(arch.windows, default=4096),
    )


def _scalar(arch: Architecture) -> int | float:
    scalar = arch.query_pre_attn_scalar or arch.head_dim
    return int(scalar) if scalar == int(scalar) else scalar


def gemma3(config: dict[str, Any]) -> Architecture:
    """Gemma 3's text model (transformers modeling_gemma3.py, Gemma3ForCausalLM)."""
    refuse(config, GEMMA3_MUST_BE)
    ropes = config.get("rope_parameters") or {}
    if surplus := set(ropes) - {SLIDING, FULL}:
        raise UsageError(f"config.json: rope_parameters.{min(surplus)}: only {SLIDING} and {FULL} are supported there")
    full = {**(ropes.get(FULL) or {}), **(config.get("rope_scaling") or {})}
    read = common(
        config, "gemma3_text", act=ACT, tie=True, context=131_072, theta=1_000_000.0, head_dim=256, scaling=full
    )
    layers, every = read["num_layers"], config.get("sliding_window_pattern") or 6  # in files of transformers 4
    windows = windows_of(config, [(i + 1) % every != 0 for i in range(layers)])
    local = rope(ropes.get(SLIDING) or {}, config.get("rope_local_base_freq") or 10_000.0, read["max_position"])
    return Architecture(
        **read,
        **_gemma(config, read["d_model"]),
        qk_norm=True,
        windows=windows,
        local_rope=local if windows else None,
    )


def gemma3_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of Gemma 3's text model."""
    full = rope_config(arch.rope)
    local = arch.local_rope or Rope()
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **sizes_of(arch),
        "hidden_activation": activation_name(arch),
        "query_pre_attn_scalar": _scalar(arch),
        "layer_types": layer_types(arch),
        "sliding_window": max(arch.windows, default=4096),
        "rope_theta": arch.rope.theta,  # transformers 4 reads these three,
        "rope_local_base_freq": local.theta,
        "rope_scaling": None if arch.rope.kind == "default" else full,
        "rope_parameters": {FULL: full, SLIDING: rope_config(local)},  # transformers 5 this one
    }
