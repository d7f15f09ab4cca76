"""Conversion against transformers and peft: the folders we write, tensor for tensor, id for id."""

import json

import numpy as np
import pytest

from convert.adapter import read_adapter, write_adapter
from convert.hf import write_folder
from convert.load import load_params, load_tokenizer, resolve
from convert.tables import rows
from model.families import hf_config_from

pytestmark = pytest.mark.parity

TEXTS = [
    "Hello, world!",
    "  leading and   inner spaces  ",
    "def f(x):\n\treturn x ** 2  # square\n\n\n",
    "naïve café — “quotes” … ℃",
    "你好，世界。こんにちは 안녕하세요",
    "🎉👩‍👩‍👧 emoji",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
    "I'll we've THEY'RE don't",
    "x=3.14159; y=1,000,000 in 2024",
    "",
    " ",
    "\n",
    "a\u00a0b\u200bc",
]
CHATS = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
    ],
    [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}],
]


@pytest.fixture(scope="module")
def real():
    return resolve("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def exported(real, tmp_path_factory):
    """The GGUF as the folder we write."""
    folder = tmp_path_factory.mktemp("export") / "smollm2"
    write_folder(folder, load_params(real), real.arch, config=real.config, generation_config=real.generation_config,
                 tokenizer=load_tokenizer(real), max_shard_bytes=300_000_000)  # fmt: skip
    return folder


def test_weights_are_those_of_transformers_own_gguf_loading(real, exported):
    import torch
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(real.path.parent, gguf_file=real.path.name, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(exported)
    assert ours.dtype == torch.float32
    left, right = ours.state_dict(), theirs.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
    for key in ("vocab_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "rope_parameters",
                "max_position_embeddings", "tie_word_embeddings", "eos_token_id", "bos_token_id"):  # fmt: skip
        assert getattr(ours.config, key) == getattr(theirs.config, key), key
    assert ours.config.rms_norm_eps == pytest.approx(theirs.config.rms_norm_eps, rel=1e-6)
    assert ours.generation_config.eos_token_id == 2


def test_tokenizer_and_template(real, exported):
    from transformers import AutoTokenizer

    gguf = AutoTokenizer.from_pretrained(real.path.parent, gguf_file=real.path.name)
    folder = AutoTokenizer.from_pretrained(exported)
    ours = load_tokenizer(real)
    for text in TEXTS:
        assert ours.encode(text, special=True) == folder(text)["input_ids"] == gguf(text)["input_ids"], text
        assert ours.decode(ours.encode(text)) == text
    for digits in ("a  2 b   33", "a ½"):  # here transformers' GGUF route loses the model's digit split
        assert ours.encode(digits) == folder(digits)["input_ids"] != gguf(digits)["input_ids"]
    assert (len(folder), folder.bos_token_id, folder.eos_token_id, folder.pad_token_id) == (49152, 1, 2, 2)
    for chat in CHATS:
        for prompt in (False, True):
            expected = folder.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            assert ours.render(chat, add_generation_prompt=prompt) == expected
            assert gguf.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt) == expected


TINY = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
VARIANTS = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_folders_go_both_ways(tmp_path, variant, dtype):
    """transformers saves, we load and write, transformers loads: the same weights, the same config."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY, **VARIANTS[variant])).to(getattr(torch, dtype))
    with torch.no_grad():
        for value in model.parameters():
            value.normal_()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    source = resolve(tmp_path / "theirs")
    params = load_params(source)
    table = {row.ours: row for row in rows(source.arch)}
    flat = model.state_dict()
    for path, row in table.items():
        node = params
        for key in path.split("/"):
            node = node[key]
        for layer, name in enumerate(row.names(source.arch)):
            mine = np.asarray(node)[layer] if row.stacked else np.asarray(node)
            back = row.to_theirs(mine, source.arch).astype(np.float32)
            np.testing.assert_array_equal(back, flat[name].float().numpy(), err_msg=name)
    for name, config in {"kept": source.config, "made": hf_config_from(source.arch)}.items():
        write_folder(tmp_path / name, params, source.arch, config=config, max_shard_bytes=15_000)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert again.dtype == getattr(torch, dtype)
        assert again.config.rope_parameters == model.config.rope_parameters
        for key, value in again.state_dict().items():
            assert torch.equal(value, flat[key]), key


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_go_both_ways(tmp_path, rslora):
    """peft saves, we read and write, peft loads: the same logits, bit for bit."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**TINY))
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM",
                        use_rslora=rslora)  # fmt: skip
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.normal_(std=0.1)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "theirs")
    tokens = torch.randint(0, 48, (2, 9))
    with torch.no_grad():
        expected = model(tokens).logits

    source = resolve(tmp_path / "theirs")
    adapter = read_adapter(source.path, source.arch)
    assert sorted(adapter) == ["layers/attn/o/weight", "layers/attn/q/weight", "layers/mlp/down/weight"]
    write_adapter(tmp_path / "ours", adapter, source.arch, base=str(tmp_path / "base"), lora_alpha=6, use_rslora=rslora)
    fresh = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, expected)
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(tmp_path / "base")
