"""What each family calls our modules in its checkpoints, by model_type; convert/tables.py makes the rows of it."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Share:
    """The part that one of our weights has of a fused tensor there.

    Its output axis is cut into `groups` (an axis in DESIGN's letters; none: one group), and in each of them lie the
    `parts` one behind the other, of which this is number `at`.
    """

    parts: tuple[str, ...]
    at: int
    groups: str = ""


_LAYER = "model.layers.{i}"

# Llama, and what differs from it only by biases and a tied head.
LLAMA: dict[str, Any] = {
    "embed": "model.embed_tokens",
    "layers/attn_norm": f"{_LAYER}.input_layernorm",
    "layers/attn/q": f"{_LAYER}.self_attn.q_proj",
    "layers/attn/k": f"{_LAYER}.self_attn.k_proj",
    "layers/attn/v": f"{_LAYER}.self_attn.v_proj",
    "layers/attn/o": f"{_LAYER}.self_attn.o_proj",
    "layers/attn/q_norm": f"{_LAYER}.self_attn.q_norm",
    "layers/attn/k_norm": f"{_LAYER}.self_attn.k_norm",
    "layers/mlp_norm": f"{_LAYER}.post_attention_layernorm",
    "layers/mlp/gate": f"{_LAYER}.mlp.gate_proj",
    "layers/mlp/up": f"{_LAYER}.mlp.up_proj",
    "layers/mlp/down": f"{_LAYER}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
    "score": "score",
}
# Norms on both sides: the same name for another norm.
GEMMA = LLAMA | {
    "layers/attn_post_norm": f"{_LAYER}.post_attention_layernorm",
    "layers/mlp_norm": f"{_LAYER}.pre_feedforward_layernorm",
    "layers/mlp_post_norm": f"{_LAYER}.post_feedforward_layernorm",
}


def _moe(block: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> dict[str, Any]:
    """A router, and a module for each expert with three linear layers, in a layer's `block`."""
    expert = f"{_LAYER}.{block}.experts.{{e}}"
    return {
        "layers/mlp/router": f"{_LAYER}.{block}.gate",
        "layers/mlp/experts/gate": f"{expert}.{gate}",
        "layers/mlp/experts/up": f"{expert}.{up}",
        "layers/mlp/experts/down": f"{expert}.{down}",
    }


def _shared(name: str) -> dict[str, Any]:
    """An MLP that sees every token beside the experts."""
    return {f"layers/mlp/shared/{part}": f"{_LAYER}.mlp.{name}.{part}_proj" for part in ("gate", "up", "down")}


QWEN2_MOE = LLAMA | _moe("mlp") | _shared("shared_expert")
QWEN2_MOE |= {"layers/mlp/shared_gate": f"{_LAYER}.mlp.shared_expert_gate"}
GLM4_MOE = LLAMA | _moe("mlp") | _shared("shared_experts")
GLM4_MOE |= {"layers/mlp/correction": f"{_LAYER}.mlp.gate.e_score_correction_bias"}

MODULES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gemma3_text": GEMMA,
    "mixtral": LLAMA | _moe("block_sparse_moe", "w1", "w3", "w2"),
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": LLAMA | _moe("mlp"),
    "glm4_moe": GLM4_MOE,
}
# Families whose layers keep a linear weight as [inputs, outputs].
CONV1D = {"gpt2"}
