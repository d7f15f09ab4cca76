"""What a GGUF file holds, as Hugging Face would say it: config.json and tensors; a family is a row of a table."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.errors import UsageError
from convert.gguf import GGUF, raw_tensor
from convert.tensors import Tensor
from model.architecture import Architecture, Rope

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA3_NAMES = {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
QWEN3_NAMES = {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
}
ROPE_FACTORS = "rope_freqs.weight"
# Metadata that this module reads, after the family's prefix; another key could change the maths and is refused.
KNOWN_KEYS = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count", "rope.scale_linear",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
}  # fmt: skip
NEEDED = (
    "attention.head_count", "embedding_length", "context_length", "feed_forward_length", "block_count",
    "attention.layer_norm_rms_epsilon",
)  # fmt: skip
GEMMA3_KEYS = {"attention.sliding_window", "rope.freq_base_swa"}
# rope_freqs.weight holds only the result: these are the published settings it is recognised by (Llama 3.1, 3.2).
LLAMA3_SCALINGS = [
    {"factor": f, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    for f in (8.0, 32.0)
]


Metadata = dict[str, Any]  # of one family, its prefix taken off


@dataclass(frozen=True)
class Family:
    """How llama.cpp writes one architecture."""

    kind: str  # config.json's model_type
    names: dict[str, str]  # besides NAMES
    keys: set[str]  # metadata besides KNOWN_KEYS
    theta: float  # RoPE's base where the file says nothing
    config: Callable[[GGUF, Metadata, dict[str, Any]], dict[str, Any]]  # config.json's keys besides the common ones
    meta: Callable[[Architecture], Metadata]  # the same the other way: metadata besides the common one
    turned: bool = False  # q and k rows are in llama.cpp's order
    norm_offset: float = 0.0  # what llama.cpp has added to the norms' scales


def config_of(file: GGUF) -> dict[str, Any]:
    """The Hugging Face config.json of a GGUF file; UsageError for what it cannot say or this model cannot do."""
    meta, where = file.metadata, str(file.path)
    name, family = _family(file)
    if meta.get("split.count", 1) > 1:
        raise UsageError(f"{where} is one of {meta['split.count']} parts: join them with llama.cpp's gguf-split first")
    own = {key.removeprefix(f"{name}."): _one(v, key, where) for key, v in meta.items() if key.startswith(f"{name}.")}
    known = KNOWN_KEYS | family.keys
    if unknown := sorted(f"{name}.{key}" for key in own if key not in known and own[key] not in (0, None, [])):
        raise UsageError(f"{where}: metadata that is not supported and could change the maths: {', '.join(unknown)}")
    if missing := [f"{name}.{key}" for key in NEEDED if key not in own]:
        raise UsageError(f"{where}: metadata {missing[0]} is missing")
    heads, width = own["attention.head_count"], own["embedding_length"]
    head_dim = own.get("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, head_dim) != head_dim:
            raise UsageError(f"{where}: {name}.{key} is {own[key]}, only the head dimension {head_dim} is supported")
    if "token_embd.weight" not in file.entries:
        raise UsageError(f"{where}: tensor token_embd.weight is missing")
    theta = _short(own.get("rope.freq_base", family.theta))
    config: dict[str, Any] = {
        "model_type": family.kind,
        "vocab_size": file.entries["token_embd.weight"][0][0],
        "hidden_size": width,
        "intermediate_size": own["feed_forward_length"],
        "num_hidden_layers": own["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": own.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": own["context_length"],
        "rms_norm_eps": _short(own["attention.layer_norm_rms_epsilon"]),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(file, name, own, head_dim, theta),
        "tie_word_embeddings": "output.weight" not in file.entries,
        "attention_bias": "blk.0.attn_q.bias" in file.entries,
    }
    config |= family.config(file, own, config)
    ids = {k: meta.get(f"tokenizer.ggml.{v}_token_id") for k, v in TOKEN_IDS.items()}
    return config | {k: v for k, v in ids.items() if v is not None}


def _family(file: GGUF) -> tuple[str, Family]:
    name = file.metadata.get("general.architecture")
    if name not in FAMILIES:
        raise UsageError(
            f"{file.path}: general.architecture is '{name}'; of GGUF files these are supported: {', '.join(FAMILIES)}"
        )
    return name, FAMILIES[name]


def _one(value: Any, key: str, where: str) -> Any:
    """The value, or the one that all layers share where it is given for each."""
    if isinstance(value, list) and value:
        if len(set(value)) != 1:
            raise UsageError(f"{where}: {key} differs between layers: {value}")
        return value[0]
    return value


def _llama(file: GGUF, own: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    scaling = config["rope_scaling"] or {"rope_type": "default"}
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "mlp_bias": "blk.0.ffn_gate.bias" in file.entries,
        "rope_parameters": {"rope_theta": config["rope_theta"], **scaling},
    }


def _gemma3(file: GGUF, own: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    """What the file leaves to llama.cpp's code: every sixth layer sees everything, and the 27B model, known by its 62
    layers, scales scores by the width per head instead of the head dimension."""
    if "attention.sliding_window" not in own:
        raise UsageError(f"{file.path}: metadata gemma3.attention.sliding_window is missing")
    layers, local = config["num_hidden_layers"], _short(own.get("rope.freq_base_swa", 10_000.0))
    wide = config["hidden_size"] // config["num_attention_heads"]
    scaling = config["rope_scaling"] or {"rope_type": "default"}
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": wide if layers == 62 else config["head_dim"],
        "sliding_window": own["attention.sliding_window"],
        "layer_types": ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(layers)],
        "rope_local_base_freq": local,
        "rope_parameters": {
            "full_attention": {"rope_theta": config["rope_theta"], **scaling},
            "sliding_attention": {"rope_theta": local, "rope_type": "default"},
        },
    }


def _llama_meta(arch: Architecture) -> Metadata:
    return {"rope.dimension_count": arch.head_dim}


def _qwen(name: str) -> Callable[[GGUF, Metadata, dict[str, Any]], dict[str, Any]]:
    """Qwen2, whose biases go without saying, and Qwen3, which has none on the output where it has some."""

    def config(file: GGUF, own: Metadata, config: dict[str, Any]) -> dict[str, Any]:
        if name == "Qwen3" and config["attention_bias"] != ("blk.0.attn_output.bias" in file.entries):
            raise UsageError(f"{file.path}: biases of q, k and v but not of the output are not supported in qwen3")
        scaling = config["rope_scaling"] or {"rope_type": "default"}
        return {
            "architectures": [f"{name}ForCausalLM"],
            "hidden_act": "silu",
            "use_sliding_window": False,
            "rope_parameters": {"rope_theta": config["rope_theta"], **scaling},
        }

    return config


def _qwen2_meta(arch: Architecture) -> Metadata:
    if arch.num_heads * arch.head_dim != arch.d_model:
        raise UsageError(
            f"llama.cpp's qwen2 has heads that make up the width: {arch.num_heads} heads of {arch.head_dim} are not "
            f"{arch.d_model}"
        )
    return {}


def _gemma3_meta(arch: Architecture) -> Metadata:
    local = arch.local_rope or Rope()
    swa = {} if local.theta == 10_000.0 else {"rope.freq_base_swa": local.theta}
    return {"attention.sliding_window": max(arch.windows, default=0), **swa}


FAMILIES = {
    "llama": Family(
        "llama", {"ffn_norm": "post_attention_layernorm"}, set(), 10_000.0, _llama, _llama_meta, turned=True
    ),
    "qwen2": Family("qwen2", {"ffn_norm": "post_attention_layernorm"}, set(), 10_000.0, _qwen("Qwen2"), _qwen2_meta),
    "qwen3": Family("qwen3", QWEN3_NAMES, set(), 10_000.0, _qwen("Qwen3"), lambda arch: {}),
    "gemma3": Family("gemma3_text", GEMMA3_NAMES, GEMMA3_KEYS, 1_000_000.0, _gemma3, _gemma3_meta, norm_offset=1.0),
}
TOKEN_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def generation_config_of(file: GGUF) -> dict[str, Any]:
    """What GGUF says about generation: the special ids. Turn ends (eot, eom) also end a generation."""
    ids = {k: file.metadata.get(f"tokenizer.ggml.{v}_token_id") for k, v in TOKEN_IDS.items()}
    ends = [file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    if len(stops := sorted({i for i in ends if i is not None})) > 1:
        ids["eos_token_id"] = stops
    return {k: v for k, v in ids.items() if v is not None}


def _short(value: float) -> float:
    """The shortest decimal of a float32: GGUF keeps 1e-5 as 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(file: GGUF, name: str, own: Metadata, head_dim: int, theta: float) -> dict[str, Any] | None:
    """config.json's rope_scaling; refuses what cannot be expressed exactly."""
    kind = own.get("rope.scaling.type", "none")
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear", 1.0))
    if ROPE_FACTORS in file.entries:
        if kind != "none" or factor not in (0.0, 1.0):
            raise UsageError(f"{file.path}: {ROPE_FACTORS} together with {name}.rope.scaling.* is not supported")
        return _llama3_scaling(file, head_dim, theta)
    if kind not in ("none", "linear"):
        raise UsageError(f"{file.path}: {name}.rope.scaling.type '{kind}' is not supported (none and linear are)")
    return None if factor in (0.0, 1.0) else {"rope_type": "linear", "factor": _short(factor)}


