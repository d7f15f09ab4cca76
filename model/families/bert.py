"""BERT's config.json."""

from typing import Any

from configs.errors import UsageError
from model.architecture import Architecture
from model.families.fields import activation, activation_name, need, refuse

KINDS = ("ForMaskedLM", "ForPreTraining", "ForSequenceClassification")
MUST_BE = {"is_decoder": False, "position_embedding_type": "absolute", "chunk_size_feed_forward": 0,
           "problem_type": None, "tie_word_embeddings": True}  # fmt: skip


def bert(config: dict[str, Any]) -> Architecture:
    """BERT (transformers modeling_bert.py) with its masked-LM head, or with a classifier on its first token."""
    refuse(config, MUST_BE)
    name = next(iter(config.get("architectures") or ()), "BertForMaskedLM")
    if not name.endswith(KINDS):
        raise UsageError(f"config.json: architectures = {name!r} is not supported (only Bert{', Bert'.join(KINDS)})")
    width, heads = need(config, "hidden_size"), need(config, "num_attention_heads")
    return Architecture(
        family="bert",
        vocab_size=need(config, "vocab_size"),
        d_model=width,
        num_layers=need(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        d_ff=need(config, "intermediate_size"),
        max_position=config.get("max_position_embeddings", 512),
        norm="layer",
        norm_eps=config.get("layer_norm_eps", 1e-12),
        norm_bias=True,
        block="post",
        pre_norms=False,
        activation=activation(config, "hidden_act", "gelu"),
        gated=False,
        tie_embeddings=True,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        learned_positions=True,
        init_std=config.get("initializer_range", 0.02),
        causal=False,
        token_types=config.get("type_vocab_size", 2),
    )


def bert_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of a BERT."""
    return {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.d_model,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_heads,
        "intermediate_size": arch.d_ff,
        "max_position_embeddings": arch.max_position,
        "layer_norm_eps": arch.norm_eps,
        "hidden_act": activation_name(arch),
        "type_vocab_size": arch.token_types,
        "tie_word_embeddings": True,
        "initializer_range": arch.init_std,
    }
