"""Every family against transformers, live: every number of every gradient, what it reads of ours, random configs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.hf import write_folder
from convert.load import load_params, resolve
from model.families import architecture_from_hf, hf_config_from
from tests.golden import families
from tests.golden.families import CONFIGS, FULL, LOCAL

pytestmark = pytest.mark.parity

TOLERANCES = [("float64", 1e-9), ("float32", 1e-5)]


@pytest.fixture(scope="module")
def oracle():
    import torch

    from tests.golden import make_families

    torch.set_num_threads(1)
    return make_families


def worst(oracle, config, dtype):
    """(what differs most, by how much)."""
    want = oracle.theirs(config)
    with jax.enable_x64(dtype == "float64"):
        far = families.apart(*families.ours(config, jnp.dtype(dtype), "chunked"), *want)
    gradient = max(value for name, value in far.items() if name not in ("logits", "loss"))
    print(
        f"{config['model_type']} {dtype}: logits {far['logits']:.1e}, loss {far['loss']:.1e}, gradient {gradient:.1e}"
    )
    return max(far.items(), key=lambda item: item[1])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_logits_loss_and_every_gradient(oracle, name, dtype, tolerance):
    what, far = worst(oracle, CONFIGS[name], dtype)
    assert far < tolerance, what


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_what_we_write(oracle, name, tmp_path):
    """Their folder read and written: the same bytes under the same names, and in transformers the same logits; so also
    with a config.json made from nothing but the Architecture."""
    import torch
    from safetensors.numpy import load_file

    config = CONFIGS[name]
    source = resolve(str(oracle.write(tmp_path / "theirs", config)))
    params = load_params(source)
    write_folder(tmp_path / "kept", params, source.arch, config=source.config)
    write_folder(tmp_path / "made", params, source.arch, config=hf_config_from(source.arch, pad_token_id=0))
    kept = json.loads((tmp_path / "kept/config.json").read_text())
    assert {key: kept[key] for key in config} == config
    weights = families.tensors(config)
    outs = {}
    for folder in ("theirs", "kept", "made"):
        found = load_file(tmp_path / folder / "model.safetensors")
        assert {key: value.tobytes() for key, value in found.items()} == {k: v.tobytes() for k, v in weights.items()}
        model = oracle.load(tmp_path / folder, torch.float32)
        assert architecture_from_hf(model.config.to_dict()) == source.arch, folder
        with torch.no_grad():
            outs[folder] = oracle.ask(model).numpy()
    np.testing.assert_array_equal(outs["kept"], outs["theirs"])
    real = families.batch()["segments"] > 0 if outs["made"].ndim == 3 else slice(None)
    np.testing.assert_allclose(outs["made"][real], outs["theirs"][real], atol=1e-5)
    ours, _, _ = families.ours(config, jnp.float32)
    np.testing.assert_allclose(ours[real], outs["theirs"][real], atol=1e-5)


def varied(config, rng):
    """The config with other sizes and switches, as many as it has."""
    kv = int(rng.choice([1, 2, 3]))
    heads, layers = kv * int(rng.choice([1, 2])), int(rng.choice([2, 3, 5]))
    size = int(rng.choice([8, 16]))
    change = {
        "num_key_value_heads": kv, "num_attention_heads": heads, "num_hidden_layers": layers,
        "intermediate_size": int(rng.choice([16, 33])), "hidden_size": heads * size, "head_dim": 2 * size,
        "no_rope_layers": rng.integers(0, 2, layers).tolist(),
        "tie_word_embeddings": bool(rng.choice([True, False])), "attention_bias": bool(rng.choice([True, False])),
        "mlp_bias": bool(rng.choice([True, False])), "sliding_window": int(rng.choice([1, 3, 30])),
        "layer_types": [str(rng.choice([LOCAL, FULL])) for _ in range(layers)], "query_pre_attn_scalar": 7,
        "rms_norm_eps": 1e-3,
    }  # fmt: skip
    return {**config, **{key: value for key, value in change.items() if key in config}}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["llama3", "gemma3", "gemma2", "smollm3", "olmo3", "gpt_neox", "granite"])
def test_random_configs(oracle, name, seed):
    what, far = worst(oracle, varied(CONFIGS[name], np.random.default_rng(seed)), "float64")
    assert far < 1e-9, what
