"""Reward models as Hugging Face folders: the head is read and written; config.json says what it is."""

import jax
import numpy as np
import pytest

from configs.errors import UsageError
from convert.hf import write_folder
from convert.load import load_params, resolve
from model.architecture import Architecture
from model.families import architecture_from_hf, hf_config_from
from model.transformer import init
from model.tree import flatten

SIZES = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 24,
}  # fmt: skip


@pytest.mark.parametrize(("labels", "tokens", "tied"), [(1, False, True), (3, False, False), (2, True, True)])
def test_there_and_back(tmp_path, labels, tokens, tied):
    arch = Architecture(96, 16, 2, 4, 2, 4, 24, 64, tie_embeddings=tied, num_labels=labels, token_labels=tokens)
    params = init(arch, jax.random.key(0))
    assert ("head" in params, "bias" in params["score"]) == (False, tokens)
    language = hf_config_from(Architecture(96, 16, 2, 4, 2, 4, 24, 64, tie_embeddings=tied))
    write_folder(tmp_path / "m", params, arch, config=language)  # trained from a language model
    source = resolve(tmp_path / "m")
    assert source.arch == arch
    ends = "ForTokenClassification" if tokens else "ForSequenceClassification"
    assert source.config["architectures"] == [f"Llama{ends}"]
    assert len(source.config["id2label"]) == labels
    expected = flatten(params)
    for path, x in flatten(load_params(source)).items():
        np.testing.assert_array_equal(x, expected[path], err_msg=path)


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ({"architectures": ["LlamaForCausalLM"], "id2label": {"0": "a"}}, 0),
        ({}, 0),
        ({"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a"}}, 1),
        ({"architectures": ["LlamaForSequenceClassification"]}, 2),
        ({"architectures": ["LlamaForTokenClassification"]}, 2),
    ],
)
def test_labels_are_counted_as_transformers_does(config, labels):
    arch = architecture_from_hf({**SIZES, **config})
    assert arch.num_labels == labels
    assert arch.token_labels == ("Token" in str(config))


def test_token_labels_are_two():
    config = {"architectures": ["LlamaForTokenClassification"], "id2label": {"0": "a", "1": "b", "2": "c"}}
    with pytest.raises(UsageError, match="has 3 labels; supported: 2"):
        architecture_from_hf({**SIZES, **config})
