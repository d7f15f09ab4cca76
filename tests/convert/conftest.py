"""Tiny models written to disk, and the real one."""

import json
from pathlib import Path

import ml_dtypes  # noqa: F401  (numpy learns the name bfloat16)
import numpy as np
import pytest
from safetensors.numpy import save_file

from configs.errors import RunError
from convert.tables import rows
from model.families import architecture_from_hf

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def make_tensors(config, dtype="float32", seed=0):
    """Random tensors under Hugging Face's names."""
    arch, rng = architecture_from_hf(config), np.random.default_rng(seed)
    return {
        name: rng.standard_normal(row.their_shape(arch)).astype(dtype) for row in rows(arch) for name in row.names(arch)
    }


@pytest.fixture
def tiny_tensors():
    return make_tensors


@pytest.fixture
def tiny(tmp_path):
    """make(name, dtype, tensors, **config) -> (folder, tensors): a Hugging Face folder without a tokenizer."""

    def make(name="tiny", dtype="float32", tensors=None, drop=(), add=None, **config) -> tuple[Path, dict]:
        folder, config = tmp_path / name, TINY | config
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        tensors = {**(tensors or make_tensors(config, dtype)), **(add or {})}
        tensors = {k: v for k, v in tensors.items() if k not in drop}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder, tensors

    return make


@pytest.fixture(scope="session")
def smollm2():
    """The real small model, fetched once into the user's cache."""
    from convert.load import resolve

    try:
        return resolve("smollm2-135m-instruct")
    except RunError as error:
        pytest.skip(str(error))