def _llama3_scaling(file: GGUF, head_dim: int, theta: float) -> dict[str, Any]:
    """The llama3 settings whose frequency divisors are those of rope_freqs.weight."""
    stored = raw_tensor(file, ROPE_FACTORS).read().astype(np.float64)
    for scaling in LLAMA3_SCALINGS:
        divisor = llama3_divisors(scaling, head_dim, theta)
        if stored.shape == divisor.shape and np.allclose(stored, divisor, rtol=1e-4):
            return {"rope_type": "llama3", **scaling}
    raise UsageError(f"{file.path}: {ROPE_FACTORS} is not Llama 3.1's or 3.2's RoPE scaling: not supported")


def llama3_divisors(scaling: dict[str, Any], head_dim: int, theta: float) -> np.ndarray:
    """What llama.cpp divides the frequencies of RoPE by, f64[H/2], for Llama 3.1's scaling."""
    original, low, high = (
        scaling[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def tensors_of(file: GGUF) -> dict[str, Tensor]:
    """{Hugging Face name: Tensor}: dequantised one at a time, q and k rows and norms as Hugging Face has them."""
    name, family = _family(file)
    heads = file.metadata[f"{name}.attention.head_count"]
    turned = {"attn_q": heads, "attn_k": file.metadata.get(f"{name}.attention.head_count_kv", heads)}
    names, tensors = NAMES | family.names, {}
    for name in file.entries:
        if name == ROPE_FACTORS:
            continue  # read as config
        parts = name.split(".")
        layered = parts[0] == "blk" and len(parts) == 4
        part, suffix = parts[2:] if layered else (parts if len(parts) == 2 else (name, ""))
        raw = raw_tensor(file, name)
        if family.turned and part in turned:
            n = turned[part][0] if isinstance(turned[part], list) else turned[part]
            raw = Tensor(raw.shape, raw.dtype, raw.where, _unturned(raw.read, n), False, raw.stored)
        if family.norm_offset and part.endswith("norm"):
            less = _less(raw.read, family.norm_offset)
            raw = Tensor(raw.shape, np.dtype(np.float32), raw.where, less, False, raw.stored)
        if part in names:
            name = f"model.layers.{parts[1]}.{names[part]}.{suffix}" if layered else f"{names[part]}.{suffix}"
        tensors[name] = raw
    return tensors


def _less(read: Callable[[], np.ndarray], offset: float) -> Callable[[], np.ndarray]:
    return lambda: read().astype(np.float32) - np.float32(offset)


def _unturned(read: Callable[[], np.ndarray], heads: int) -> Callable[[], np.ndarray]:
    return lambda: unturn(read(), heads)


def turn(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of unturn."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def unturn(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of q and k rows: there the two halves of a head that rotate together are interleaved."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


# Where nothing but the name differs (a window would: there is no key for it, and it is refused).
SAME_AS = {"mistral": "llama"}


def family_of(model_type: str | None) -> tuple[str, Family]:
    """(general.architecture, family) that a config.json's model_type is written as."""
    for name, family in FAMILIES.items():
        if family.kind == SAME_AS.get(model_type or "", model_type):
            return name, family
    known = ", ".join([*(family.kind for family in FAMILIES.values()), *SAME_AS])
    raise UsageError(f"model_type '{model_type}' cannot be written as GGUF; these can: {known}")


def gguf_name(name: str, family: Family) -> str:
    """llama.cpp's name of a tensor."""
    short = {theirs: ours for ours, theirs in (NAMES | family.names).items()}
    stem, _, suffix = name.rpartition(".")
    if stem in short:
        return f"{short[stem]}.{suffix}"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    if part not in short:
        raise UsageError(f"GGUF has no name for {name} in this family")
    return f"blk.{layer}.{short[part]}.{suffix}"


def metadata_of(arch: Architecture, name: str, family: Family) -> Metadata:
    """What config_of reads."""
    own: Metadata = {
        "vocab_size": arch.vocab_size,
        "block_count": arch.num_layers,
        "context_length": arch.max_position,
        "embedding_length": arch.d_model,
        "feed_forward_length": arch.d_ff,
        "attention.head_count": arch.num_heads,
        "attention.head_count_kv": arch.num_kv_heads,
        "attention.key_length": arch.head_dim,
        "attention.value_length": arch.head_dim,
        "attention.layer_norm_rms_epsilon": float(arch.norm_eps),
        "rope.freq_base": float(arch.rope.theta),
        **family.meta(arch),
    }
    if arch.rope.kind == "linear":
        own |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(arch.rope.factor)}
    return {f"{name}.{key}": value for key, value in own.items()}
