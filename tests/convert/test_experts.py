"""Checkpoints of families with experts as published: MXFP4 weights, layers for further tokens, configs."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs.errors import UsageError
from convert.hf import write_folder
from convert.load import load_params, resolve
from convert.mxfp4 import VALUES
from model.architecture import Experts, Latent
from model.families import architecture_from_hf
from model.lora import target_paths
from model.transformer import declare
from model.tree import flatten
from tests.golden import families


def folder_of(path, name, tensors=None, **changes):
    """A tiny model of the goldens as a folder."""
    config = {**families.CONFIGS[name], **changes}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(families.tensors(config) if tensors is None else tensors, path / "model.safetensors")
    return path


def test_packed_experts_are_read_as_what_they_stand_for(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 32}
    config = {**families.CONFIGS["gpt_oss"], **sizes}
    tensors, rng, plain = families.tensors(config), np.random.default_rng(0), {}
    for name in [name for name in tensors if name.endswith("experts.gate_up_proj") or name.endswith("down_proj")]:
        E, inputs, outputs = tensors.pop(name).shape
        codes = rng.integers(0, 16, (E, outputs, inputs // 32, 32), np.uint8)
        scales = rng.integers(120, 131, (E, outputs, inputs // 32), np.uint8)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = codes[..., ::2] | codes[..., 1::2] << 4, scales
        numbers = VALUES[codes] * 2.0 ** (scales.astype(np.float64)[..., None] - 127)
        plain[name] = numbers.reshape(E, outputs, inputs).swapaxes(1, 2)
    path = folder_of(tmp_path / "packed", "gpt_oss", tensors, **sizes, quantization_config={"quant_method": "mxfp4"})
    source = resolve(str(path))
    params = load_params(source, dtype=np.float32)
    write_folder(tmp_path / "out", params, source.arch, config=source.config)
    out = load_file(tmp_path / "out/model.safetensors")
    for name, values in plain.items():
        np.testing.assert_array_equal(out[name], values, name)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    with pytest.raises(UsageError, match="quantization_config"):
        architecture_from_hf({**config, "quantization_config": {"quant_method": "fp8"}})
    del tensors[next(name for name in tensors if name.endswith("_scales"))]
    with pytest.raises(UsageError, match=r"_blocks U8 .* lacks its .*_scales"):
        load_params(resolve(str(folder_of(tmp_path / "half", "gpt_oss", tensors, **sizes))))


def test_a_layer_for_further_tokens_is_left_out_and_said(tmp_path, capfd):
    tensors = families.tensors(families.CONFIGS["deepseek_v3"])
    more = {"model.layers.4.eh_proj.weight": np.ones((2, 2), np.float32)}
    path = folder_of(tmp_path / "in", "deepseek_v3", tensors | more, num_nextn_predict_layers=1)
    source = resolve(str(path))
    params = load_params(source, dtype="bfloat16")
    assert "further tokens is left out (1 tensors)" in capfd.readouterr().err
    # what experts are chosen by stays as exact as it was
    kinds = {path: leaf.dtype.name for path, leaf in flatten(params).items()}
    assert {path for path, kind in kinds.items() if kind != "bfloat16"} == {"layers/mlp/correction"}
    write_folder(tmp_path / "out", params, source.arch, config=source.config)
    assert json.loads((tmp_path / "out/config.json").read_text())["num_nextn_predict_layers"] == 0


def test_adapters_go_to_linear_layers_and_not_to_experts():
    paths = list(declare(architecture_from_hf(families.CONFIGS["deepseek_v3"])))
    chosen = target_paths(paths, "all-linear")
    assert {path for path in chosen if path.startswith("layers/")} == {
        *(f"layers/attn/{name}/weight" for name in ("q_a", "q_b", "kv_a", "kv_b", "o")),
        *(f"layers/mlp/shared/{name}/weight" for name in ("gate", "up", "down")),
    }
    assert "dense_layers/mlp/gate/weight" in target_paths(paths, ["gate_proj"])
    with pytest.raises(UsageError, match=r"'\*experts\*' are weights of experts, which take no adapters"):
        target_paths(paths, ["*experts*"])


# The fields of published config.json files that say what the model is.
MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768,
    "num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-05, "rope_theta": 1e6, "sliding_window": None,
    "hidden_act": "silu", "output_router_logits": False, "router_aux_loss_coef": 0.02, "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "max_window_layers": 48, "sliding_window": None, "use_sliding_window": False,
    "rope_scaling": None, "rope_theta": 1e6, "rms_norm_eps": 1e-06, "max_position_embeddings": 40960,
    "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False, "router_aux_loss_coef": 0.001,
}  # fmt: skip
DEEPSEEK = {
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
    "n_shared_experts": 1, "n_routed_experts": 256, "ep_size": 1, "routed_scaling_factor": 2.5, "kv_lora_rank": 512,
    "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "topk_method": "noaux_tc",
    "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "moe_layer_freq": 1, "first_k_dense_replace": 3,
    "norm_topk_prob": True, "scoring_func": "sigmoid", "aux_loss_alpha": 0.001, "seq_aux": True, "hidden_act": "silu",
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-06, "rope_theta": 10000, "num_nextn_predict_layers": 1,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
}  # fmt: skip


def test_published_configs():
    mixtral = architecture_from_hf(MIXTRAL)
    assert (mixtral.experts, mixtral.windows, mixtral.rope.theta) == (Experts(8, 2, 14336), (), 1e6)
    assert architecture_from_hf({**MIXTRAL, "output_router_logits": True}).experts == Experts(
        8, 2, 14336, aux_loss_coef=0.02
    )
    qwen = architecture_from_hf(QWEN3)
    assert (qwen.experts, qwen.qk_norm, qwen.head_dim) == (Experts(128, 8, 768), True, 128)
    deepseek = architecture_from_hf(DEEPSEEK)
    assert (deepseek.latent, deepseek.dense_layers, deepseek.head_dim) == (Latent(512, 64, 128, 1536), 3, 192)
    assert deepseek.rope.attention_factor == 1
    assert deepseek.attention_multiplier == pytest.approx(192**-0.5 * (0.1 * np.log(40) + 1) ** 2)
    count = sum(int(np.prod(d.shape)) for d in declare(deepseek).values())
    assert count == 671_026_419_200  # 671 B, as published, without the layer for further tokens


@pytest.mark.parametrize(
    ("config", "change", "says"),
    [
        (MIXTRAL, {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
        (MIXTRAL, {"num_experts_per_tok": 9}, "9 experts for each token of 8 candidates"),
        (QWEN3, {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        (QWEN3, {"mlp_only_layers": [3]}, r"mlp_only_layers = \[3\]"),
        (QWEN3, {"use_sliding_window": True}, "use_sliding_window = True"),
        (DEEPSEEK, {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        (DEEPSEEK, {"num_key_value_heads": 8}, "num_key_value_heads = 8 is not supported with latent attention"),
        (DEEPSEEK, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
)
def test_what_would_change_the_maths_is_refused(config, change, says):
    with pytest.raises(ValueError, match=says):
        architecture_from_hf({**config, **change})
