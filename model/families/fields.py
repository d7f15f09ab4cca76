"""What the families' readers and writers of config.json share: required and refused fields, activations, RoPE."""

import math
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


class Fields(dict[str, Any]):
    """A config.json that knows which of its fields have been looked at."""

    def __init__(self, config: dict[str, Any]):
        super().__init__(config)
        self.seen: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """As a dict's."""
        self.seen.add(key)
        return super().get(key, default)


# Fields that change the maths of some family, and the values that change nothing: where a family's reader does not look
# at one, it must have such a value.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "attention_chunk_size": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "use_bidirectional_attention": (None, False),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "use_parallel_residual": (None, False),
    "partial_rotary_factor": (None, 1),
    "rotary_pct": (None, 1),
    "rotary_emb_base": (None,),
    "rope_local_base_freq": (None,),
    "rope_scaling": (None,),
    "rope_parameters": (None,),
    "no_rope_layers": (None, []),
    "use_qk_norm": (None, False),
    "qk_layernorm": (None, False),
    "clip_qkv": (None,),
    "alibi": (None, False),
    "pretraining_tp": (None, 1),
    "is_decoder": (None, False),
    "add_cross_attention": (None, False),
    "scale_attn_weights": (None, True),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "quantization_config": (None,),
}


def refuse_unread(config: Fields) -> None:
    """UsageError for a field that would change the maths and that the family's reader did not look at."""
    for key, neutral in NEUTRAL.items():
        if key in config and key not in config.seen and config[key] not in neutral:
            raise UsageError(f"config.json: {key} = {config[key]!r} is not supported (only {neutral[-1]!r})")
    if "layer_types" not in config.seen and set(config.get("layer_types") or ()) - {FULL}:
        raise UsageError(f"config.json: layer_types is not supported (only {FULL} everywhere)")


def sizes_of(arch: Architecture, eps: str = "rms_norm_eps") -> dict[str, Any]:
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
        eps: arch.norm_eps,
        "tie_word_embeddings": arch.tie_embeddings,
        "attention_bias": arch.attention_bias,
        "initializer_range": arch.init_std,
    }


def written(arch: Architecture, name: str, eps: str = "rms_norm_eps", **more: Any) -> dict[str, Any]:
    """The config.json of a family whose class in transformers is `name`ForCausalLM."""
    head = {"architectures": [f"{name}ForCausalLM"], "model_type": arch.family, **sizes_of(arch, eps)}
    return {**head, "hidden_act": activation_name(arch), **ropes_config(arch), **more}


def with_fraction(config: dict[str, Any], arch: Architecture) -> dict[str, Any]:
    """The rotated fraction said also where it is 1: the family's default is another."""
    part = {"partial_rotary_factor": arch.rope.fraction}
    return {**config, **part, "rope_parameters": {**config["rope_parameters"], **part}}


def inverse(x: float) -> float:
    """1 / x, of its neighbours the one whose own inverse is closest to x: fields that are read as an inverse."""
    near = 1 / x
    return min((near, math.nextafter(near, 0), math.nextafter(near, math.inf)), key=lambda y: abs(1 / y - x))


def activation(config: dict[str, Any], key: str, default: str) -> Any:
    """Our name of the activation in field `key`."""
    name = config.get(key, default)
    if name not in ACTIVATIONS:
        raise UsageError(f"config.json: {key} = {name!r} is unsupported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def activation_name(arch: Architecture) -> str:
    """Hugging Face's name of the activation."""
    return {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[arch.activation]


# The keys of each kind of RoPE scaling; the others that any kind has are without effect in it.
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": LLAMA3,
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim", "beta_fast",
        "beta_slow", "truncate",
    ),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
}  # fmt: skip
ROPE_ALWAYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def rope(
    scaling: dict[str, Any],
    theta: float,
    context: int = 0,
    original: int | None = None,
    fraction: float | None = None,
    interleaved: bool = False,
) -> Rope:
    """RoPE from `rope_parameters` (transformers 5) or `rope_scaling` (4).

    theta and fraction: where that says nothing, fraction None where the family always rotates whole heads; context:
    max_position_embeddings; original: original_max_position_embeddings where it stands beside, as in Phi 3.
    """
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    kind = "longrope" if kind == "su" else kind
    if kind not in ROPE_KEYS:
        raise UsageError(f"config.json: RoPE scaling '{kind}' is not supported; supported: {', '.join(ROPE_KEYS)}")
    known = {*ROPE_ALWAYS, *(key for keys in ROPE_KEYS.values() for key in keys)}
    if unknown := [key for key in scaling if key not in known and scaling[key] is not None]:
        raise UsageError(f"config.json: rope_parameters.{unknown[0]} = {scaling[unknown[0]]!r} is not supported")
    part = scaling.get("partial_rotary_factor") or fraction or 1.0
    if fraction is None and part != 1.0:
        raise UsageError(f"config.json: partial_rotary_factor = {part} is not supported")
    given = {key: scaling.get(key) for key in ROPE_KEYS[kind]}
    common: dict[str, Any] = {
        "theta": float(scaling.get("rope_theta") or theta),
        "kind": kind,
        "fraction": float(part),
        "interleaved": interleaved,
    }
    if kind in ("linear", "dynamic", "llama3"):
        common["factor"] = float(need(scaling, "factor", "rope_scaling."))
    if kind == "dynamic":
        common["original_max_position"] = context
    if kind == "llama3":
        values = {key: need(scaling, key, "rope_scaling.") for key in LLAMA3}
        common |= {
            "low_freq_factor": float(values["low_freq_factor"]),
            "high_freq_factor": float(values["high_freq_factor"]),
            "original_max_position": int(values["original_max_position_embeddings"]),
        }
    if kind in ("yarn", "longrope"):
        before = int(original or given["original_max_position_embeddings"] or context)
        factor = float(given["factor"] or context / before)
        common |= {"factor": factor, "original_max_position": before}
        make = _yarn if kind == "yarn" else _longrope
        common |= make(given, factor, before)
    return Rope(**common)


