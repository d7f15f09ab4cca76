"""The config.json of Cohere's Command R: attention and MLP side by side behind one norm, neighbours rotate."""

from typing import Any

from model.architecture import Architecture
from model.families.fields import common, layer_types, windows_of, written


def cohere(config: dict[str, Any]) -> Architecture:
    """Command R (transformers modeling_cohere.py); the larger ones norm every head of q and k by its own scale."""
    normed = bool(config.get("use_qk_norm", False))
    return Architecture(
        **_cohere(config, "cohere", 500_000.0), qk_norm=normed, qk_norm_over="heads" if normed else "head"
    )


def cohere2(config: dict[str, Any]) -> Architecture:
    """Command R7B and A (transformers modeling_cohere2.py): RoPE only in layers with a window, three of four."""
    read, every = _cohere(config, "cohere2", 10_000.0), config.get("sliding_window_pattern") or 4
    windows = windows_of(config, [(i + 1) % every != 0 for i in range(read["num_layers"])], 4096)
    rotated = tuple(window > 0 for window in windows or (0,) * read["num_layers"])
    return Architecture(**read, windows=windows, rotated=() if all(rotated) else rotated)


def _cohere(config: dict[str, Any], family: str, theta: float) -> dict[str, Any]:
    eps, bias = ("layer_norm_eps", 1e-5), bool(config.get("attention_bias", False))
    return {
        **common(config, family, eps=eps, tie=True, context=8192, theta=theta, interleaved=True),
        "norm": "layer",
        "block": "parallel_shared",
        "attention_bias": bias,
        "output_bias": bias,
        "logit_scale": float(config.get("logit_scale", 0.0625)),
    }


def cohere_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of a Command R."""
    return written(arch, "Cohere", "layer_norm_eps", logit_scale=arch.logit_scale, use_qk_norm=arch.qk_norm)


def cohere2_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of a Command R7B."""
    types, window = layer_types(arch), max(arch.windows, default=4096)
    return written(
        arch, "Cohere2", "layer_norm_eps", logit_scale=arch.logit_scale, layer_types=types, sliding_window=window
    )
