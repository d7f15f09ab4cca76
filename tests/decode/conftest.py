"""A tiny random model with a byte-level tokenizer, in memory and as a folder; and the real one."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from configs.errors import RunError
from data.tokenizer import wrap_fast
from decode.load import Model, load_model
from model.architecture import Architecture
from model.compute import Compute
from model.families import hf_config_from
from model.transformer import init

ARCH = Architecture(300, 32, 2, 4, 2, 8, 48, 128)
EOS = 257
TEMPLATE = (
    "{% for m in messages %}<|s|>{{ m['role'] }}\n{{ m['content'] }}<|e|>{% endfor %}"
    "{% if add_generation_prompt %}<|s|>assistant\n{% endif %}"
)


def make_tokenizer():
    """Bytes, and two special tokens."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|s|>", "<|e|>"])
    return wrap_fast(backend, {"eos_token": "<|e|>", "chat_template": TEMPLATE})


@pytest.fixture(scope="session")
def tiny():
    """Weights large enough that the argmax moves about."""
    arch = replace(ARCH, init_std=0.25)
    params = jax.jit(lambda key: init(arch, key))(jax.random.key(0))
    tokenizer = make_tokenizer()
    assert tokenizer.eos_ids == (EOS,)
    return Model(ARCH, Compute(attention="reference"), params, tokenizer, tokenizer.eos_ids)


@pytest.fixture(scope="session")
def tiny_folder(tiny, tmp_path_factory):
    """The same as a Hugging Face folder."""
    from convert.hf import write_folder

    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = hf_config_from(ARCH, eos_token_id=EOS)
    write_folder(folder, tiny.params, ARCH, config=config, tokenizer=tiny.tokenizer)
    return folder


@pytest.fixture(scope="session")
def rows():
    """Uneven prompts of one length bucket: compiles are what takes time here."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, n).tolist() for n in (5, 13, 6, 16)]


@pytest.fixture(scope="session")
def smollm2():
    """The real small model in float32."""
    try:
        return load_model("smollm2-135m-instruct", dtype="float32")
    except RunError as error:
        pytest.skip(str(error))
