"""Llama's config.json."""

from typing import Any

from model.architecture import Architecture
from model.families.fields import activation, activation_name, need, refuse, rope, rope_config, sizes_of

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
    heads = need(config, "num_attention_heads")
    hidden = need(config, "hidden_size")
    bias = bool(config.get("attention_bias", False))
    return Architecture(
        vocab_size=need(config, "vocab_size"),
        d_model=hidden,
        num_layers=need(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        d_ff=need(config, "intermediate_size"),
        max_position=config.get("max_position_embeddings", 2048),
        rope=rope(
            config.get("rope_parameters") or config.get("rope_scaling") or {}, config.get("rope_theta") or 10_000.0
        ),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        activation=activation(config, "hidden_act", "silu"),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        init_std=config.get("initializer_range", 0.02),
    )


def llama_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of a Llama."""
    scaling = rope_config(arch.rope)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **sizes_of(arch),
        "hidden_act": activation_name(arch),
        "mlp_bias": arch.mlp_bias,
        "rope_theta": arch.rope.theta,  # transformers 4 reads these two,
        "rope_scaling": None if arch.rope.kind == "default" else scaling,
        "rope_parameters": scaling,  # transformers 5 this one
    }
