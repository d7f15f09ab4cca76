"""GGUF files: header, config and tensors under Hugging Face's names.

The `gguf` package dequantises. Its reader is not used for the header: it makes several numpy arrays per string, which
costs seconds for a vocabulary (transformers' own route also imports torch).
"""

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from configs.errors import UsageError
from convert.tensors import Tensor

# What a metadata value's type number means: struct letters; 7 bool, 8 string and 9 array are read apart.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"
# llama.* keys that this module reads; another one could change the maths and is refused.
KNOWN_KEYS = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count", "rope.scale_linear",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
}  # fmt: skip
# rope_freqs.weight holds only the result: these are the published settings it is recognised by (Llama 3.1, 3.2).
LLAMA3_SCALINGS = [
    {"factor": f, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    for f in (8.0, 32.0)
]


@dataclass(frozen=True)
class GGUF:
    """A parsed header: metadata values and where each tensor lies."""

    path: Path
    metadata: dict[str, Any]
    entries: dict[str, tuple[tuple[int, ...], int, int]]  # name -> shape (rows first), type, offset in the file
    size: int

    @cached_property
    def pages(self) -> np.ndarray:
        """The file, memory-mapped."""
        return np.memmap(self.path, dtype=np.uint8, mode="r")


def open_gguf(path: Path) -> GGUF:
    """Parse the header; raises UsageError for what is not GGUF 2 or 3, little-endian, and complete."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, data)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except (struct.error, UnicodeDecodeError, OverflowError, MemoryError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} is a truncated or corrupt GGUF file: {error}") from error


def _parse(path: Path, data: mmap.mmap) -> GGUF:
    if data[:4] != b"GGUF":
        raise UsageError(f"{path} is not a GGUF file: it starts with {data[:4]!r}")
    version, tensor_count, key_count = struct.unpack_from("<IQQ", data, 4)
    if version not in (2, 3):
        raise UsageError(f"{path}: GGUF version {version} is not supported (2 and 3, little-endian, are)")
    at = 24

    def scalar(kind: int) -> Any:
        nonlocal at
        if kind == STRING:
            (length,) = struct.unpack_from("<Q", data, at)
            at += 8 + length
            if at > len(data):
                raise ValueError("a string runs past the end")
            return data[at - length : at].decode("utf-8")
        if kind not in SCALARS:
            raise ValueError(f"value type {kind} is unknown")
        (value,) = struct.unpack_from("<" + SCALARS[kind], data, at)
        at += struct.calcsize(SCALARS[kind])
        return value

    def value(kind: int) -> Any:
        nonlocal at
        if kind != ARRAY:
            return scalar(kind)
        inner, count = struct.unpack_from("<IQ", data, at)
        at += 12
        if inner in SCALARS:
            items = list(struct.unpack_from(f"<{count}{SCALARS[inner]}", data, at)) if count <= len(data) else None
            if items is None:
                raise ValueError(f"an array of {count} items")
            at += count * struct.calcsize(SCALARS[inner])
            return items
        return [value(inner) for _ in range(count)]

    metadata = {}
    for _ in range(key_count):
        key = scalar(STRING)
        metadata[key] = value(scalar(4))
    found = []
    for _ in range(tensor_count):
        name = scalar(STRING)
        shape = tuple(scalar(10) for _ in range(scalar(4)))
        found.append((name, shape[::-1], scalar(4), scalar(10)))  # GGUF writes the fastest axis first
    step = metadata.get("general.alignment", 32)
    start = -(-at // step) * step
    return GGUF(path, metadata, {n: (shape, kind, start + offset) for n, shape, kind, offset in found}, len(data))


def config_of(file: GGUF) -> dict[str, Any]:
    """The Hugging Face config.json of a GGUF file; UsageError for what it cannot say or this model cannot do."""
    meta, where = file.metadata, str(file.path)
    family = meta.get("general.architecture")
    if family != "llama":
        raise UsageError(f"{where}: general.architecture is '{family}'; of GGUF files only 'llama' is supported")
    if meta.get("split.count", 1) > 1:
        raise UsageError(f"{where} is one of {meta['split.count']} parts: join them with llama.cpp's gguf-split first")
    own = {key.removeprefix("llama."): v for key, v in meta.items() if key.startswith("llama.")}
    if unknown := sorted(key for key in own if key not in KNOWN_KEYS and own[key] not in (0, None, [])):
        raise UsageError(
            f"{where}: metadata that is not supported and could change the maths: llama.{', llama.'.join(unknown)}"
        )

    def need(key: str) -> Any:
        if key not in own:
            raise UsageError(f"{where}: metadata llama.{key} is missing")
        if isinstance(own[key], list):  # per-layer values
            if len(set(own[key])) != 1:
                raise UsageError(f"{where}: llama.{key} differs between layers: {own[key]}")
            return own[key][0]
        return own[key]

    heads, width = need("attention.head_count"), need("embedding_length")
    head_dim = own.get("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, head_dim) != head_dim:
            raise UsageError(f"{where}: llama.{key} is {own[key]}, only the head dimension {head_dim} is supported")
    if "token_embd.weight" not in file.entries:
        raise UsageError(f"{where}: tensor token_embd.weight is missing")
    context, theta = need("context_length"), _short(own.get("rope.freq_base", 10_000.0))
    scaling = _rope_scaling(file, own, head_dim, theta)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": file.entries["token_embd.weight"][0][0],
        "hidden_size": width,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": need("attention.head_count_kv") if "attention.head_count_kv" in own else heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": _short(need("attention.layer_norm_rms_epsilon")),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": theta, **(scaling or {"rope_type": "default"})},
        "tie_word_embeddings": "output.weight" not in file.entries,
        "attention_bias": "blk.0.attn_q.bias" in file.entries,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.entries,
    }
    ids = {k: meta.get(f"tokenizer.ggml.{v}_token_id") for k, v in TOKEN_IDS.items()}
    return config | {k: v for k, v in ids.items() if v is not None}


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


def _rope_scaling(file: GGUF, own: dict[str, Any], head_dim: int, theta: float) -> dict[str, Any] | None:
    """config.json's rope_scaling; refuses what cannot be expressed exactly."""
    kind = own.get("rope.scaling.type", "none")
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear", 1.0))
    if ROPE_FACTORS in file.entries:
        if kind != "none" or factor not in (0.0, 1.0):
            raise UsageError(f"{file.path}: {ROPE_FACTORS} together with llama.rope.scaling.* is not supported")
        return _llama3_scaling(file, head_dim, theta)
    if kind not in ("none", "linear"):
        raise UsageError(f"{file.path}: llama.rope.scaling.type '{kind}' is not supported (none and linear are)")
    return None if factor in (0.0, 1.0) else {"rope_type": "linear", "factor": _short(factor)}


def _llama3_scaling(file: GGUF, head_dim: int, theta: float) -> dict[str, Any]:
    """The llama3 settings whose frequency divisors are those of rope_freqs.weight."""
    stored = _raw(file, ROPE_FACTORS).read().astype(np.float64)
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    for scaling in LLAMA3_SCALINGS:
        original, low, high = (
            scaling[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        )
        smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
        divisor = 1 / ((1 - smooth) / scaling["factor"] + smooth)
        if stored.shape == divisor.shape and np.allclose(stored, divisor, rtol=1e-4):
            return {"rope_type": "llama3", **scaling}
    raise UsageError(f"{file.path}: {ROPE_FACTORS} is not Llama 3.1's or 3.2's RoPE scaling: not supported")


def tensors_of(file: GGUF) -> dict[str, Tensor]:
    """{Hugging Face name: Tensor}: dequantised one at a time, q and k rows in Hugging Face's order again."""
    heads = file.metadata["llama.attention.head_count"]
    kv_heads = file.metadata.get("llama.attention.head_count_kv", heads)
    turned = {"attn_q": heads, "attn_k": kv_heads}
    tensors = {}
    for name in file.entries:
        if name == ROPE_FACTORS:
            continue  # read as config
        parts = name.split(".")
        layered = parts[0] == "blk" and len(parts) == 4
        part, suffix = parts[2:] if layered else (parts if len(parts) == 2 else (name, ""))
        raw = _raw(file, name)
        if part in turned:
            n = turned[part][0] if isinstance(turned[part], list) else turned[part]
            raw = Tensor(raw.shape, raw.dtype, raw.where, _unturned(raw.read, n), False, raw.stored)
        if part in NAMES:
            name = f"model.layers.{parts[1]}.{NAMES[part]}.{suffix}" if layered else f"{NAMES[part]}.{suffix}"
        tensors[name] = raw
    return tensors


def _unturned(read: Callable[[], np.ndarray], heads: int) -> Callable[[], np.ndarray]:
    return lambda: unturn(read(), heads)


def unturn(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of q and k rows: there the two halves of a head that rotate together are interleaved."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _raw(file: GGUF, name: str) -> Tensor:
    """A tensor under its own name, dequantised to float32 (float types stay as they are)."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    shape, number, low = file.entries[name]
    try:
        kind = GGMLQuantizationType(number)
    except ValueError as error:
        raise UsageError(
            f"{file.path}: tensor {name} has the unknown type {number}: update the gguf package"
        ) from error
    block, block_bytes = GGML_QUANT_SIZES[kind]
    nbytes = math.prod(shape) // block * block_bytes
    if not shape or shape[-1] % block or low + nbytes > file.size:
        raise UsageError(
            f"{file.path} is truncated or corrupt: {name} {list(shape)} {kind.name} ends at byte {low + nbytes}, "
            f"the file has {file.size}"
        )
    plain = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}.get(kind.name)
    data = file.pages[low : low + nbytes]
    if plain is not None:
        return Tensor(shape, np.dtype(plain), str(file.path), lambda: data.view(plain).reshape(shape), True, kind.name)

    def read() -> np.ndarray:
        try:
            return dequantize(data.reshape(*shape[:-1], -1), kind).reshape(shape)
        except NotImplementedError as error:
            raise UsageError(
                f"{file.path}: {name} is quantised as {kind.name}, which the gguf package cannot read"
            ) from error

    return Tensor(shape, np.dtype(np.float32), str(file.path), read, False, kind.name)
