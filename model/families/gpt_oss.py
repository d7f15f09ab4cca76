"""gpt-oss's config.json."""

from typing import Any

from model.architecture import Architecture, Experts
from model.families.fields import common, layer_types, need, refuse, windows_of, written
from model.families.moe import aux, router_config

MXFP4 = "mxfp4"  # a quantisation that convert/mxfp4.py reads
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def gpt_oss(config: dict[str, Any]) -> Architecture:
    """gpt-oss (transformers modeling_gpt_oss.py): attention sinks, windows in turn, a clipped SwiGLU, biases."""
    if (config.get("quantization_config") or {}).get("quant_method") != MXFP4:
        refuse(config, {"quantization_config": None})
    refuse(config, {"attention_dropout": 0.0})
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    read = common(
        config, "gpt_oss", eps=("rms_norm_eps", 1e-5), context=131_072, theta=150_000.0, head_dim=64,
        scaling=new or old or YARN,
    )  # fmt: skip
    bias = bool(config.get("attention_bias", True))
    experts = Experts(
        count=need(config, "num_local_experts"),
        top_k=need(config, "num_experts_per_tok"),
        d_ff=read["d_ff"],
        scores="chosen",
        router_bias=True,
        bias=True,
        glu=(float(config.get("swiglu_alpha", 1.702)), float(config.get("swiglu_limit", 7.0))),
        aux_loss_coef=aux(config),
    )
    windows = windows_of(config, [i % 2 == 0 for i in range(read["num_layers"])], 128)
    return Architecture(**read, experts=experts, attention_bias=bias, output_bias=bias, windows=windows, sinks=True)


def gpt_oss_config(arch: Architecture) -> dict[str, Any]:
    """The config.json of a gpt-oss."""
    e = arch.experts
    assert e is not None
    assert e.glu is not None
    fields = {
        "num_local_experts": e.count,
        "swiglu_alpha": e.glu[0],
        "swiglu_limit": e.glu[1],
        "layer_types": layer_types(arch),
        "sliding_window": max(arch.windows, default=128),
    }
    return written(arch, "GptOss", **router_config(arch), **fields)
