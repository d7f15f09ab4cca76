"""What the goldens of families are about: tiny models, their inputs, our side of the comparison. No torch here.

A family is an entry of CONFIGS: a config.json in which everything that could hide at its default is off it. Weights are
drawn from a seed of their name, so a golden (make_families.py) keeps only what transformers computes from them.
"""

import zlib
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.hf import outgoing
from convert.tables import Leaf, rows, shapes
from convert.tensors import Tensor
from model.architecture import Architecture
from model.families import architecture_from_hf
from model.head import cross_entropy, head_of, logits
from model.transformer import Compute, forward, nest

FOLDER = Path(__file__).with_name("families")
VOCAB, LENGTH, PADDED = 97, 24, 9  # the second row begins with so much padding
LARGEST = 8  # entries kept of each gradient, besides its norm
POSITIONS = (10, 13, 18, 23)  # whose logits are kept

LOCAL, FULL = "sliding_attention", "full_attention"
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.02,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e3,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GROUPED: dict[str, Any] = {
    "moe_intermediate_size": 12,
    "num_experts_per_tok": 3,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e2,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}
PLAIN = {"rope_type": "default", "rope_theta": 1e2}


def _config(name: str, kind: str, **fields: Any) -> dict[str, Any]:
    return {"architectures": [name], "model_type": kind, **SIZES, **fields}


