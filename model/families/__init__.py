"""Hugging Face config.json <-> Architecture: a family is a function and a row of a table, never a class."""

import dataclasses
from collections.abc import Callable
from typing import Any

from configs.errors import UsageError
from model.architecture import Architecture
from model.families.bert import bert, bert_config
from model.families.cohere import cohere, cohere2, cohere2_config, cohere_config
from model.families.deepseek import deepseek_v2, deepseek_v2_config, deepseek_v3, deepseek_v3_config
from model.families.fields import Fields, refuse_unread
from model.families.gemma import gemma2, gemma2_config, gemma3, gemma3_config
from model.families.glm import glm, glm4, glm_config, phi3, phi3_config
from model.families.gpt import (
    gpt2,
    gpt2_config,
    gpt_neox,
    gpt_neox_config,
    stablelm,
    stablelm_config,
    starcoder2,
    starcoder2_config,
)
from model.families.gpt_oss import gpt_oss, gpt_oss_config
from model.families.llama import (
    granite,
    granite_config,
    llama,
    llama_config,
    mistral,
    mistral_config,
    qwen2,
    qwen2_config,
    qwen3,
    qwen3_config,
    smollm3,
    smollm3_config,
)
from model.families.moe import (
    glm4_moe,
    glm4_moe_config,
    mixtral,
    mixtral_config,
    qwen2_moe,
    qwen2_moe_config,
    qwen3_moe,
    qwen3_moe_config,
)
from model.families.olmo import olmo2, olmo2_config, olmo3, olmo3_config

Reader = Callable[[dict[str, Any]], Architecture]
Writer = Callable[[Architecture], dict[str, Any]]
FAMILIES: dict[str, tuple[Reader, Writer]] = {
    "bert": (bert, bert_config),
    "cohere": (cohere, cohere_config),
    "cohere2": (cohere2, cohere2_config),
    "gemma2": (gemma2, gemma2_config),
    "gemma3_text": (gemma3, gemma3_config),
    "glm": (glm, glm_config),
    "glm4": (glm4, glm_config),
    "gpt2": (gpt2, gpt2_config),
    "gpt_neox": (gpt_neox, gpt_neox_config),
    "granite": (granite, granite_config),
    "llama": (llama, llama_config),
    "mistral": (mistral, mistral_config),
    "olmo2": (olmo2, olmo2_config),
    "olmo3": (olmo3, olmo3_config),
    "phi3": (phi3, phi3_config),
    "qwen2": (qwen2, qwen2_config),
    "qwen3": (qwen3, qwen3_config),
    "smollm3": (smollm3, smollm3_config),
    "stablelm": (stablelm, stablelm_config),
    "starcoder2": (starcoder2, starcoder2_config),
}
FAMILIES |= {  # with experts
    "deepseek_v2": (deepseek_v2, deepseek_v2_config),
    "deepseek_v3": (deepseek_v3, deepseek_v3_config),
    "glm4_moe": (glm4_moe, glm4_moe_config),
    "gpt_oss": (gpt_oss, gpt_oss_config),
    "mixtral": (mixtral, mixtral_config),
    "qwen2_moe": (qwen2_moe, qwen2_moe_config),
    "qwen3_moe": (qwen3_moe, qwen3_moe_config),
}
# What the class in `architectures` ends with, where it is no language model.
SEQUENCE, TOKEN, LANGUAGE = "ForSequenceClassification", "ForTokenClassification", "ForCausalLM"


def architecture_from_hf(config: dict[str, Any]) -> Architecture:
    """The Architecture of a config.json; raises UsageError for what would silently change the maths."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UsageError(f"model_type '{kind}' is not supported; supported: {', '.join(sorted(FAMILIES))}")
    fields = Fields(config)
    arch = FAMILIES[kind][0](fields)
    refuse_unread(fields)
    return dataclasses.replace(arch, **_labels_of(config))


def hf_config_from(arch: Architecture, **extra: Any) -> dict[str, Any]:
    """A config.json for an Architecture that has none; `extra` adds token ids and dtype."""
    kind = arch.family
    config = _with_labels(FAMILIES[kind][1](arch), arch)
    back = architecture_from_hf(config)
    lost = [f.name for f in dataclasses.fields(arch) if getattr(arch, f.name) != getattr(back, f.name)]
    if lost:
        raise UsageError(
            f"a config.json of model_type {kind} cannot express this model's {', '.join(lost)}: export needs the "
            "model's own config.json"
        )
    return config | extra


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
    family: str = (
        config["architectures"][0].removesuffix(LANGUAGE).removesuffix("LMHeadModel").removesuffix("ForMaskedLM")
    )
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
