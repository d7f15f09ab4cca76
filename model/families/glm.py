"""The config.json of GLM-4 and of Phi-3: Llama's block with fused projections, and a part of each head rotated."""

from typing import Any

from model.architecture import Architecture
from model.families.fields import common, one_window, with_fraction, written


def glm(config: dict[str, Any]) -> Architecture:
    """GLM-4-9B (transformers modeling_glm.py): neighbours of half a head rotate, biases on q, k and v."""
    return Architecture(**_glm(config, "glm"), attention_bias=bool(config.get("attention_bias", True)))


def glm4(config: dict[str, Any]) -> Architecture:
    """GLM-4-0414 (transformers modeling_glm4.py): also norms behind attention and MLP."""
    bias = bool(config.get("attention_bias", True))
    return Architecture(**_glm(config, "glm4"), attention_bias=bias, post_norms=True)


def _glm(config: dict[str, Any], family: str) -> dict[str, Any]:
    eps = ("rms_norm_eps", 1.5625e-7)
    return common(config, family, eps=eps, context=131_072, head_dim=128, fraction=0.5, interleaved=True)


def glm_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of either."""
    return with_fraction(written(arch, "Glm4" if arch.family == "glm4" else "Glm"), arch)


def phi3(config: dict[str, Any]) -> Architecture:
    """Phi-3, 3.5, 4 and 4-mini (transformers modeling_phi3.py)."""
    read = common(config, "phi3", eps=("rms_norm_eps", 1e-5), context=4096, fraction=1.0, original=4096)
    return Architecture(**read, windows=one_window(config, read["num_layers"]))


def phi3_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of a Phi-3."""
    window, before = max(arch.windows, default=None), arch.rope.original_max_position
    return written(arch, "Phi3", original_max_position_embeddings=before, sliding_window=window)
