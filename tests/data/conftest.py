"""Small tokenizers made on the spot, with the special tokens and templates of the families that matter."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from data.tokenizer import Tokenizer, wrap_fast

TEMPLATES = Path(__file__).parent / "templates"
CORPUS = [
    "the quick brown fox jumps over the lazy dog. Hello world! What is your name?\n\nuser assistant system model",
    "I am Kiln, a small helper. 1 + 1 = 2. Ja, natürlich.  Two  spaces\tand a tab. <think> </think> ### end",
    "你好，世界。我是一个助手。 Tools: arguments name tool_call tool_response",
] * 4
# template -> (bos, eos, special tokens, plain added tokens, eos ids of the generation config by token)
FAMILIES = {
    "chatml": ("<|im_start|>", "<|im_end|>", [], [], []),
    "llama3": ("<|begin|>", "<|end_of_text|>", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], [], []),
    "gemma": ("<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"], [], ["<eos>", "<end_of_turn>"]),
    "mistral": ("<s>", "</s>", ["[INST]", "[/INST]"], [], []),
    "qwen3": ("<|im_start|>", "<|im_end|>", [], ["<think>", "</think>", "<tool_call>", "</tool_call>"], []),
    "r1": ("<bos>", "<eos>", ["<|User|>", "<|Assistant|>"], ["<think>", "</think>"], []),
    "glm": ("[gMASK]", "<|endoftext|>", ["<|user|>", "<|assistant|>", "<|system|>"], [], ["<|user|>"]),
    "plain": ("<s>", "</s>", [], [], []),
}
FAMILY_OF = {
    "default_system": "chatml",
    "marked": "chatml",
    "marked_short": "chatml",
    "marked_long": "chatml",
    "no_prompt": "chatml",
    "strict_tools": "qwen3",
}


def build_backend(special: list[str], added: list[str], trim: bool = True) -> Backend:
    """A byte-level BPE of 256 bytes and some merges, like GPT-2's; trimming offsets as many published files do."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(added)
    return backend


def build_tokenizer(template: str | None, family: str | None = None) -> Tokenizer:
    """A tokenizer with one of the templates beside this file, and its family's special tokens."""
    bos, eos, special, added, stops = FAMILIES[family or FAMILY_OF.get(template or "", template or "chatml")]
    backend = build_backend([bos, eos, "<pad>", *special], added)
    config = {"bos_token": bos, "eos_token": eos, "pad_token": "<pad>"}
    if template is not None:
        config["chat_template"] = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8").rstrip("\n")
    generation = {"eos_token_id": [backend.token_to_id(token) for token in stops]} if stops else None
    return wrap_fast(backend, config, generation)


@pytest.fixture(scope="session")
def tokenizer_with():
    """tokenizer_with('llama3') -> a tokenizer with that template; made once."""
    made: dict = {}

    def get(template: str | None, family: str | None = None) -> Tokenizer:
        if (template, family) not in made:
            made[template, family] = build_tokenizer(template, family)
        return made[template, family]

    return get


@pytest.fixture
def backend():
    return build_backend(["<s>", "</s>", "<pad>"], [])


@pytest.fixture
def settings():
    """settings(max_length=32, ...) -> what the data section of a recipe holds."""
    from configs.schema import Data

    def make(**changes) -> SimpleNamespace | Data:
        return Data(**{"train": ("rows.jsonl",), "prefetch": 0, **changes})

    return make
