"""The config.json of OLMo 2 and 3: norms only behind attention and MLP, and over all heads of q and of k."""

from typing import Any

from configs.errors import UsageError
from model.architecture import Architecture, Rope
from model.families.fields import FULL, SLIDING, common, layer_types, rope, rope_config, windows_of, written


def olmo2(config: dict[str, Any]) -> Architecture:
    """OLMo 2 (transformers modeling_olmo2.py)."""
    return Architecture(**common(config, "olmo2", eps=("rms_norm_eps", 1e-5)), **_olmo(config))


def _olmo(config: dict[str, Any]) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    norms = {"pre_norms": False, "post_norms": True, "qk_norm": True, "qk_norm_over": "width"}
    return {**norms, "attention_bias": bias, "output_bias": bias}


def olmo2_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of an OLMo 2."""
    return written(arch, "Olmo2")


def olmo3(config: dict[str, Any]) -> Architecture:
    """OLMo 3 (transformers modeling_olmo3.py): windows in three layers of four, where RoPE is not scaled."""
    ropes, theta = config.get("rope_parameters") or {}, config.get("rope_theta") or 500_000.0
    if surplus := set(ropes) - {SLIDING, FULL}:
        raise UsageError(f"config.json: rope_parameters.{min(surplus)}: only {SLIDING} and {FULL} are supported there")
    full = {**(ropes.get(FULL) or {}), **(config.get("rope_scaling") or {})}
    read = common(config, "olmo3", eps=("rms_norm_eps", 1e-5), theta=theta, scaling=full)
    windows = windows_of(config, [(i + 1) % 4 != 0 for i in range(read["num_layers"])], 4096)
    local: Rope | None = rope(ropes.get(SLIDING) or {}, theta, read["max_position"])
    return Architecture(
        **read, **_olmo(config), windows=windows, local_rope=local if windows and local != read["rope"] else None
    )


def olmo3_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of an OLMo 3."""
    ropes = {FULL: rope_config(arch.rope), SLIDING: rope_config(arch.local_rope or arch.rope)}
    window = max(arch.windows, default=4096)
    return written(
        arch, "Olmo3", layer_types=layer_types(arch), sliding_window=window, rope_parameters=ropes, rope_scaling=None
    )
