"""What the Gemma 3 goldens are about: the tiny model, its inputs, and our side of the comparison. No torch here."""

import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.tables import rows as table
from model.architecture import Architecture
from model.families import architecture_from_hf
from model.head import cross_entropy, head_of, logits
from model.transformer import Compute, forward, nest
from model.tree import flatten

FILE = Path(__file__).with_name("gemma3.npz")
LARGEST = 8  # entries kept of each gradient, besides its norm
POSITIONS = (10, 13, 18, 23)  # whose logits are kept
# Everything that could hide at its default is off it: windows shorter than the rows, a score scale that is not that of
# the head dimension, heads that do not make up the width, two RoPE bases and a scaled one.
CONFIG: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 10,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
    "tie_word_embeddings": True,
    "attention_bias": False,
    "initializer_range": 0.02,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def tensors(config: dict[str, Any] = CONFIG) -> dict[str, np.ndarray]:
    """Weights under Hugging Face's names, each from a seed of its name; norms are random too."""
    arch = architecture_from_hf(config)
    made = {}
    for row in table(arch):
        for name in row.names(arch):
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            scale = 0.4 if "norm" in name else 0.3
            made[name] = (scale * rng.standard_normal(row.their_shape(arch))).astype(np.float32)
    return made


def params_of(arch: Architecture, weights: dict[str, np.ndarray], dtype: Any) -> dict[str, Any]:
    """Our tree of them."""
    flat = {}
    for row in table(arch):
        parts = [row.to_ours(weights[name], arch) for name in row.names(arch)]
        flat[row.ours] = jnp.asarray(np.stack(parts) if row.stacked else parts[0], dtype)
    return nest(flat)


def batch() -> dict[str, np.ndarray]:
    """Two rows of 24 and 15 tokens, padded on the left."""
    rng = np.random.default_rng(5)
    tokens, segments = rng.integers(3, 97, (2, 24)), np.ones((2, 24), np.int32)
    tokens[1, :9], segments[1, :9] = 0, 0
    positions = np.maximum(segments.cumsum(1) - 1, 0)
    targets = np.roll(tokens, -1, 1)
    weights = segments * (np.arange(24) < 23).astype(np.float32)
    return {
        "tokens": tokens.astype(np.int32),
        "positions": positions.astype(np.int32),
        "segments": segments,
        "targets": targets.astype(np.int32),
        "weights": weights.astype(np.float32),
    }


def ours(
    dtype: Any, attention: str = "reference", remat: str = "full", config: dict[str, Any] = CONFIG
) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
    """(logits, mean loss, {Hugging Face's name: gradient})."""
    arch, b = architecture_from_hf(config), {k: jnp.asarray(v) for k, v in batch().items()}
    params, compute = params_of(arch, tensors(config), dtype), Compute(dtype, attention, remat)

    def loss(params: Any) -> Any:
        hidden = forward(arch, compute, params, b["tokens"], b["positions"], b["segments"])
        head = head_of(arch, params)
        total, _ = cross_entropy(hidden, head, b["targets"], b["weights"].astype(dtype))
        return total / b["weights"].sum(), logits(hidden, head)

    (value, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    flat = flatten(grads)
    named = {
        name: row.to_theirs(np.asarray(flat[row.ours])[i] if row.stacked else np.asarray(flat[row.ours]), arch)
        for row in table(arch)
        for i, name in enumerate(row.names(arch))
    }
    return np.asarray(out), float(value), named


def digest(out: np.ndarray, loss: float, grads: dict[str, np.ndarray]) -> dict[str, Any]:
    """What the golden keeps: logits of some positions, the loss, each gradient's norm and largest entries."""
    flat = {name: np.asarray(g, np.float64).ravel() for name, g in sorted(grads.items())}
    at = {name: np.argsort(-np.abs(g), kind="stable")[:LARGEST] for name, g in flat.items()}
    return {
        "logits": out[:, list(POSITIONS)],
        "loss": np.float64(loss),
        "names": np.asarray(list(flat)),
        "norms": np.asarray([np.linalg.norm(g) for g in flat.values()]),
        "at": np.asarray(list(at.values()), np.int32),
        "values": np.asarray([g[at[name]] for name, g in flat.items()]),
    }


def compare(golden: dict[str, Any], out: np.ndarray, loss: float, grads: dict[str, np.ndarray]) -> dict[str, float]:
    """Differences from the golden: of logits, of the loss, and over its norm of every gradient."""
    assert sorted(grads) == golden["names"].tolist()
    found = {
        "logits": float(np.abs(out[:, list(POSITIONS)] - golden["logits"]).max()),
        "loss": abs(loss - float(golden["loss"])),
    }
    for name, norm, at, values in zip(*(golden[k] for k in ("names", "norms", "at", "values")), strict=True):
        flat = np.asarray(grads[name], np.float64).ravel()
        found[str(name)] = float(max(abs(np.linalg.norm(flat) - norm), np.abs(flat[at] - values).max()) / norm)
    return found
