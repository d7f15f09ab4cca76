"""Gemma's config.json."""

import math
from typing import Any

from configs.errors import UsageError
from model.architecture import Architecture, Rope
from model.families.fields import activation, activation_name, need, refuse, rope, rope_config, sizes_of

# Fields that change the maths, and the only value of each that is supported.
GEMMA3_MUST_BE = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "attention_dropout": 0.0,
    "quantization_config": None,
}
SLIDING, FULL = "sliding_attention", "full_attention"


def gemma3(config: dict[str, Any]) -> Architecture:
    """Gemma 3's text model (transformers modeling_gemma3.py, Gemma3ForCausalLM)."""
    refuse(config, GEMMA3_MUST_BE)
    hidden, layers = need(config, "hidden_size"), need(config, "num_hidden_layers")
    bias = bool(config.get("attention_bias", False))
    windows = windows_of(config, layers)
    ropes = config.get("rope_parameters") or {}
    if surplus := set(ropes) - {SLIDING, FULL}:
        raise UsageError(f"config.json: rope_parameters.{min(surplus)}: only {SLIDING} and {FULL} are supported there")
    full = {**(ropes.get(FULL) or {}), **(config.get("rope_scaling") or {})}
    local = rope(ropes.get(SLIDING) or {}, config.get("rope_local_base_freq") or 10_000.0)
    return Architecture(
        family="gemma3_text",
        vocab_size=need(config, "vocab_size"),
        d_model=hidden,
        num_layers=layers,
        num_heads=need(config, "num_attention_heads"),
        num_kv_heads=need(config, "num_key_value_heads"),
        head_dim=config.get("head_dim") or 256,
        d_ff=need(config, "intermediate_size"),
        max_position=config.get("max_position_embeddings", 131_072),
        rope=rope(full, config.get("rope_theta") or 1_000_000.0),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        activation=activation(config, "hidden_activation", "gelu_pytorch_tanh"),
        tie_embeddings=bool(config.get("tie_word_embeddings", True)),
        attention_bias=bias,
        output_bias=bias,
        qk_norm=True,
        init_std=config.get("initializer_range", 0.02),
        norm_offset=1.0,
        post_norms=True,
        embed_scale=math.sqrt(hidden),
        query_pre_attn_scalar=float(config.get("query_pre_attn_scalar", 256)),
        windows=windows,
        local_rope=local if windows else None,
    )


def windows_of(config: dict[str, Any], layers: int) -> tuple[int, ...]:
    """Per layer its window, from `layer_types` or, in older files, every sixth (`sliding_window_pattern`) without."""
    every = config.get("sliding_window_pattern") or 6
    kinds = config.get("layer_types") or [FULL if (i + 1) % every == 0 else SLIDING for i in range(layers)]
    if len(kinds) != layers or set(kinds) - {SLIDING, FULL}:
        raise UsageError(
            f"config.json: layer_types has {len(kinds)} entries of {', '.join(sorted(set(map(str, kinds))))}; needed: "
            f"{layers} (num_hidden_layers) of {SLIDING} or {FULL}"
        )
    if SLIDING not in kinds:
        return ()
    window = need(config, "sliding_window")
    if not isinstance(window, int) or window < 1:
        raise UsageError(f"config.json: sliding_window = {window!r}: a positive number is needed")
    return tuple(window if kind == SLIDING else 0 for kind in kinds)


def gemma3_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of Gemma 3's text model."""
    full = rope_config(arch.rope)
    local, scalar = arch.local_rope or Rope(), arch.query_pre_attn_scalar or arch.head_dim
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **sizes_of(arch),
        "hidden_activation": activation_name(arch),
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "layer_types": [SLIDING if window else FULL for window in arch.windows or (0,) * arch.num_layers],
        "sliding_window": max(arch.windows, default=4096),
        "rope_theta": arch.rope.theta,  # transformers 4 reads these three,
        "rope_local_base_freq": local.theta,
        "rope_scaling": None if arch.rope.kind == "default" else full,
        "rope_parameters": {FULL: full, SLIDING: rope_config(local)},  # transformers 5 this one
    }
