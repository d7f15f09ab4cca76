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
