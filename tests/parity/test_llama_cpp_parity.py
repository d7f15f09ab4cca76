"""GGUF files that we write, run by llama.cpp itself: the same ids of texts, the same chats, the same greedy tokens."""

import json
import urllib.request

import pytest

from convert.conversion import convert
from convert.gguf_write import convert_to_gguf
from convert.load import resolve
from decode.generate import Sampling, generate
from decode.load import load_model
from tests.parity.test_convert_parity import CHATS, TEXTS

pytestmark = pytest.mark.parity

NEW = 12
PROMPTS = ["The capital of France is", "def fibonacci(n):\n"]


@pytest.fixture
def serve():
    """serve(file) -> ask(what, **json): llama.cpp's server in this process, float32 throughout."""
    llama = pytest.importorskip("xllamacpp")
    servers = []

    def start(path):
        params = llama.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(path), 256, 1, False
        params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        server = llama.Server(params)
        servers.append(server)

        def ask(what, **body):
            data = json.dumps(body).encode()
            kind = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{server.listening_address}/{what}", data, kind)
            with urllib.request.urlopen(request, timeout=300) as answer:
                return json.loads(answer.read())

        return ask

    yield start
    servers.clear()


def compare_tokens(ask, model, texts=TEXTS):
    for text in texts:
        told = ask("tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        assert told == model.tokenizer.encode(text, special=True), text


def compare_greedy(ask, model):
    for prompt in PROMPTS:
        ids = model.tokenizer.encode(prompt, special=True)
        (ours,) = generate(model, [ids], Sampling(NEW, ignore_eos=True))
        told = ask(
            "completion", prompt=ids, n_predict=NEW, temperature=0.0, samplers=["top_k"], top_k=1, return_tokens=True,
            ignore_eos=True, cache_prompt=False,
        )  # fmt: skip
        assert told["tokens"] == ours.tokens, (prompt, told["content"], ours.text)


def test_smollm2(serve, tmp_path):
    source, model = resolve("smollm2-135m-instruct"), load_model("smollm2-135m-instruct", dtype="float32")
    convert_to_gguf(source, tmp_path / "m.gguf", dtype="float32")
    ask = serve(tmp_path / "m.gguf")
    compare_tokens(ask, model)
    for chat in (chat for chat in CHATS if chat[-1]["role"] == "user"):  # llama.cpp goes on with an assistant's turn
        told = ask("apply-template", messages=chat)["prompt"]
        assert told == model.tokenizer.render(chat, add_generation_prompt=True)
    compare_greedy(ask, model)


def test_gemma3_by_way_of_a_folder(serve, tmp_path):
    """GGUF -> Hugging Face's folder -> GGUF: merges, spaces, BOS and norms have gone both ways."""
    convert(resolve("gemma3-270m"), tmp_path / "folder", dtype="float32")
    model = load_model(str(tmp_path / "folder"), dtype="float32")
    convert_to_gguf(resolve(tmp_path / "folder"), tmp_path / "m.gguf", dtype="float32")
    ask = serve(tmp_path / "m.gguf")
    compare_tokens(ask, model)
    compare_greedy(ask, model)


TINY = {
    "vocab_size": 270, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
FAMILIES = {
    "llama": {"rope_theta": 1e4},
    "llama3": {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": LLAMA3},
    "linear": {"model_type": "llama", "rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "qwen2": {"head_dim": 16, "rope_theta": 1e6, "use_sliding_window": False},
    "qwen3": {"rope_theta": 1e6},
    "mistral": {"rope_theta": 1e6, "sliding_window": None},
    "gemma3_text": {
        "num_hidden_layers": 7, "sliding_window": 8, "query_pre_attn_scalar": 32, "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_of_every_family(serve, tmp_path, family):
    """Random weights, norms and biases off their defaults: greedy tokens, and the log-prob of each."""
    import numpy as np
    from safetensors.numpy import save_file

    from tests.convert.conftest import make_tensors
    from tests.convert.test_gguf_write import bytes_tokenizer

    config = {"model_type": family, "hidden_act": "silu", **TINY, **FAMILIES[family]}
    drawn = make_tensors(config)
    small = {
        k: (v * 0.1 + ("gemma" not in family) if "norm" in k else v * 0.15).astype(np.float32) for k, v in drawn.items()
    }
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(small, folder / "model.safetensors")
    bytes_tokenizer(folder, digits=False)
    convert_to_gguf(resolve(folder), tmp_path / "m.gguf", verify=True)
    ask, model = serve(tmp_path / "m.gguf"), load_model(str(folder), dtype="float32")
    ids = model.tokenizer.encode("Hello, this is a text of some length to look back at.", special=True)
    (ours,) = generate(model, [ids], Sampling(NEW, ignore_eos=True))
    told = ask(
        "completion", prompt=ids, n_predict=NEW, temperature=0.0, samplers=["top_k"], top_k=1, return_tokens=True,
        ignore_eos=True, cache_prompt=False, n_probs=1,
    )  # fmt: skip
    assert told["tokens"] == ours.tokens
    if "gemma" in family:
        return  # ggml looks GELU up in a table of float16: log-probs are 7e-4 apart for that
    pairs, at = [], 0
    for step in told["completion_probabilities"]:  # tokens that end within a character are not told of
        at = ours.tokens.index(step["id"], at)
        pairs.append((step["logprob"], ours.logprobs[at]))
        at += 1
    assert len(pairs) >= NEW // 2
    np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=0, atol=2e-5)
