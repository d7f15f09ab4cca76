"""Gemma 3 against transformers, live: a tiny model with every number of every gradient, and the real 270M."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.errors import RunError
from convert.load import load_params, load_tokenizer, resolve
from decode.generate import Sampling, generate
from decode.load import load_model
from decode.score import score
from model.families import architecture_from_hf, hf_config_from
from model.head import head_of, logits
from model.transformer import forward
from tests.golden.families import CONFIGS
from tests.parity.test_convert_parity import TEXTS
from tests.parity.test_families_parity import worst

pytestmark = pytest.mark.parity

CONFIG = CONFIGS["gemma3"]
LOCAL, FULL = "sliding_attention", "full_attention"
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
VARIANTS = {
    "windows": {},
    "biases, untied": {"attention_bias": True, "tie_word_embeddings": False},
    "one kv head": {"num_key_value_heads": 1, "query_pre_attn_scalar": 16},
    "no window": {"layer_types": [FULL] * 5},
    "windows only": {"layer_types": [LOCAL] * 5, "sliding_window": 2},
    "scaled windows": {
        "rope_parameters": {FULL: PLAIN, LOCAL: {"rope_type": "linear", "rope_theta": 1e2, "factor": 2.0}}
    },
}


@pytest.fixture(scope="module")
def oracle():
    from tests.golden import make_gemma3

    return make_gemma3


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-9)])
def test_tiny(variant, dtype, tolerance):
    from tests.golden import make_families

    what, far = worst(make_families, {**CONFIG, **VARIANTS[variant]}, dtype)
    assert far < tolerance, what


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_reads_our_config(variant):
    import transformers

    arch = architecture_from_hf({**CONFIG, **VARIANTS[variant]})
    written = hf_config_from(arch)
    theirs = transformers.Gemma3TextConfig(**{k: v for k, v in written.items() if k != "model_type"}).to_dict()
    assert architecture_from_hf(theirs) == arch
    # transformers 4's keys alone, as the published models have them
    old = {k: v for k, v in written.items() if k != "rope_parameters"}
    if variant != "scaled windows":  # which transformers 4 cannot say
        read = transformers.Gemma3TextConfig(**{k: v for k, v in old.items() if k != "model_type"}).to_dict()
        assert architecture_from_hf(old) == architecture_from_hf(read) == arch


@pytest.fixture(scope="module")
def source():
    try:
        return resolve("gemma3-270m")
    except RunError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def folder(oracle, source, tmp_path_factory):
    return oracle.export_real(tmp_path_factory.mktemp("export") / "gemma3")


@pytest.fixture(scope="module")
def theirs(folder):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_weights_and_tokenizer_are_those_of_transformers_own_gguf_loading(source, folder, theirs):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": source.path.parent, "gguf_file": source.path.name}
    gguf = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    left, right = theirs.state_dict(), gguf.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
    for key in ("vocab_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "layer_types", "sliding_window",
                "query_pre_attn_scalar", "hidden_activation", "rope_parameters", "max_position_embeddings",
                "tie_word_embeddings", "eos_token_id", "bos_token_id", "pad_token_id"):  # fmt: skip
        assert getattr(theirs.config, key) == getattr(gguf.config, key), key
    ours, written, read = (
        load_tokenizer(source),
        AutoTokenizer.from_pretrained(folder),
        AutoTokenizer.from_pretrained(**where),
    )
    for text in [*TEXTS, "<start_of_turn>user\nHi<end_of_turn>\n<bos>", "a  b   c\n\n\n\td", "<unused5><table>"]:
        assert ours.encode(text, special=True) == written(text)["input_ids"] == read(text)["input_ids"], text
        assert ours.decode(ours.encode(text)) == text


def test_a_folder_and_back_is_bit_exact(source, folder):
    from model.tree import flatten

    back = resolve(str(folder))
    assert back.arch == source.arch
    again = flatten(load_params(back))
    for name, value in flatten(load_params(source)).items():
        assert np.asarray(again[name]).tobytes() == np.asarray(value).tobytes(), name


LONG = "It was the best of times, it was the worst of times; 那是最好的年月，那是最坏的年月。\n" * 22


@pytest.fixture(scope="module")
def model(folder):
    return load_model(str(folder), dtype="float32")


@pytest.mark.parametrize(
    "text", ["The Nile is the longest river in Africa.", "for i in range(10):\n    print(i)", LONG]
)
def test_full_logits_and_scores(model, theirs, text):
    import torch

    ids = model.tokenizer.encode(text, special=True)
    last = min(len(ids), 64)  # all rows of logits of the long text are a gigabyte, beyond the window are the last ones
    with torch.no_grad():
        expected = theirs(torch.tensor([ids]), logits_to_keep=last).logits[0]
    tokens = jnp.asarray([ids], jnp.int32)
    hidden = forward(model.arch, model.compute, model.params, tokens, jnp.arange(len(ids))[None], jnp.ones_like(tokens))
    ours = np.asarray(logits(hidden[:, -last:], head_of(model.arch, model.params))[0])
    full = torch.log_softmax(expected.double(), -1)
    chosen = full[:-1].gather(1, torch.tensor(ids)[-last + 1 :, None])[:, 0].numpy()
    scored = score(model, [text])[0]
    far = (
        np.abs(ours - expected.numpy()).max(),
        np.abs(np.asarray(jax.nn.log_softmax(ours, axis=-1)) - full.numpy()).max(),
        np.abs(np.asarray(scored.logprobs)[-last + 1 :] - chosen).max(),
    )
    print(f"{len(ids)} tokens: logits {far[0]:.1e}, log-probs {far[1]:.1e}, chosen {far[2]:.1e}")
    assert max(far[:2]) < 2e-4
    assert far[2] < 1e-4


def test_a_left_padded_batch_generates_the_same_tokens(model, theirs):
    import torch

    rows = [model.tokenizer.encode(text, special=True) for text in ("Once upon a time", "中国的首都是", LONG)]
    for some in (rows[:2], rows[2:]):
        longest = max(map(len, some))
        ids, mask = np.zeros((len(some), longest), int), np.zeros((len(some), longest), int)
        for i, row in enumerate(some):
            ids[i, longest - len(row) :], mask[i, longest - len(row) :] = row, 1
        out = theirs.generate(
            torch.tensor(ids), attention_mask=torch.tensor(mask), do_sample=False, max_new_tokens=24,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        best = torch.stack(out.logits, 1).topk(2).values
        for i, done in enumerate(generate(model, ids, Sampling(max_new_tokens=24), attention_mask=mask)):
            expected = out.sequences[i, longest:].tolist()[: len(done.tokens)]
            if differ := [j for j, (a, b) in enumerate(zip(done.tokens, expected, strict=True)) if a != b]:
                gap = float(best[i, differ[0], 0] - best[i, differ[0], 1])
                print(f"near tie: row {i}, step {differ[0]}, gap {gap}")
                assert gap < 2e-4
