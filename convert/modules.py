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


def _fused(theirs: str, parts: dict[str, str], groups: str = "") -> dict[str, tuple[str, Share]]:
    """{our module: their tensor and its share of it} of modules {name: output axes} that lie in one tensor there."""
    return {ours: (theirs, Share(tuple(parts.values()), at, groups)) for at, ours in enumerate(parts)}


_LAYER = "model.layers.{i}"
_QKV = ("layers/attn/q", "layers/attn/k", "layers/attn/v")

# Llama, and what differs from it only by biases, norms of q and k, and a tied head.
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
# Norms behind attention and MLP: the same name for another norm.
GEMMA = LLAMA | {
    "layers/attn_post_norm": f"{_LAYER}.post_attention_layernorm",
    "layers/mlp_norm": f"{_LAYER}.pre_feedforward_layernorm",
    "layers/mlp_post_norm": f"{_LAYER}.post_feedforward_layernorm",
}
GLM = LLAMA | _fused(f"{_LAYER}.mlp.gate_up_proj", {"layers/mlp/gate": "F", "layers/mlp/up": "F"})
_NEOX, _GPT2 = "gpt_neox.layers.{i}", "transformer.h.{i}"


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


GLM4_MOE = LLAMA | _moe("mlp") | _shared("shared_experts")
GLM4_MOE["layers/mlp/correction"] = f"{_LAYER}.mlp.gate.e_score_correction_bias"
DEEPSEEK = GLM4_MOE | {
    "layers/attn/q_a": f"{_LAYER}.self_attn.q_a_proj",
    "layers/attn/q_a_norm": f"{_LAYER}.self_attn.q_a_layernorm",
    "layers/attn/q_b": f"{_LAYER}.self_attn.q_b_proj",
    "layers/attn/kv_a": f"{_LAYER}.self_attn.kv_a_proj_with_mqa",
    "layers/attn/kv_a_norm": f"{_LAYER}.self_attn.kv_a_layernorm",
    "layers/attn/kv_b": f"{_LAYER}.self_attn.kv_b_proj",
}

MODULES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "cohere", "cohere2"), LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2", "olmo3"), GEMMA),
    "glm": GLM,
    "glm4": GLM
    | {
        "layers/attn_post_norm": f"{_LAYER}.post_self_attn_layernorm",
        "layers/mlp_post_norm": f"{_LAYER}.post_mlp_layernorm",
    },
    "mixtral": LLAMA | _moe("block_sparse_moe", "w1", "w3", "w2"),
    "qwen2_moe": LLAMA
    | _moe("mlp")
    | _shared("shared_expert")
    | {"layers/mlp/shared_gate": f"{_LAYER}.mlp.shared_expert_gate"},
    "qwen3_moe": LLAMA | _moe("mlp"),
    "glm4_moe": GLM4_MOE,
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "gpt_oss": LLAMA
    | _fused(f"{_LAYER}.mlp.experts.gate_up_proj", {f"layers/mlp/experts/{part}": "" for part in ("gate", "up")}, "I")
    | {
        "layers/attn/sinks": f"{_LAYER}.self_attn.sinks",
        "layers/mlp/router": f"{_LAYER}.mlp.router",
        "layers/mlp/experts/down": f"{_LAYER}.mlp.experts.down_proj",
    },
    "phi3": GLM | _fused(f"{_LAYER}.self_attn.qkv_proj", dict(zip(_QKV, ("NH", "KH", "KH"), strict=True))),
    "stablelm": LLAMA
    | {
        "layers/attn/q_norm": f"{_LAYER}.self_attn.q_layernorm.norms.{{e}}",
        "layers/attn/k_norm": f"{_LAYER}.self_attn.k_layernorm.norms.{{e}}",
    },
    "starcoder2": LLAMA | {"layers/mlp/up": f"{_LAYER}.mlp.c_fc", "layers/mlp/down": f"{_LAYER}.mlp.c_proj"},
    "gpt_neox": {
        "embed": "gpt_neox.embed_in",
        "layers/attn_norm": f"{_NEOX}.input_layernorm",
        **_fused(f"{_NEOX}.attention.query_key_value", dict.fromkeys(_QKV, "H"), groups="N"),
        "layers/attn/o": f"{_NEOX}.attention.dense",
        "layers/mlp_norm": f"{_NEOX}.post_attention_layernorm",
        "layers/mlp/up": f"{_NEOX}.mlp.dense_h_to_4h",
        "layers/mlp/down": f"{_NEOX}.mlp.dense_4h_to_h",
        "norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
        "score": "score",
    },
    "gpt2": {
        "embed": "transformer.wte",
        "positions": "transformer.wpe",
        "layers/attn_norm": f"{_GPT2}.ln_1",
        **_fused(f"{_GPT2}.attn.c_attn", dict.fromkeys(_QKV, "NH")),
        "layers/attn/o": f"{_GPT2}.attn.c_proj",
        "layers/mlp_norm": f"{_GPT2}.ln_2",
        "layers/mlp/up": f"{_GPT2}.mlp.c_fc",
        "layers/mlp/down": f"{_GPT2}.mlp.c_proj",
        "norm": "transformer.ln_f",
        "head": "lm_head",
        "score": "score",
    },
}
_BERT = "bert.encoder.layer.{i}"
MODULES["bert"] = {
    "embed": "bert.embeddings.word_embeddings",
    "positions": "bert.embeddings.position_embeddings",
    "types": "bert.embeddings.token_type_embeddings",
    "embed_norm": "bert.embeddings.LayerNorm",
    "layers/attn/q": f"{_BERT}.attention.self.query",
    "layers/attn/k": f"{_BERT}.attention.self.key",
    "layers/attn/v": f"{_BERT}.attention.self.value",
    "layers/attn/o": f"{_BERT}.attention.output.dense",
    "layers/attn_norm": f"{_BERT}.attention.output.LayerNorm",
    "layers/mlp/up": f"{_BERT}.intermediate.dense",
    "layers/mlp/down": f"{_BERT}.output.dense",
    "layers/mlp_norm": f"{_BERT}.output.LayerNorm",
    "head": "cls.predictions.decoder",
    "pooler": "bert.pooler.dense",
    "score": "classifier",
    "predict": "cls.predictions.transform.dense",
    "predict_norm": "cls.predictions.transform.LayerNorm",
    "predict_tokens": "cls.predictions",
}
# Parts of names as the first checkpoints have them.
RENAMED = {"bert": {".gamma": ".weight", ".beta": ".bias"}}
# Families published with a layer more, behind the last one, that predicts the token after next: it is left out.
FURTHER = {"glm4_moe", "deepseek_v3"}
# Families whose layers keep a linear weight as [inputs, outputs].
CONV1D = {"gpt2"}
# Tensors that nothing here reads: buffers that older transformers saved, heads for other uses.
IGNORED = (
    "model.layers.{i}.self_attn.rotary_emb.inv_freq",
    "model.rotary_emb.inv_freq",
    *(f"{_NEOX}.attention.{name}" for name in ("bias", "masked_bias", "rotary_emb.inv_freq")),
    *(f"{_GPT2}.attn.{name}" for name in ("bias", "masked_bias")),
    # what published BERTs have besides the masked-LM head: its bias once more, and the next-sentence head
    "bert.embeddings.position_ids",
    "cls.predictions.decoder.bias",
    "cls.seq_relationship.weight",
    "cls.seq_relationship.bias",
    "bert.pooler.dense.weight",
    "bert.pooler.dense.bias",
)
