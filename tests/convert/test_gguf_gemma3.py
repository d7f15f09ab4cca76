"""Gemma 3's GGUF files: written as llama.cpp writes them, and read back to Hugging Face's numbers and config."""

import numpy as np
import pytest
from gguf import GGUFWriter

from configs.errors import UsageError
from convert.gguf import open_gguf
from convert.gguf_families import tensors_of
from convert.hf import write_folder
from convert.load import load_params, resolve
from model.families import architecture_from_hf
from model.tree import flatten
from tests.golden.families import CONFIGS, tensors

# llama.cpp's names, as its documentation gives them
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
CONFIG = {
    **CONFIGS["gemma3"],
    "num_hidden_layers": 7,
    "query_pre_attn_scalar": 16,
    "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "initializer_range": 0.02,
}


def gguf_name(name):
    if not name.startswith("model.layers."):
        return NAMES[name.removesuffix(".weight")] + ".weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


@pytest.fixture
def write(tmp_path):
    """write(change, without) -> (path, Hugging Face tensors)."""

    def make(change=lambda writer: None, without=(), layers=7):
        config = {**CONFIG, "num_hidden_layers": layers, "layer_types": None}
        path, writer = tmp_path / "tiny.gguf", GGUFWriter(tmp_path / "tiny.gguf", "gemma3")
        sizes = {
            "context_length": 128, "embedding_length": 24, "block_count": layers, "feed_forward_length": 40,
            "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16,
            "attention.value_length": 16, "attention.sliding_window": 5,
        }  # fmt: skip
        for key in sizes.keys() - set(without):
            writer.add_uint32(f"gemma3.{key}", sizes[key])
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(1_000_000.0)
        writer.add_string("gemma3.rope.scaling.type", "linear")
        writer.add_float32("gemma3.rope.scaling.factor", 8.0)
        change(writer)
        hf = tensors(config)
        # norms like a bfloat16 model's: adding 1 in float32 loses nothing of them (but the sign of -0)
        hf = {k: (np.round(v * 64) / 64 + 0.0 if "norm" in k else v).astype(np.float32) for k, v in hf.items()}
        for name, value in hf.items():
            writer.add_tensor(gguf_name(name), value + np.float32(1) if "norm" in name else value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path, hf

    return make


def test_config_and_tensors(write):
    path, hf = write()
    assert resolve(path).arch == architecture_from_hf(CONFIG)
    found = tensors_of(open_gguf(path))
    assert found.keys() == hf.keys()
    for name, value in hf.items():
        np.testing.assert_array_equal(found[name].read(), value, err_msg=name)


def test_export_is_bit_exact(write, tmp_path):
    """GGUF -> our tree -> a Hugging Face folder -> our tree, and its tensors by an independent reader."""
    from safetensors.numpy import load_file

    path, hf = write()
    source = resolve(path)
    params = load_params(source)
    write_folder(tmp_path / "out", params, source.arch, config=source.config)
    back = resolve(tmp_path / "out")
    assert back.arch == source.arch
    again = flatten(load_params(back))
    for name, value in flatten(params).items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
    (stored,) = (load_file(file) for file in (tmp_path / "out").glob("*.safetensors"))
    assert stored.keys() == hf.keys()
    for name, value in hf.items():
        assert stored[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.add_float32("gemma3.final_logit_softcapping", 30.0), r"maths: gemma3\.final_logit_softcapping"),
        (lambda w: w.add_float32("gemma3.attn_logit_softcapping", 50.0), r"maths: gemma3\.attn_logit_softcapping"),
        (lambda w: w.add_bool("gemma3.attention.causal", True), r"maths: gemma3\.attention\.causal"),
        (lambda w: w.add_uint32("gemma3.attention.sliding_window_pattern", 2), r"gemma3\.attention\.sliding_window_pa"),
        (lambda w: w.add_rope_dimension_count(8), r"gemma3\.rope\.dimension_count is 8"),
    ],
)
def test_what_would_change_the_maths_is_refused(write, change, says):
    with pytest.raises(UsageError, match=says):
        resolve(write(change)[0])


def test_a_missing_window_is_refused(write):
    with pytest.raises(UsageError, match=r"gemma3\.attention\.sliding_window is missing"):
        resolve(write(without=["attention.sliding_window"])[0])


def test_what_llama_cpp_knows_by_the_number_of_layers(write):
    arch = resolve(write(layers=62)[0]).arch
    assert arch.query_pre_attn_scalar == 24 / 4
    assert [i for i, window in enumerate(arch.windows) if not window] == list(range(5, 62, 6))
    swa = resolve(write(lambda w: w.add_float32("gemma3.rope.freq_base_swa", 20_000.0))[0]).arch
    assert swa.local_rope is not None
    assert swa.local_rope.theta == 20_000.0