CONFIGS: dict[str, dict[str, Any]] = {
    "llama3": _config(
        "LlamaForCausalLM", "llama", head_dim=8, rms_norm_eps=1e-5, hidden_act="silu", rope_parameters=LLAMA3,
        tie_word_embeddings=False, attention_bias=True, mlp_bias=True,
    ),
    # windows shorter than the rows, a score scale that is not that of the head dimension, heads that do not make up the
    # width, two RoPE bases and a scaled one
    "gemma3": _config(
        "Gemma3ForCausalLM", "gemma3_text", num_hidden_layers=5, head_dim=16, rms_norm_eps=1e-6,
        hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=10, sliding_window=5,
        layer_types=[LOCAL, LOCAL, FULL, LOCAL, FULL], tie_word_embeddings=True, attention_bias=False,
        rope_parameters={
            FULL: {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
            LOCAL: {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    # experts
    "mixtral": _config(
        "MixtralForCausalLM", "mixtral", rms_norm_eps=1e-5, head_dim=8, intermediate_size=12, num_local_experts=4,
        num_experts_per_tok=2, sliding_window=5, rope_parameters=PLAIN,
    ),
    "qwen2_moe": _config(
        "Qwen2MoeForCausalLM", "qwen2_moe", rms_norm_eps=1e-5, num_experts=6, num_experts_per_tok=2,
        moe_intermediate_size=12, shared_expert_intermediate_size=16, norm_topk_prob=False, rope_parameters=PLAIN,
    ),
    "qwen3_moe": _config(
        "Qwen3MoeForCausalLM", "qwen3_moe", rms_norm_eps=1e-5, head_dim=8, num_experts=6, num_experts_per_tok=2,
        moe_intermediate_size=12, norm_topk_prob=True, mlp_only_layers=[0], rope_parameters=PLAIN,
        attention_bias=True,
    ),
    "glm4_moe": _config(
        "Glm4MoeForCausalLM", "glm4_moe", rms_norm_eps=1e-5, head_dim=8, **GROUPED, norm_topk_prob=True,
        use_qk_norm=True, attention_bias=True, rope_parameters={**PLAIN, "partial_rotary_factor": 0.5},
    ),
    "deepseek_v2": _config(
        "DeepseekV2ForCausalLM", "deepseek_v2", rms_norm_eps=1e-5, **{**GROUPED, **LATENT}, q_lora_rank=None,
        topk_method="group_limited_greedy", norm_topk_prob=False, rope_parameters=PLAIN,
    ),
    "deepseek_v3": _config(
        "DeepseekV3ForCausalLM", "deepseek_v3", rms_norm_eps=1e-5, **{**GROUPED, **LATENT}, q_lora_rank=14,
        norm_topk_prob=True, attention_bias=True, rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
    ),
    "gpt_oss": _config(
        "GptOssForCausalLM", "gpt_oss", rms_norm_eps=1e-5, head_dim=8, intermediate_size=12, num_local_experts=6,
        num_experts_per_tok=2, swiglu_alpha=1.5, swiglu_limit=1.0, sliding_window=5, attention_bias=True,
        layer_types=[LOCAL, FULL, LOCAL, FULL], rope_parameters={**YARN, "truncate": False},
    ),
}  # fmt: skip


def tensors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Weights under the checkpoint's names, each from a seed of its name; norms and biases are random too."""
    arch, made = architecture_from_hf(config), {}
    ours = {name: row.ours for row in rows(arch) for name in row.names(arch)}
    for name, shape in shapes(arch).items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        norm = ours[name].endswith("/scale")
        values = (0.4 if norm else 0.3) * rng.standard_normal(shape) + norm * (1 - arch.norm_offset)
        made[name] = values.astype(np.float32)
    return made


def leaves(arch: Architecture, weights: dict[str, np.ndarray], dtype: Any) -> dict[str, np.ndarray]:
    """{our path: array} of a checkpoint, read as the converter does."""
    found = {}
    for row in rows(arch):
        parts = [weights[name] for name in row.names(arch)]
        given = tuple(Tensor(part.shape, part.dtype, "", partial(lambda x: x, part)) for part in parts)
        found[row.ours] = Leaf(row, arch, given).read((), np.dtype(dtype))
    return found


def params_of(arch: Architecture, weights: dict[str, np.ndarray], dtype: Any) -> dict[str, Any]:
    """Our tree of a checkpoint."""
    return nest({path: jnp.asarray(leaf) for path, leaf in leaves(arch, weights, dtype).items()})


def theirs_of(arch: Architecture, tree: Any) -> dict[str, np.ndarray]:
    """A tree of ours (weights, gradients) under the checkpoint's names and in its layout."""
    return {tensor.name: tensor.make() for tensor in outgoing(tree, arch, None)}


def batch() -> dict[str, np.ndarray]:
    """Two rows of 24 and 15 tokens, padded on the left."""
    rng = np.random.default_rng(5)
    tokens, segments = rng.integers(3, VOCAB, (2, LENGTH)), np.ones((2, LENGTH), np.int32)
    tokens[1, :PADDED], segments[1, :PADDED] = 0, 0
    positions = np.maximum(segments.cumsum(1) - 1, 0)
    targets = np.roll(tokens, -1, 1)
    weights = segments * (np.arange(LENGTH) < LENGTH - 1).astype(np.float32)
    return {
        "tokens": tokens.astype(np.int32),
        "positions": positions.astype(np.int32),
        "segments": segments,
        "targets": targets.astype(np.int32),
        "weights": weights.astype(np.float32),
    }


def ours(
    config: dict[str, Any], dtype: Any, attention: str = "reference", remat: str = "full"
) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
    """(logits, mean loss, {the checkpoint's name: gradient})."""
    arch, b = architecture_from_hf(config), {k: jnp.asarray(v) for k, v in batch().items()}
    params, compute = params_of(arch, tensors(config), dtype), Compute(dtype, attention, remat)

    def loss(params: Any) -> Any:
        hidden = forward(arch, compute, params, b["tokens"], b["positions"], b["segments"])
        head = head_of(arch, params)
        total, _ = cross_entropy(hidden, head, b["targets"], b["weights"].astype(dtype))
        return total / b["weights"].sum(), logits(hidden, head)

    (value, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    named = theirs_of(arch, jax.tree.map(np.asarray, grads))
    for name in [name for row in rows(arch) if row.ours.endswith("/correction") for name in row.names(arch)]:
        assert not named.pop(name).any(), name  # it only chooses: in transformers it is no parameter
    return np.asarray(out), float(value), named


def digest(out: np.ndarray, loss: float, grads: dict[str, np.ndarray]) -> dict[str, Any]:
    """What the golden keeps: logits of some positions, the loss, each gradient's norm and largest entries."""
    flat = {name: np.asarray(g, np.float64).ravel() for name, g in sorted(grads.items())}
    # of those with fewer, some come again
    at = {name: np.resize(np.argsort(-np.abs(g), kind="stable")[:LARGEST], LARGEST) for name, g in flat.items()}
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
        far = max(abs(np.linalg.norm(flat) - norm), np.abs(flat[at] - values).max())
        found[str(name)] = float(far / (norm or 1))  # an expert that no token chose has no gradient
    return found


def apart(
    out: np.ndarray, loss: float, grads: dict[str, np.ndarray], want: np.ndarray, expected: float,
    theirs: dict[str, np.ndarray],
) -> dict[str, float]:  # fmt: skip
    """Differences of everything: logits where there is no padding, loss, each gradient over its norm."""
    assert grads.keys() == theirs.keys(), set(grads) ^ set(theirs)
    found = {"logits": float(np.abs(out - want)[batch()["segments"] > 0].max()), "loss": abs(loss - expected)}
    norm = np.linalg.norm
    return found | {name: float(norm(grads[name] - g) / (norm(g) or 1)) for name, g in theirs.items()}
