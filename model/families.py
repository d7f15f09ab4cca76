"""Hugging Face config.json <-> Architecture: a family is a function and a row of a table, never a class."""

from typing import Any

from configs.errors import UsageError
from model.architecture import Architecture, Rope

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}

# Fields that change the maths, and the only value of each that this family supports.
LLAMA_MUST_BE = {
    "pretraining_tp": 1,
    "is_decoder": False,
    "add_cross_attention": False,
    "sliding_window": None,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


def architecture_from_hf(config: dict[str, Any]) -> Architecture:
    """The Architecture of a config.json; raises UsageError for what would silently change the maths."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UsageError(f"model_type '{kind}' is not supported; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind](config)


def hf_config_from(arch: Architecture, **extra: Any) -> dict[str, Any]:
    """A config.json (Llama's keys) for an Architecture that has none; `extra` adds token ids and dtype."""
    if arch.qk_norm:
        raise UsageError("a Llama config.json cannot express q/k norms: export needs the model's own config.json")
    if arch.output_bias != arch.attention_bias:
        raise UsageError("Llama's attention_bias covers q, k, v and o together: this model has only some of them")
    rope: dict[str, Any] = {"rope_type": arch.rope.kind, "rope_theta": arch.rope.theta}
    if arch.rope.kind != "default":
        rope["factor"] = arch.rope.factor
    if arch.rope.kind == "llama3":
        rope |= {
            "low_freq_factor": arch.rope.low_freq_factor,
            "high_freq_factor": arch.rope.high_freq_factor,
            "original_max_position_embeddings": arch.rope.original_max_position,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.d_model,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads,
        "head_dim": arch.head_dim,
        "intermediate_size": arch.d_ff,
        "max_position_embeddings": arch.max_position,
        "rms_norm_eps": arch.norm_eps,
        "hidden_act": {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[arch.activation],
        "tie_word_embeddings": arch.tie_embeddings,
        "attention_bias": arch.attention_bias,
        "mlp_bias": arch.mlp_bias,
        "initializer_range": arch.init_std,
        "rope_theta": arch.rope.theta,  # transformers 4 reads these two,
        "rope_scaling": None if arch.rope.kind == "default" else rope,
        "rope_parameters": rope,  # transformers 5 this one
        **extra,
    }


def _llama(config: dict[str, Any]) -> Architecture:
    for key, allowed in LLAMA_MUST_BE.items():
        if config.get(key, allowed) not in (allowed, None):
            raise UsageError(f"config.json: {key} = {config[key]!r} is not supported (only {allowed!r})")
    heads = _need(config, "num_attention_heads")
    hidden = _need(config, "hidden_size")
    activation = config.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise UsageError(
            f"config.json: hidden_act = {activation!r} is unsupported; supported: {', '.join(ACTIVATIONS)}"
        )
    bias = bool(config.get("attention_bias", False))
    return Architecture(
        vocab_size=_need(config, "vocab_size"),
        d_model=hidden,
        num_layers=_need(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        d_ff=_need(config, "intermediate_size"),
        max_position=config.get("max_position_embeddings", 2048),
        rope=_rope(config),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        activation=ACTIVATIONS[activation],  # type: ignore[arg-type]
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        init_std=config.get("initializer_range", 0.02),
    )


def _rope(config: dict[str, Any]) -> Rope:
    """RoPE from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (4)."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    if scaling.get("partial_rotary_factor", 1.0) not in (1.0, None):
        raise UsageError(f"config.json: partial_rotary_factor = {scaling['partial_rotary_factor']} is not supported")
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, kind="linear", factor=float(_need(scaling, "factor", "rope_scaling.")))
    if kind == "llama3":
        need = lambda key: _need(scaling, key, "rope_scaling.")  # noqa: E731
        return Rope(
            theta=theta,
            kind="llama3",
            factor=float(need("factor")),
            low_freq_factor=float(need("low_freq_factor")),
            high_freq_factor=float(need("high_freq_factor")),
            original_max_position=int(need("original_max_position_embeddings")),
        )
    raise UsageError(f"config.json: RoPE scaling '{kind}' is not supported; supported: default, linear, llama3")


def _need(config: dict[str, Any], key: str, where: str = "") -> Any:
    if config.get(key) is None:
        raise UsageError(f"config.json: {where}{key} is missing; found: {', '.join(sorted(config))}")
    return config[key]


FAMILIES = {"llama": _llama}
