"""Llama's config.json, and those of the families that keep its block: Mistral, Qwen, SmolLM3, Granite."""

from typing import Any

from model.architecture import Architecture
from model.families.fields import common, inverse, layer_types, one_window, refuse, windows_of, written

# Fields that change the maths, and the only value of each that is supported.
MUST_BE = {
    "pretraining_tp": 1,
    "is_decoder": False,
    "add_cross_attention": False,
    "sliding_window": None,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


def llama(config: dict[str, Any]) -> Architecture:
    """Llama (transformers modeling_llama.py, LlamaForCausalLM)."""
    refuse(config, MUST_BE)
    bias = bool(config.get("attention_bias", False))
    mlp_bias = bool(config.get("mlp_bias", False))
    return Architecture(**common(config, "llama"), attention_bias=bias, output_bias=bias, mlp_bias=mlp_bias)


def llama_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of a Llama."""
    return written(arch, "Llama", mlp_bias=arch.mlp_bias)


def mistral(config: dict[str, Any]) -> Architecture:
    """Mistral (transformers modeling_mistral.py): every layer has the window, if there is one."""
    read = common(config, "mistral", context=131_072)
    return Architecture(**read, windows=one_window(config, read["num_layers"], 4096))


def mistral_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of a Mistral."""
    return written(arch, "Mistral", sliding_window=max(arch.windows, default=None))


def qwen2(config: dict[str, Any]) -> Architecture:
    """Qwen2 and Qwen2.5 (transformers modeling_qwen2.py): biases on q, k and v."""
    read = common(config, "qwen2", context=32_768)
    return Architecture(**read, attention_bias=True, windows=_upper(config, read["num_layers"]))


def _upper(config: dict[str, Any], layers: int) -> tuple[int, ...]:
    """Windows of the layers from number max_window_layers on, where use_sliding_window says so."""
    first, used = config.get("max_window_layers", 28), config.get("use_sliding_window")
    if config.get("sliding_window", 4096) is None or not used:
        return ()
    return windows_of(config, [i >= first for i in range(layers)], 4096)


def _windows_config(arch: Architecture) -> dict[str, Any]:
    return {
        "use_sliding_window": bool(arch.windows),
        "sliding_window": max(arch.windows, default=None),
        "layer_types": layer_types(arch),
    }


def qwen2_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of a Qwen2."""
    return written(arch, "Qwen2", **_windows_config(arch))


def qwen3(config: dict[str, Any]) -> Architecture:
    """Qwen3 (transformers modeling_qwen3.py): q and k are normed."""
    read, bias = common(config, "qwen3", context=32_768, head_dim=128), bool(config.get("attention_bias", False))
    windows = _upper(config, read["num_layers"])
    return Architecture(**read, qk_norm=True, attention_bias=bias, output_bias=bias, windows=windows)


def qwen3_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of a Qwen3."""
    return written(arch, "Qwen3", **_windows_config(arch))


def smollm3(config: dict[str, Any]) -> Architecture:
    """SmolLM3 (transformers modeling_smollm3.py): no RoPE in some layers, every fourth if nothing is said."""
    read, bias = common(config, "smollm3", tie=True, context=32_768), bool(config.get("attention_bias", False))
    layers, every = read["num_layers"], config.get("no_rope_layer_interval", 4)
    # the field's name notwithstanding, 1 is a layer with RoPE
    rotated = config.get("no_rope_layers") or [(i + 1) % every != 0 for i in range(layers)]
    windowed = config.get("use_sliding_window") and config.get("sliding_window") is not None
    return Architecture(
        **read,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        rotated=() if all(rotated) else tuple(map(bool, rotated)),
        windows=windows_of(config, [not turns for turns in rotated]) if windowed else (),
    )


def smollm3_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of a SmolLM3."""
    rotated = [int(turns) for turns in arch.rotated or (True,) * arch.num_layers]
    return written(arch, "SmolLM3", no_rope_layers=rotated, mlp_bias=arch.mlp_bias, **_windows_config(arch))


def granite(config: dict[str, Any]) -> Architecture:
    """Granite (transformers modeling_granite.py): Llama with factors on embeddings, residuals, scores and logits."""
    read, bias = common(config, "granite"), bool(config.get("attention_bias", False))
    return Architecture(
        **read,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        embed_scale=float(config.get("embedding_multiplier", 1.0)),
        residual_scale=float(config.get("residual_multiplier", 1.0)),
        attention_multiplier=float(config.get("attention_multiplier", 1.0)),
        logit_scale=1 / float(config.get("logits_scaling", 1.0)),
    )


def granite_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of a Granite."""
    return written(
        arch,
        "Granite",
        mlp_bias=arch.mlp_bias,
        embedding_multiplier=arch.embed_scale,
        residual_multiplier=arch.residual_scale,
        attention_multiplier=arch.attention_multiplier or arch.head_dim**-0.5,
        logits_scaling=inverse(arch.logit_scale),
    )
