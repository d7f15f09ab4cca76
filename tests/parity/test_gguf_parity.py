"""GGUF files and folders that `purestep convert` writes, as transformers reads them."""

import numpy as np
import pytest

from convert.conversion import convert
from convert.gguf_write import convert_to_gguf
from convert.load import load_tokenizer, resolve
from tests.parity.test_convert_parity import CHATS, TEXTS

pytestmark = pytest.mark.parity

TINY = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "rope_theta": 500_000.0,
}  # fmt: skip


def tokenizer(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.BPE({t: i for i, t in enumerate("abcdefgh")}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_transformers_reads_the_same_weights(tmp_path, dtype):
    """Its own reading of GGUF turns q and k back; q8_0 must be what the gguf package dequantises."""
    import torch
    from gguf import GGMLQuantizationType, dequantize, quantize
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    model.save_pretrained(tmp_path / "theirs")
    tokenizer(tmp_path / "theirs")
    convert_to_gguf(resolve(tmp_path / "theirs"), tmp_path / "m.gguf", dtype=dtype, verify=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    assert again.config.rope_parameters["rope_theta"] == 500_000.0

    def through(name, value):
        if value.ndim < 2:
            return value
        if dtype != "q8_0":
            return value.to(getattr(torch, dtype)).float()
        kind = GGMLQuantizationType.Q8_0  # rows are quantised apart: their order changes nothing
        return torch.from_numpy(dequantize(quantize(value.numpy(), kind), kind).reshape(value.shape))

    left, right = model.state_dict(), again.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(through(name, value), right[name]), name


@pytest.fixture(scope="module")
def real():
    return resolve("smollm2-135m-instruct")


def test_the_real_tokenizer_in_gguf_and_in_a_folder(real, tmp_path):
    """Ids and rendered chats of transformers on our folder, made from the file that we wrote, are our own."""
    from transformers import AutoTokenizer

    convert_to_gguf(real, tmp_path / "m.gguf", dtype="q8_0")
    convert(resolve(tmp_path / "m.gguf"), tmp_path / "folder", dtype="bfloat16")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "folder"), load_tokenizer(real)
    gguf = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    original = AutoTokenizer.from_pretrained(real.path.parent, gguf_file=real.path.name)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text, special=True), text
        assert gguf(text)["input_ids"] == original(text)["input_ids"], text
    for chat in CHATS:
        for prompt in (False, True):
            expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            assert ours.render(chat, add_generation_prompt=prompt) == expected
            assert gguf.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt) == expected


def test_a_converted_folder_gives_the_same_logits(tmp_path):
    """transformers -> convert -> transformers: bit for bit, in several files."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**TINY)).to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    convert(resolve(tmp_path / "theirs"), tmp_path / "ours", max_shard_bytes=50_000, verify=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 64, (2, 9)))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)
    assert again.dtype == torch.bfloat16