def _yarn(given: dict[str, Any], factor: float, before: int) -> dict[str, Any]:
    """yarn's own fields; cos and sin grow with the logarithm of the factor (arXiv 2309.00071, section 3.4)."""

    def grown(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    both = given["mscale"] and given["mscale_all_dim"]
    usual = grown(given["mscale"]) / grown(given["mscale_all_dim"]) if both else grown(1.0)
    return {
        "attention_factor": usual if given["attention_factor"] is None else float(given["attention_factor"]),
        "beta_fast": float(given["beta_fast"] or 32),
        "beta_slow": float(given["beta_slow"] or 1),
        "truncate": True if given["truncate"] is None else bool(given["truncate"]),
    }


def _longrope(given: dict[str, Any], factor: float, before: int) -> dict[str, Any]:
    """longrope's own fields; cos and sin grow with the root of the logarithm (arXiv 2402.13753)."""
    usual = math.sqrt(1 + math.log(factor) / math.log(before)) if factor > 1 else 1.0
    return {
        "attention_factor": usual if given["attention_factor"] is None else float(given["attention_factor"]),
        "short_factors": tuple(map(float, need(given, "short_factor", "rope_scaling."))),
        "long_factors": tuple(map(float, need(given, "long_factor", "rope_scaling."))),
    }


def rope_config(rope: Rope) -> dict[str, Any]:
    """`rope_parameters` of a Rope."""
    config: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.fraction != 1:
        config["partial_rotary_factor"] = rope.fraction
    values = {
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_position,
        "attention_factor": rope.attention_factor,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "truncate": rope.truncate,
        "short_factor": list(rope.short_factors),
        "long_factor": list(rope.long_factors),
    }
    return config | {key: values[key] for key in ROPE_KEYS[rope.kind] if key in values}


def ropes_config(arch: Architecture) -> dict[str, Any]:
    """The RoPE fields of a family with one RoPE for all layers."""
    scaling = rope_config(arch.rope)
    return {
        "rope_theta": arch.rope.theta,  # transformers 4 reads these two,
        "rope_scaling": None if arch.rope.kind == "default" else scaling,
        "rope_parameters": scaling,  # transformers 5 this one
        **({"partial_rotary_factor": arch.rope.fraction} if arch.rope.fraction != 1 else {}),
    }


def common(
    config: dict[str, Any],
    family: str,
    *,
    eps: tuple[str, float] = ("rms_norm_eps", 1e-6),
    act: tuple[str, str] = ("hidden_act", "silu"),
    tie: bool = False,
    context: int = 2048,
    theta: float = 10_000.0,
    fraction: float | None = None,
    interleaved: bool = False,
    head_dim: int | None = None,
    original: int | None = None,
    scaling: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The Architecture's fields that most families write alike.

    What follows the family is what holds where the config says nothing: transformers' defaults. scaling: where the RoPE
    of all but local layers is described.
    """
    heads, hidden = need(config, "num_attention_heads"), need(config, "hidden_size")
    size = config.get("head_dim") or head_dim
    if not size and hidden % heads:
        raise UsageError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    context = config.get("max_position_embeddings", context)
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    described: dict[str, Any] = (new or old or {}) if scaling is None else scaling
    base, original = float(config.get("rope_theta") or theta), config.get("original_max_position_embeddings", original)
    part = fraction if fraction is None else config.get("partial_rotary_factor") or fraction
    return {
        "family": family,
        "vocab_size": need(config, "vocab_size"),
        "d_model": hidden,
        "num_layers": need(config, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": size or hidden // heads,
        "d_ff": need(config, "intermediate_size"),
        "max_position": context,
        "rope": rope(described, base, context, original, part, interleaved),
        "norm_eps": config.get(*eps),
        "activation": activation(config, *act),
        "tie_embeddings": bool(config.get("tie_word_embeddings", tie)),
        "init_std": config.get("initializer_range", 0.02),
    }


SLIDING, FULL = "sliding_attention", "full_attention"


def windows_of(config: dict[str, Any], local: list[bool], default: int | None = None) -> tuple[int, ...]:
    """Per layer its window, 0 for none: where `layer_types` or, if it is not there, `local` says so."""
    kinds = config.get("layer_types") or [SLIDING if here else FULL for here in local]
    window, layers = config.get("sliding_window", default), len(local)
    if len(kinds) != layers or set(kinds) - {SLIDING, FULL}:
        raise UsageError(
            f"config.json: layer_types has {len(kinds)} entries of {', '.join(sorted(set(map(str, kinds))))}; needed: "
            f"{layers} (num_hidden_layers) of {SLIDING} or {FULL}"
        )
    if SLIDING not in kinds:
        return ()
    return tuple(_positive(config, window) if kind == SLIDING else 0 for kind in kinds)


def one_window(config: dict[str, Any], layers: int, default: int | None = None) -> tuple[int, ...]:
    """The window of a family whose layers all have it, if there is one."""
    window = config.get("sliding_window", default)
    return () if window is None else (_positive(config, window),) * layers


def _positive(config: dict[str, Any], window: Any) -> int:
    if window is None:
        need(config, "sliding_window")
    if not isinstance(window, int) or window < 1:
        raise UsageError(f"config.json: sliding_window = {window!r}: a positive number is needed")
    return window


def layer_types(arch: Architecture) -> list[str]:
    """`layer_types` of an Architecture."""
    return [SLIDING if window else FULL for window in arch.windows or (0,) * arch.num_layers]
