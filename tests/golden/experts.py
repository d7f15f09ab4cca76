"""Tiny models with experts for comparison with transformers: their configs, and our side of it. No torch here."""

import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.hf import outgoing
from convert.tables import match, shapes
from convert.tensors import Tensor
from model.architecture import Architecture
from model.families import architecture_from_hf
from model.head import cross_entropy, head_of, logits
from model.transformer import Compute, forward, nest
from tests.golden.gemma3 import batch

FOLDER = Path(__file__).parent

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GROUPS = {
    "moe_intermediate_size": 12,
    "num_experts_per_tok": 3,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
}
LATENT = {
    "kv_lora_rank": 10,
    "q_lora_rank": 14,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
YARN = {
    "type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {
        **SMALL,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 5,
    },
    "qwen2_moe": {
        **SMALL,
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 16,
        "norm_topk_prob": False,
    },
    "qwen3_moe": {
        **SMALL,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    "glm4_moe": {
        **SMALL,
        **GROUPS,
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "partial_rotary_factor": 0.5,
        "use_qk_norm": True,
        "attention_bias": True,
    },
    "deepseek_v2": {
        **{k: v for k, v in SMALL.items() if k != "head_dim"},
        **GROUPS,
        **LATENT,
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "topk_method": "group_limited_greedy",
        "norm_topk_prob": False,
    },
    "deepseek_v3": {
        **{k: v for k, v in SMALL.items() if k != "head_dim"},
        **GROUPS,
        **LATENT,
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "attention_bias": True,
        "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
    },
    "gpt_oss": {
        **SMALL,
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "swiglu_alpha": 1.5,
        "swiglu_limit": 1.0,
        "sliding_window": 5,
        "attention_bias": True,
        "rope_scaling": {**YARN, "truncate": False},
    },
}


def tensors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Weights under Hugging Face's names, each from a seed of its name; norms and biases are random too."""
    made = {}
    for name, shape in shapes(architecture_from_hf(config)).items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        scale, mean = (0.4, 1.0) if "norm" in name else (0.3, 0.0)
        made[name] = (mean + scale * rng.standard_normal(shape)).astype(np.float32)
    return made


def params_of(arch: Architecture, weights: dict[str, np.ndarray], dtype: Any) -> dict[str, Any]:
    """Our tree of them."""
    found = {name: Tensor(x.shape, x.dtype, "", lambda x=x: x) for name, x in weights.items()}
    return nest({ours: jnp.asarray(leaf.read((), dtype)) for ours, leaf in match(found, arch, "").items()})


def theirs_of(arch: Architecture, tree: Any) -> dict[str, np.ndarray]:
    """{Hugging Face's name: array} of a tree like the weights'."""
    return {tensor.name: np.asarray(tensor.make()) for tensor in outgoing(tree, arch, None)}


def ours(config: dict[str, Any], dtype: Any, **how: Any) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
    """(logits, mean loss, {Hugging Face's name: gradient})."""
    arch, b = architecture_from_hf(config), {k: jnp.asarray(v) for k, v in batch().items()}
    params, compute = params_of(arch, tensors(config), dtype), Compute(dtype, **how)

    def loss(params: Any) -> Any:
        hidden = forward(arch, compute, params, b["tokens"], b["positions"], b["segments"])
        head = head_of(arch, params)
        total, _ = cross_entropy(hidden, head, b["targets"], b["weights"].astype(dtype))
        return total / b["weights"].sum(), logits(hidden, head)

    (value, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return np.asarray(out), float(value), theirs_of(arch, grads)
