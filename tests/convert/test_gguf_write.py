"""GGUF out: what is written is read back, by our reader and by the gguf package's, to the same bits and ids."""

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, quantize

from configs.errors import UsageError
from convert import gguf_vocabulary
from convert.conversion import convert
from convert.gguf import open_gguf
from convert.gguf_families import tensors_of, turn, unturn
from convert.gguf_write import convert_to_gguf
from convert.load import load_tokenizer, resolve
from tests.convert.conftest import TINY

SIZES = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 270}
TEXTS = ("Hello, world! 123 4", "  two  spaces\n\tx", "你好 🎉", "<|end|>a<|end|>", "I'll we've", "")
BF16, Q8 = np.dtype(ml_dtypes.bfloat16), GGMLQuantizationType.Q8_0


def bytes_tokenizer(folder, digits=True):
    """A byte-level tokenizer like SmolLM2's: 256 bytes, two merges, two special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|end|>", *alphabet, "He", "ll", "Hell"]
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [("H", "e"), ("l", "l"), ("He", "ll")]))
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    made.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    made.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture
def llama(tiny):
    def make(name="llama", digits=True, **more):
        folder, given = tiny(name, **{**SIZES, **more})
        bytes_tokenizer(folder, digits)
        return folder, given

    return make


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_written_is_read_back_bitwise(llama, tmp_path, dtype):
    """HF -> GGUF -> HF; q and k turned as llama.cpp has them; vectors are float32."""
    folder, given = llama(dtype=dtype, tie_word_embeddings=False, attention_bias=True)
    made = convert_to_gguf(resolve(folder), tmp_path / "m.gguf", verify=True)
    assert (made.tensors, made.verified) == (len(given), True)
    back = resolve(tmp_path / "m.gguf")
    assert back.arch == resolve(folder).arch
    found = tensors_of(open_gguf(tmp_path / "m.gguf"))
    assert found.keys() == given.keys()
    for name, value in given.items():
        stored = found[name].read()
        assert stored.dtype == (value.dtype if value.ndim > 1 else np.float32), name
        assert np.ascontiguousarray(stored).astype(value.dtype).tobytes() == value.tobytes(), name
    theirs = {t.name: t for t in GGUFReader(tmp_path / "m.gguf").tensors}
    q = theirs["blk.1.attn_q.weight"].data
    q = q.view(BF16) if dtype == "bfloat16" else q
    expected = turn(given["model.layers.1.self_attn.q_proj.weight"], 6)
    np.testing.assert_array_equal(q.reshape(expected.shape), expected)
    np.testing.assert_array_equal(unturn(expected, 6), given["model.layers.1.self_attn.q_proj.weight"])


def test_q8_0_is_the_packages(llama, tmp_path):
    folder, given = llama(dtype="bfloat16")
    made = convert_to_gguf(resolve(folder), tmp_path / "m.gguf", dtype="q8_0", verify=True)
    assert set(made.dtypes) == {"Q8_0", "F32", "F16"}
    reader = GGUFReader(tmp_path / "m.gguf")
    theirs = {t.name: t for t in reader.tensors}
    for name, hf, heads in (
        ("token_embd", "model.embed_tokens", None),
        ("blk.2.ffn_down", "model.layers.2.mlp.down_proj", None),
        ("blk.0.attn_k", "model.layers.0.self_attn.k_proj", 2),
    ):
        value = given[f"{hf}.weight"].astype(np.float32)
        expected = quantize(turn(value, heads) if heads else value, Q8)
        assert theirs[f"{name}.weight"].tensor_type == Q8
        np.testing.assert_array_equal(theirs[f"{name}.weight"].data, expected)
    assert reader.fields["general.file_type"].contents() == 7
    assert theirs["output_norm.weight"].tensor_type == GGMLQuantizationType.F32
    assert theirs["blk.0.attn_output.weight"].tensor_type == GGMLQuantizationType.F16  # its rows of 48 make no blocks


def test_the_tokenizer_goes_along(llama, tmp_path):
    folder, _ = llama()
    convert_to_gguf(resolve(folder), tmp_path / "m.gguf")
    ours, theirs = load_tokenizer(resolve(tmp_path / "m.gguf")), load_tokenizer(resolve(folder))
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == text
    assert (ours.eos_ids, ours.chat_template) == (theirs.eos_ids, theirs.chat_template)
    meta = open_gguf(tmp_path / "m.gguf").metadata
    assert meta["tokenizer.ggml.pre"] == "smollm"
    assert len(meta["tokenizer.ggml.tokens"]) == 270
    assert meta["tokenizer.ggml.tokens"][-1] == "[PAD269]"
    assert meta["tokenizer.ggml.token_type"][:2] == [3, 1]
    assert meta["tokenizer.ggml.token_type"][260:262] == [4, 5]
    convert_to_gguf(resolve(tmp_path / "m.gguf"), tmp_path / "again.gguf", dtype="float16")
    again = open_gguf(tmp_path / "again.gguf").metadata
    assert {k: v for k, v in again.items() if "general" not in k} == {
        k: v for k, v in meta.items() if "general" not in k
    }
    convert_to_gguf(resolve(llama("plain", digits=False)[0]), tmp_path / "plain.gguf")
    assert open_gguf(tmp_path / "plain.gguf").metadata["tokenizer.ggml.pre"] == "gpt-2"


def test_the_real_tokenizer_comes_back_the_same(smollm2, tmp_path):
    """GGUF -> Hugging Face's files -> GGUF: the metadata of the original file."""
    load_tokenizer(smollm2).save(tmp_path)
    original = {k: v for k, v in open_gguf(smollm2.path).metadata.items() if k.startswith("tokenizer.")}
    from data.tokenizer import load_tokenizer as load

    made = gguf_vocabulary._of_tokenizer(load(tmp_path), smollm2)
    unsaid = {"tokenizer.ggml.add_eos_token", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix"}
    differing = [k for k in {*made, *original} - unsaid if made.get(k) != original.get(k)]
    assert not differing, {k: (str(made.get(k))[:80], str(original.get(k))[:80]) for k in differing}
    assert made["tokenizer.ggml.add_bos_token"] is original.get("tokenizer.ggml.add_bos_token", False)


def test_merges_are_said_by_scores(tmp_path):
    """Gemma's and Llama 2's kind of tokenizer: only scores are kept, and must mean the same merges."""
    spec = {
        "model": {
            "type": "BPE", "unk_token": "<unk>", "byte_fallback": True,
            "vocab": {t: i for i, t in enumerate(["<unk>", "<0x0A>", "a", "b", "c", "▁", "ab", "abc", "bc", "▁a"])},
            "merges": [["a", "b"], ["▁", "a"], ["ab", "c"], ["a", "bc"], ["b", "c"]],
        },
        "added_tokens": [{"id": 0, "content": "<unk>", "special": True}],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
    }  # fmt: skip
    meta = gguf_vocabulary._of_json(spec, "here")
    assert meta["tokenizer.ggml.token_type"] == [2, 6, *[1] * 8]
    assert meta["tokenizer.ggml.scores"][6:] == [0.0, -2.0, -3.0, -1.0]
    assert meta["tokenizer.ggml.add_space_prefix"] is False
    # a token found whole in text, as Gemma's runs of spaces: its merges say nothing, its spaces are plain ones
    spec["model"]["vocab"]["▁▁"] = 10
    spec["model"]["merges"].append(["▁", "▁"])
    spec["added_tokens"] += [{"id": i, "content": t, "special": False} for i, t in ((10, "▁▁"), (11, "<image>"))]
    meta = gguf_vocabulary._of_json(spec, "here")
    assert meta["tokenizer.ggml.tokens"][10:] == ["  ", "<image>"]
    assert meta["tokenizer.ggml.token_type"][10:] == [4, 4]
    assert {len(v) for v in gguf_vocabulary._fitted(meta, 11, "m").values() if isinstance(v, list)} == {11}
    with pytest.raises(UsageError, match="m: the tokenizer has 12 tokens, the model's embedding only 9 rows"):
        gguf_vocabulary._fitted(meta, 9, "m")
    spec["model"]["merges"] = [["a", "b"], ["▁", "a"], ["ab", "c"], ["b", "c"], ["a", "bc"]]  # abc has two ranks
    with pytest.raises(UsageError, match="not what scores"):
        gguf_vocabulary._of_json(spec, "here")
    spec["normalizer"] = {"type": "NFKC"}
    with pytest.raises(UsageError, match=r"no word for this tokenizer's step .*NFKC"):
        gguf_vocabulary._of_json(spec, "here")
    spec["model"]["type"] = "Unigram"
    with pytest.raises(UsageError, match="type Unigram cannot"):
        gguf_vocabulary._of_json(spec, "here")


def test_a_sentencepiece_model(tiny, tmp_path):
    """A tokenizer.model goes along as it is, and into GGUF: ids and text stay sentencepiece's own."""
    import sentencepiece

    text, (folder, _) = tmp_path / "text.txt", tiny("pieces", **{**SIZES, "vocab_size": 340})
    words = "the cat sat on the mat while another cat watched a dog dig in the sandy garden and then left".split()
    rng = np.random.default_rng(0)
    text.write_text("\n".join(" ".join(rng.choice(words, 9)) for _ in range(400)))
    sentencepiece.SentencePieceTrainer.Train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=330, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
        user_defined_symbols=["<user>"],
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    theirs = load_tokenizer(resolve(folder))
    convert(resolve(folder), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    convert_to_gguf(resolve(folder), tmp_path / "m.gguf", verify=True)
    ours = load_tokenizer(resolve(tmp_path / "m.gguf"))
    for sample in (*words, " two  spaces ", "你好 cat", "newline\nthe", "x", "garden, mat!", ""):
        ids = theirs.encode(sample, special=True)
        assert ours.encode(sample, special=True) == ids, sample
        assert ours.decode(ids[1:]) == theirs.decode(ids[1:]), sample
    assert (ours.bos_id, ours.eos_ids, ours.prefix) == (theirs.bos_id, theirs.eos_ids, theirs.prefix)
    assert ours.chat_template == theirs.chat_template
    meta = open_gguf(tmp_path / "m.gguf").metadata
    assert meta["tokenizer.ggml.token_type"][:5] == [2, 3, 3, 4, 6]
    assert meta["tokenizer.ggml.tokens"][3] == "<user>"


GEMMA = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "num_hidden_layers": 7,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 16,
    "rms_norm_eps": 1e-6, "sliding_window": 5, "rope_theta": 1e6, "rope_local_base_freq": 2e4,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
}  # fmt: skip


@pytest.fixture
def gemma(llama, tiny_tensors):
    """A folder of Gemma 3's text model whose norms, with 1 added in float32, lose nothing."""

    def make(**changes):
        config = {**TINY, **SIZES, **GEMMA, **changes}
        drawn = tiny_tensors(config)
        given = {k: np.round(v * 64) / 64 + np.float32(0) if "norm" in k else v for k, v in drawn.items()}
        return llama("gemma", tensors=given, **{**GEMMA, **changes})

    return make


def test_gemma3(gemma, tmp_path):
    folder, given = gemma()
    convert_to_gguf(resolve(folder), tmp_path / "m.gguf", verify=True)
    assert resolve(tmp_path / "m.gguf").arch == resolve(folder).arch
    found = tensors_of(open_gguf(tmp_path / "m.gguf"))
    for name, value in given.items():
        np.testing.assert_array_equal(found[name].read(), value, err_msg=name)
    convert(resolve(tmp_path / "m.gguf"), tmp_path / "back", verify=True)
    assert resolve(tmp_path / "back").arch == resolve(folder).arch


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_other_families(llama, tmp_path, family):
    """Written and read back: the same numbers, the same tensors."""
    more = {
        "qwen2": {"hidden_size": 48, "use_sliding_window": False},
        "qwen3": {},
        "mistral": {"sliding_window": None},
    }[family]
    folder, given = llama(model_type=family, tie_word_embeddings=False, **more)
    convert_to_gguf(resolve(folder), tmp_path / "m.gguf", verify=True)
    back = resolve(tmp_path / "m.gguf").arch
    assert replace(back, family=family) == resolve(folder).arch
    assert back.family == ("llama" if family == "mistral" else family)
    found = tensors_of(open_gguf(tmp_path / "m.gguf"))
    assert found.keys() == given.keys()
    for name, value in given.items():
        np.testing.assert_array_equal(found[name].read(), value, err_msg=name)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_scalings(llama, tmp_path, factor):
    llama3 = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    for name, scaling in {"llama3": llama3, "linear": {"rope_type": "linear", "factor": factor}}.items():
        folder, _ = llama(name, rope_scaling=scaling, rope_theta=500_000.0)
        convert_to_gguf(resolve(folder), tmp_path / f"{name}.gguf", verify=True)
        assert resolve(tmp_path / f"{name}.gguf").arch == resolve(folder).arch


def test_what_gguf_cannot_say(llama, gemma, tiny, tmp_path):
    target = tmp_path / "m.gguf"
    gelu, _ = llama("gelu", hidden_act="gelu")
    with pytest.raises(UsageError, match=r"cannot express this model's activation \(gelu would be read as silu\)"):
        convert_to_gguf(resolve(gelu), target)
    with pytest.raises(UsageError, match="cannot express this model's query_pre_attn_scalar"):
        convert_to_gguf(resolve(gemma(query_pre_attn_scalar=99)[0]), target)
    with pytest.raises(UsageError, match="has no tokenizer"):
        convert_to_gguf(resolve(tiny()[0]), target)
    with pytest.raises(UsageError, match=r"dtype 'int4' is unknown; allowed: float32, float16, bfloat16, q8_0"):
        convert_to_gguf(resolve(gelu), target, dtype="int4")
    folder, _ = llama()
    target.write_text("notes")
    with pytest.raises(UsageError, match="exists: give another"):
        convert_to_gguf(resolve(folder), target)
    with pytest.raises(UsageError, match="is no GGUF file"):
        convert_to_gguf(resolve(folder), target, overwrite=True)
    target.unlink()
    convert_to_gguf(resolve(folder), target)
    convert_to_gguf(resolve(folder), target, overwrite=True)
    with pytest.raises(UsageError, match="is what is read"):
        convert_to_gguf(resolve(target), target, overwrite=True)
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]
