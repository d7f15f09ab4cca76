"""The config.json of the families with LayerNorm and biases: GPT-2, GPT-NeoX, StableLM, StarCoder2."""

from typing import Any

from model.architecture import Architecture
from model.families.fields import activation, common, need, one_window, with_fraction, written

# Dropout fields say how a model was trained: the forward pass has none.


def stablelm(config: dict[str, Any]) -> Architecture:
    """StableLM 2 and 3B (transformers modeling_stablelm.py)."""
    normed = bool(config.get("qk_layernorm", False))
    return Architecture(
        **common(config, "stablelm", eps=("layer_norm_eps", 1e-5), context=4096, fraction=0.25),
        norm="layer",
        norm_bias=True,
        block="parallel_shared" if config.get("use_parallel_residual", False) else "sequential",
        attention_bias=bool(config.get("use_qkv_bias", False)),
        qk_norm=normed,
        qk_norm_over="heads" if normed else "head",
    )


def stablelm_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of a StableLM."""
    return with_fraction(
        written(
            arch,
            "StableLm",
            "layer_norm_eps",
            use_parallel_residual=arch.block != "sequential",
            use_qkv_bias=arch.attention_bias,
            qk_layernorm=arch.qk_norm,
        ),
        arch,
    )


def starcoder2(config: dict[str, Any]) -> Architecture:
    """StarCoder2 (transformers modeling_starcoder2.py)."""
    act = ("hidden_act", "gelu_pytorch_tanh")
    read = common(config, "starcoder2", eps=("norm_epsilon", 1e-5), act=act, tie=True, context=4096)
    bias = bool(config.get("use_bias", True))
    return Architecture(
        **read,
        norm="layer",
        norm_bias=True,
        gated=False,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        windows=one_window(config, read["num_layers"]),
    )


def starcoder2_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of a StarCoder2."""
    window = max(arch.windows, default=None)
    return written(arch, "Starcoder2", "norm_epsilon", use_bias=arch.mlp_bias, sliding_window=window)


def gpt_neox(config: dict[str, Any]) -> Architecture:
    """GPT-NeoX and Pythia (transformers modeling_gpt_neox.py): attention and MLP side by side, a norm each."""
    theta, part = config.get("rotary_emb_base") or 10_000.0, config.get("rotary_pct") or 0.25
    bias = bool(config.get("attention_bias", True))
    act, eps = ("hidden_act", "gelu"), ("layer_norm_eps", 1e-5)
    read = common(config, "gpt_neox", eps=eps, act=act, theta=theta, fraction=part)
    return Architecture(
        **{**read, "num_kv_heads": read["num_heads"]},
        norm="layer",
        norm_bias=True,
        gated=False,
        block="parallel" if config.get("use_parallel_residual", True) else "sequential",
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=True,
    )


def gpt_neox_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of a GPT-NeoX."""
    parallel, part = arch.block == "parallel", arch.rope.fraction
    more = {"use_parallel_residual": parallel, "rotary_pct": part, "rotary_emb_base": arch.rope.theta}
    return with_fraction(written(arch, "GPTNeoX", "layer_norm_eps", **more), arch)


def gpt2(config: dict[str, Any]) -> Architecture:
    """GPT-2 (transformers modeling_gpt2.py): learned positions."""
    width, heads = need(config, "n_embd"), need(config, "n_head")
    return Architecture(
        family="gpt2",
        vocab_size=need(config, "vocab_size"),
        d_model=width,
        num_layers=need(config, "n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        d_ff=config.get("n_inner") or 4 * width,
        max_position=config.get("n_positions", 1024),
        norm="layer",
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        norm_bias=True,
        activation=activation(config, "activation_function", "gelu_new"),
        gated=False,
        tie_embeddings=bool(config.get("tie_word_embeddings", True)),
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        learned_positions=True,
        init_std=config.get("initializer_range", 0.02),
    )


def gpt2_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of a GPT-2."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": arch.vocab_size,
        "n_embd": arch.d_model,
        "n_layer": arch.num_layers,
        "n_head": arch.num_heads,
        "n_inner": arch.d_ff,
        "n_positions": arch.max_position,
        "layer_norm_epsilon": arch.norm_eps,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(arch.activation, arch.activation),
        "tie_word_embeddings": arch.tie_embeddings,
        "initializer_range": arch.init_std,
    }
