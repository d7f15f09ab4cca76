"""Hugging Face config.json <-> Architecture: a family is a function and a row of a table, never a class."""

import dataclasses
import math
from collections.abc import Callable
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

# Fields that change the maths, and the only value of each that a family supports.
LLAMA_MUST_BE = {
    "pretraining_tp": 1,
    "is_decoder": False,
    "add_cross_attention": False,
    "sliding_window": None,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
GEMMA3_MUST_BE = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "attention_dropout": 0.0,
    "quantization_config": None,
}
SLIDING, FULL = "sliding_attention", "full_attention"


def architecture_from_hf(config: dict[str, Any]) -> Architecture:
    """The Architecture of a config.json; raises UsageError for what would silently change the maths."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UsageError(f"model_type '{kind}' is not supported; supported: {', '.join(sorted(FAMILIES))}")
    return dataclasses.replace(FAMILIES[kind][0](config), **_labels_of(config))


def hf_config_from(arch: Architecture, **extra: Any) -> dict[str, Any]:
    """A config.json for an Architecture that has none; `extra` adds token ids and dtype."""
    kind = "gemma3_text" if arch.post_norms else "llama"
    config = _with_labels(FAMILIES[kind][1](arch), arch)
    back = architecture_from_hf(config)
    lost = [f.name for f in dataclasses.fields(arch) if getattr(arch, f.name) != getattr(back, f.name)]
    if lost:
        raise UsageError(
            f"a config.json of model_type {kind} cannot express this model's {', '.join(lost)}: export needs the "
            "model's own config.json"
        )
    return config | extra


# What the class in `architectures` ends with, where it is no language model.
SEQUENCE, TOKEN, LANGUAGE = "ForSequenceClassification", "ForTokenClassification", "ForCausalLM"


def _labels_of(config: dict[str, Any]) -> dict[str, Any]:
    """The score head of a reward model; transformers counts `id2label`, or takes 2."""
    name = next(iter(config.get("architectures") or ()), LANGUAGE)
    if not name.endswith((SEQUENCE, TOKEN)):
        return {}
    labels = config.get("id2label")
    count = len(labels) if labels else config.get("num_labels") or 2
    if name.endswith(TOKEN) and count != 2:
        raise UsageError(f"config.json: {name} has {count} labels; supported: 2, a bad and a good step")
    return {"num_labels": count, "token_labels": name.endswith(TOKEN)}


def _with_labels(config: dict[str, Any], arch: Architecture) -> dict[str, Any]:
    """A language model's config.json as that of a reward model on the same trunk, if `arch` is one."""
    if not arch.num_labels:
        return config
    family: str = config["architectures"][0].removesuffix(LANGUAGE)
    if family == "Gemma3":  # alone, it is the model that sees
        family = "Gemma3Text"
    names = ("bad", "good") if arch.token_labels else tuple(f"LABEL_{i}" for i in range(arch.num_labels))
    return {
        **config,
        "architectures": [family + (TOKEN if arch.token_labels else SEQUENCE)],
        "num_labels": arch.num_labels,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        **({"classifier_dropout": 0.0} if arch.token_labels else {}),
    }


def _sizes_of(arch: Architecture) -> dict[str, Any]:
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


def _llama_config(arch: Architecture) -> dict[str, Any]:
    rope = _rope_config(arch.rope)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_sizes_of(arch),
        "hidden_act": _activation_name(arch),
        "mlp_bias": arch.mlp_bias,
        "rope_theta": arch.rope.theta,  # transformers 4 reads these two,
        "rope_scaling": None if arch.rope.kind == "default" else rope,
        "rope_parameters": rope,  # transformers 5 this one
    }


def _llama(config: dict[str, Any]) -> Architecture:
    _refuse(config, LLAMA_MUST_BE)
    heads = _need(config, "num_attention_heads")
    hidden = _need(config, "hidden_size")
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
        rope=_rope(
            config.get("rope_parameters") or config.get("rope_scaling") or {}, config.get("rope_theta") or 10_000.0
        ),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        activation=_activation(config, "hidden_act", "silu"),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        init_std=config.get("initializer_range", 0.02),
    )


