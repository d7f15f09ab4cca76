"""gpt-oss's config.json."""

from typing import Any

from model.architecture import Architecture, Experts
from model.families.fields import need
from model.families.gemma import FULL, SLIDING, windows_of
from model.families.moe import aux, base, base_config

MXFP4 = "mxfp4"  # a quantisation that convert/mxfp4.py reads


def gpt_oss(config: dict[str, Any]) -> Architecture:
    """gpt-oss (transformers modeling_gpt_oss.py): attention sinks, windows in turn, a clipped SwiGLU, biases."""
    packed = config.get("quantization_config") or {}
    if packed.get("quant_method") == MXFP4:
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    layers, bias = need(config, "num_hidden_layers"), bool(config.get("attention_bias", True))
    kinds = config.get("layer_types") or [FULL if i % 2 else SLIDING for i in range(layers)]
    experts = Experts(
        count=need(config, "num_local_experts"),
        top_k=need(config, "num_experts_per_tok"),
        d_ff=need(config, "intermediate_size"),
        scores="chosen",
        router_bias=True,
        bias=True,
        glu=(float(config.get("swiglu_alpha", 1.702)), float(config.get("swiglu_limit", 7.0))),
        aux_loss_coef=aux(config),
    )
    own = {"windows": windows_of({**config, "layer_types": kinds}, layers), "sinks": True}
    return base(config, experts, 1e-5, 150_000.0, attention_bias=bias, output_bias=bias, **own)


def gpt_oss_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of a gpt-oss."""
    e = arch.experts
    assert e is not None and e.glu is not None
    return base_config(arch, "GptOss") | {
        "num_local_experts": e.count,
        "swiglu_alpha": e.glu[0],
        "swiglu_limit": e.glu[1],
        "layer_types": [SLIDING if window else FULL for window in arch.windows or (0,) * arch.num_layers],
        "sliding_window": max(arch.windows, default=128),
    }
