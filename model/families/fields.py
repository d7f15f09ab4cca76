"""What the families' readers and writers of config.json share: required and refused fields, activations, RoPE."""

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
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def refuse(config: dict[str, Any], must_be: dict[str, Any]) -> None:
    """UsageError for a field whose value is not the supported one."""
    for key, allowed in must_be.items():
        if config.get(key, allowed) not in (allowed, None):
            raise UsageError(f"config.json: {key} = {config[key]!r} is not supported (only {allowed!r})")


def need(config: dict[str, Any], key: str, where: str = "") -> Any:
    """A field that must be there."""
    if config.get(key) is None:
        raise UsageError(f"config.json: {where}{key} is missing; found: {', '.join(sorted(config))}")
    return config[key]


def sizes_of(arch: Architecture) -> dict[str, Any]:
    """The keys that all families write alike."""
    return {
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.d_model,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads,
        "head_dim": arch.head_dim,
        "intermediate_size": arch.d_ff,
        "max_position_embeddings": arch.max_position,
        "rms_norm_eps": arch.norm_eps,
        "tie_word_embeddings": arch.tie_embeddings,
        "attention_bias": arch.attention_bias,
        "initializer_range": arch.init_std,
    }


def activation(config: dict[str, Any], key: str, default: str) -> Any:
    """Our name of the activation in field `key`."""
    name = config.get(key, default)
    if name not in ACTIVATIONS:
        raise UsageError(f"config.json: {key} = {name!r} is unsupported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def activation_name(arch: Architecture) -> str:
    """Hugging Face's name of the activation."""
    return {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[arch.activation]


def rope(scaling: dict[str, Any], theta: float) -> Rope:
    """RoPE from `rope_parameters` (transformers 5) or `rope_scaling` (4); theta: where that says nothing."""
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    theta = float(scaling.get("rope_theta") or theta)
    if scaling.get("partial_rotary_factor", 1.0) not in (1.0, None):
        raise UsageError(f"config.json: partial_rotary_factor = {scaling['partial_rotary_factor']} is not supported")
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, kind="linear", factor=float(need(scaling, "factor", "rope_scaling.")))
    if kind == "llama3":
        values = {key: need(scaling, key, "rope_scaling.") for key in LLAMA3}
        return Rope(
            theta=theta,
            kind="llama3",
            factor=float(values["factor"]),
            low_freq_factor=float(values["low_freq_factor"]),
            high_freq_factor=float(values["high_freq_factor"]),
            original_max_position=int(values["original_max_position_embeddings"]),
        )
    raise UsageError(f"config.json: RoPE scaling '{kind}' is not supported; supported: default, linear, llama3")


def rope_config(rope: Rope) -> dict[str, Any]:
    """`rope_parameters` of a Rope."""
    config: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        config["factor"] = rope.factor
    if rope.kind == "llama3":
        config |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position,
        }
    return config