def _gemma3(config: dict[str, Any]) -> Architecture:
    """Gemma 3's text model (transformers modeling_gemma3.py, Gemma3ForCausalLM)."""
    _refuse(config, GEMMA3_MUST_BE)
    hidden, layers = _need(config, "hidden_size"), _need(config, "num_hidden_layers")
    bias = bool(config.get("attention_bias", False))
    windows = _windows(config, layers)
    ropes = config.get("rope_parameters") or {}
    if surplus := set(ropes) - {SLIDING, FULL}:
        raise UsageError(f"config.json: rope_parameters.{min(surplus)}: only {SLIDING} and {FULL} are supported there")
    full = {**(ropes.get(FULL) or {}), **(config.get("rope_scaling") or {})}
    local = _rope(ropes.get(SLIDING) or {}, config.get("rope_local_base_freq") or 10_000.0)
    return Architecture(
        vocab_size=_need(config, "vocab_size"),
        d_model=hidden,
        num_layers=layers,
        num_heads=_need(config, "num_attention_heads"),
        num_kv_heads=_need(config, "num_key_value_heads"),
        head_dim=config.get("head_dim") or 256,
        d_ff=_need(config, "intermediate_size"),
        max_position=config.get("max_position_embeddings", 131_072),
        rope=_rope(full, config.get("rope_theta") or 1_000_000.0),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        activation=_activation(config, "hidden_activation", "gelu_pytorch_tanh"),
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


def _windows(config: dict[str, Any], layers: int) -> tuple[int, ...]:
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
    window = _need(config, "sliding_window")
    if not isinstance(window, int) or window < 1:
        raise UsageError(f"config.json: sliding_window = {window!r}: a positive number is needed")
    return tuple(window if kind == SLIDING else 0 for kind in kinds)


def _gemma3_config(arch: Architecture) -> dict[str, Any]:
    full = _rope_config(arch.rope)
    local, scalar = arch.local_rope or Rope(), arch.query_pre_attn_scalar or arch.head_dim
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **_sizes_of(arch),
        "hidden_activation": _activation_name(arch),
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "layer_types": [SLIDING if window else FULL for window in arch.windows or (0,) * arch.num_layers],
        "sliding_window": max(arch.windows, default=4096),
        "rope_theta": arch.rope.theta,  # transformers 4 reads these three,
        "rope_local_base_freq": local.theta,
        "rope_scaling": None if arch.rope.kind == "default" else full,
        "rope_parameters": {FULL: full, SLIDING: _rope_config(local)},  # transformers 5 this one
    }


def _refuse(config: dict[str, Any], must_be: dict[str, Any]) -> None:
    for key, allowed in must_be.items():
        if config.get(key, allowed) not in (allowed, None):
            raise UsageError(f"config.json: {key} = {config[key]!r} is not supported (only {allowed!r})")


def _activation(config: dict[str, Any], key: str, default: str) -> Any:
    name = config.get(key, default)
    if name not in ACTIVATIONS:
        raise UsageError(f"config.json: {key} = {name!r} is unsupported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _activation_name(arch: Architecture) -> str:
    return {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[arch.activation]


def _rope_config(rope: Rope) -> dict[str, Any]:
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


def _rope(scaling: dict[str, Any], theta: float) -> Rope:
    """RoPE from `rope_parameters` (transformers 5) or `rope_scaling` (4); theta: where that says nothing."""
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    theta = float(scaling.get("rope_theta") or theta)
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


Reader = Callable[[dict[str, Any]], Architecture]
Writer = Callable[[Architecture], dict[str, Any]]
FAMILIES: dict[str, tuple[Reader, Writer]] = {
    "llama": (_llama, _llama_config),
    "gemma3_text": (_gemma3, _gemma3_config),
}
