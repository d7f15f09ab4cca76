"""GGUF: the real file against independent arithmetic, and written ones with what must not pass silently."""

import jax
import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter, dequantize

from configs.errors import UsageError
from convert.gguf import open_gguf
from convert.gguf_families import config_of, generation_config_of, tensors_of, unturn
from convert.gguf_tokenizer import build_tokenizer
from convert.load import load_params, load_tokenizer, resolve
from model.tree import flatten

HEADS, KV_HEADS, HEAD_DIM, WIDTH, HIDDEN, VOCAB, LAYERS = 4, 2, 8, 32, 48, 20, 2


def turn(rows, heads):
    """llama.cpp's conversion of q and k, as its documentation gives it."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


@pytest.fixture
def write(tmp_path):
    """write(change) -> (path, Hugging Face tensors): a small llama GGUF; `change(writer, tensors)` may alter it."""

    def make(change=lambda writer, tensors: None, arch="llama", **skip):
        path, rng = tmp_path / "tiny.gguf", np.random.default_rng(0)
        writer = GGUFWriter(path, arch)
        writer.add_context_length(64)
        writer.add_embedding_length(WIDTH)
        writer.add_block_count(LAYERS)
        writer.add_feed_forward_length(HIDDEN)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(500_000.0)
        hf, tensors = {}, {}

        def add(gguf_name, hf_name, shape, heads=None):
            hf[hf_name] = rng.standard_normal(shape).astype(np.float32)
            tensors[gguf_name] = turn(hf[hf_name], heads) if heads else hf[hf_name]

        add("token_embd.weight", "model.embed_tokens.weight", (VOCAB, WIDTH))
        add("output_norm.weight", "model.norm.weight", (WIDTH,))
        add("output.weight", "lm_head.weight", (VOCAB, WIDTH))
        for i in range(LAYERS):
            ours, theirs = f"blk.{i}", f"model.layers.{i}"
            add(f"{ours}.attn_norm.weight", f"{theirs}.input_layernorm.weight", (WIDTH,))
            add(f"{ours}.ffn_norm.weight", f"{theirs}.post_attention_layernorm.weight", (WIDTH,))
            add(f"{ours}.attn_q.weight", f"{theirs}.self_attn.q_proj.weight", (HEADS * HEAD_DIM, WIDTH), HEADS)
            add(f"{ours}.attn_k.weight", f"{theirs}.self_attn.k_proj.weight", (KV_HEADS * HEAD_DIM, WIDTH), KV_HEADS)
            add(f"{ours}.attn_v.weight", f"{theirs}.self_attn.v_proj.weight", (KV_HEADS * HEAD_DIM, WIDTH))
            add(f"{ours}.attn_output.weight", f"{theirs}.self_attn.o_proj.weight", (WIDTH, HEADS * HEAD_DIM))
            add(f"{ours}.ffn_gate.weight", f"{theirs}.mlp.gate_proj.weight", (HIDDEN, WIDTH))
            add(f"{ours}.ffn_up.weight", f"{theirs}.mlp.up_proj.weight", (HIDDEN, WIDTH))
            add(f"{ours}.ffn_down.weight", f"{theirs}.mlp.down_proj.weight", (WIDTH, HIDDEN))
        change(writer, tensors)
        for name, value in tensors.items():
            writer.add_tensor(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path, hf

    return make


def test_the_real_config(smollm2):
    arch = smollm2.arch
    assert (arch.vocab_size, arch.d_model, arch.num_layers, arch.num_heads) == (49152, 576, 30, 9)
    assert (arch.num_kv_heads, arch.head_dim, arch.d_ff, arch.max_position) == (3, 64, 1536, 8192)
    assert (arch.rope.theta, arch.rope.kind, arch.norm_eps, arch.tie_embeddings) == (100_000.0, "default", 1e-5, True)
    assert smollm2.generation_config == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def test_the_header_is_read_as_the_gguf_package_reads_it(smollm2):
    ours, theirs = open_gguf(smollm2.path), GGUFReader(smollm2.path)
    for key, value in ours.metadata.items():
        assert theirs.fields[key].contents() == value, key
    assert {k for k in theirs.fields if not k.startswith("GGUF.")} == set(ours.metadata)
    assert {t.name: (tuple(map(int, t.shape[::-1])), int(t.data_offset)) for t in theirs.tensors} == {
        name: (shape, offset) for name, (shape, _, offset) in ours.entries.items()
    }


def test_the_real_weights(smollm2):
    """Every kind of leaf of some layers, through the permutation that llama.cpp documents, applied again."""
    some = ("token_embd.", "output_norm.", "blk.0.", "blk.17.", "blk.29.")
    tensors = [t for t in GGUFReader(smollm2.path).tensors if t.name.startswith(some)]
    stored = {t.name: dequantize(t.data, t.tensor_type) for t in tensors}
    params = {path: np.asarray(value) for path, value in flatten(load_params(smollm2)).items()}
    assert sum(value.size for value in params.values()) == 134_515_008
    np.testing.assert_array_equal(params["embed/weight"], stored["token_embd.weight"])
    np.testing.assert_array_equal(params["norm/scale"], stored["output_norm.weight"])
    for i in (0, 17, 29):
        layer = {path.removeprefix("layers/"): v[i] for path, v in params.items() if path.startswith("layers/")}
        blk = {k.removeprefix(f"blk.{i}."): v for k, v in stored.items() if k.startswith(f"blk.{i}.")}
        for name, heads in (("q", 9), ("k", 3)):
            np.testing.assert_array_equal(turn(layer[f"attn/{name}/weight"].reshape(576, -1).T, heads),
                                          blk[f"attn_{name}.weight"])  # fmt: skip
        np.testing.assert_array_equal(layer["attn/v/weight"].reshape(576, -1).T, blk["attn_v.weight"])
        np.testing.assert_array_equal(layer["attn/o/weight"].reshape(-1, 576).T, blk["attn_output.weight"])
        np.testing.assert_array_equal(layer["mlp/gate/weight"].T, blk["ffn_gate.weight"])
        np.testing.assert_array_equal(layer["mlp/up/weight"].T, blk["ffn_up.weight"])
        np.testing.assert_array_equal(layer["mlp/down/weight"].T, blk["ffn_down.weight"])
        np.testing.assert_array_equal(layer["attn_norm/scale"], blk["attn_norm.weight"])
        np.testing.assert_array_equal(layer["mlp_norm/scale"], blk["ffn_norm.weight"])


def test_the_real_tokenizer(smollm2):
    tokenizer = load_tokenizer(smollm2)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (49152, 1, (2,), 2)
    ids = tokenizer.encode("a  2 b   33")  # transformers' GGUF route merges the spaces before digits otherwise
    assert [tokenizer.decode([i]) for i in ids] == ["a", "  ", "2", " b", "   ", "3", "3"]
    assert tokenizer.encode("<|im_start|>user\n<|im_end|>")[::3] == [1, 2]
    assert tokenizer.encode("hi", special=True) == tokenizer.encode("hi")  # this model adds no BOS
    for text in ("Hello, world! 你好 🎉\n\n\tx  y", " leading", "", "tail  "):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.render([{"role": "user", "content": "Hi"}], add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_permutation_is_undone(write):
    path, hf = write()
    found = tensors_of(open_gguf(path))
    assert found.keys() == hf.keys()
    for name, value in hf.items():
        np.testing.assert_array_equal(found[name].read(), value, err_msg=name)
    biases = np.arange(32.0)
    np.testing.assert_array_equal(unturn(turn(biases, 4), 4), biases)


def test_an_untied_file_loads(write):
    path, hf = write()
    source = resolve(path)
    assert not source.arch.tie_embeddings
    assert source.arch.rope.theta == 500_000.0
    params = load_params(source)
    np.testing.assert_array_equal(np.asarray(params["head"]["weight"]).T, hf["lm_head.weight"])
    sixteen = write(lambda w, t: t.update({k: v.astype(np.float16) for k, v in t.items()}))[0]
    assert load_params(resolve(sixteen))["embed"]["weight"].dtype == np.float16


def test_a_spread_leaf_is_dequantised_once(write, monkeypatch):
    from gguf import GGMLQuantizationType, quantize, quants
    from jax.sharding import NamedSharding, PartitionSpec

    from sharding.place import placer

    eight = GGMLQuantizationType.Q8_0
    name = "blk.{}.attn_v.weight"

    def change(writer, tensors):
        for i in range(LAYERS):
            raw = quantize(tensors.pop(name.format(i)), eight)
            writer.add_tensor(name.format(i), raw, raw_dtype=eight)

    path, calls, dequantize = write(change)[0], [], quants.dequantize
    monkeypatch.setattr(quants, "dequantize", lambda *a: calls.append(1) or dequantize(*a))
    plain = flatten(load_params(resolve(path)))
    assert len(calls) == LAYERS
    devices = jax.devices()[:4]
    mesh = jax.make_mesh((len(devices),), ("x",), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))
    place = placer(lambda path, shape: NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - 1), "x")))
    spread = flatten(load_params(resolve(path), place))
    assert len(calls) == 2 * LAYERS
    for key, value in plain.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(spread[key]))


def llama3_factors(theta, factor):
    """The divisors that llama.cpp's converter stores for Llama 3.1, written as its piecewise rule."""
    out = []
    for j in range(0, HEAD_DIM, 2):
        wavelength = 2 * np.pi * theta ** (j / HEAD_DIM)
        if wavelength < 8192 / 4:
            out.append(1.0)
        elif wavelength > 8192:
            out.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


def test_rope_scaling_is_read_or_refused(write):
    arch = resolve(write(lambda w, t: t.update({"rope_freqs.weight": llama3_factors(500_000.0, 32.0)}))[0]).arch
    assert (arch.rope.kind, arch.rope.factor, arch.rope.original_max_position) == ("llama3", 32.0, 8192)
    with pytest.raises(UsageError, match="not Llama 3"):
        resolve(write(lambda w, t: t.update({"rope_freqs.weight": np.full(4, 3.0, np.float32)}))[0])

    def linear(writer, tensors):
        writer.add_string("llama.rope.scaling.type", "linear")
        writer.add_float32("llama.rope.scaling.factor", 4.0)

    rope = resolve(write(linear)[0]).arch.rope
    assert (rope.kind, rope.factor) == ("linear", 4.0)
    with pytest.raises(UsageError, match="'yarn' is not supported"):
        resolve(write(lambda w, t: w.add_string("llama.rope.scaling.type", "yarn"))[0])
    with pytest.raises(UsageError, match=r"llama\.rope\.dimension_count is 4"):
        resolve(write(lambda w, t: w.add_rope_dimension_count(4))[0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w, t: w.add_uint32("llama.expert_count", 8), r"llama\.expert_count"),
        (lambda w, t: w.add_uint32("llama.attention.sliding_window", 64), r"llama\.attention\.sliding_window"),
        (lambda w, t: w.add_uint16("split.count", 2), "one of 2 parts"),
        (lambda w, t: t.pop("token_embd.weight"), r"token_embd\.weight is missing"),
    ],
)
def test_what_would_change_the_maths_is_refused(write, change, says):
    with pytest.raises(UsageError, match=says):
        resolve(write(change)[0])


def test_other_architectures_and_tensors(write):
    with pytest.raises(UsageError, match=r"general\.architecture is 'mamba'"):
        resolve(write(arch="mamba")[0])
    path = write(lambda w, t: (t.pop("blk.1.ffn_up.weight"), t.update({"blk.0.odd.weight": np.zeros(4, np.float32)})))[
        0
    ]
    with pytest.raises(UsageError, match=r"1 missing: model\.layers\.1\.mlp\.up_proj\.weight; 1 .*blk\.0\.odd\.weight"):
        load_params(resolve(path))


def test_broken_files(write, tmp_path):
    whole = write()[0].read_bytes()
    for keep in (0, 3, 10, 30, 300, 2000, len(whole) - 40):
        path = tmp_path / "cut.gguf"
        path.write_bytes(whole[:keep])
        with pytest.raises(UsageError, match=r"cut\.gguf"):
            load_params(resolve(path))
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "big") + whole[8:])
    with pytest.raises(UsageError, match="little-endian"):
        resolve(path)
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(UsageError, match="not a GGUF file"):
        resolve(path)


def vocabulary(kind, pre=None, tokens=("a", "b", "ab"), **arrays):
    def change(writer, _):
        writer.add_tokenizer_model(kind)
        if pre:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(list(tokens))
        for name, value in arrays.items():
            writer.add_array(f"tokenizer.ggml.{name}", value)

    return change


def test_unknown_tokenizers_are_named(write):
    with pytest.raises(UsageError, match=r"tokenizer\.ggml\.pre 'strange' is not known"):
        build_tokenizer(open_gguf(write(vocabulary("gpt2", "strange", merges=["a b"]))[0]))
    with pytest.raises(UsageError, match=r"tokenizer\.ggml\.model 'rwkv'"):
        build_tokenizer(open_gguf(write(vocabulary("rwkv"))[0]))
    with pytest.raises(UsageError, match="without a vocabulary"):
        build_tokenizer(open_gguf(write()[0]))
    with pytest.raises(UsageError, match="merges do not fit"):
        build_tokenizer(open_gguf(write(vocabulary("gpt2", "gpt-2", merges=["a c"]))[0]))
    with pytest.raises(UsageError, match="2 of them distinct"):
        build_tokenizer(open_gguf(write(vocabulary("gpt2", "gpt-2", ("a", "a", "b")))[0]))


def test_llama3_splitting(write):
    tokens = ["<s>", *"123 4ab", "12", "34", "123", "Ġ"]
    tokens = list(dict.fromkeys(t.replace(" ", "Ġ") for t in tokens))
    change = vocabulary("gpt2", "llama-bpe", tokens, merges=["1 2", "3 4"], token_type=[3] + [1] * (len(tokens) - 1))

    def with_bos(writer, tensors):
        change(writer, tensors)
        writer.add_bos_token_id(0)

    tokenizer, config = build_tokenizer(open_gguf(write(with_bos)[0]))
    assert tokenizer.encode("1234").tokens == ["<s>", "123", "4"]  # three digits at a time, words before merges
    assert config["bos_token"] == "<s>"
    assert config["add_bos_token"] is True


def test_sentencepiece_vocabulary(write, tmp_path):
    """Ids and text equal sentencepiece's own, byte fallback included."""
    import sentencepiece

    text = tmp_path / "text.txt"
    words = "the cat sat on the mat while another cat watched a dog dig in the sandy garden and then left".split()
    rng = np.random.default_rng(0)
    text.write_text("\n".join(" ".join(rng.choice(words, 9)) for _ in range(400)))
    sentencepiece.SentencePieceTrainer.Train(
        input=str(text), model_prefix=str(tmp_path / "m"), vocab_size=330, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    kinds = [
        2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1
        for i in range(len(model))
    ]
    pieces = [model.id_to_piece(i) for i in range(len(model))]
    change = vocabulary("llama", None, pieces, scores=[model.get_score(i) for i in range(len(model))], token_type=kinds)

    def with_bos(writer, tensors):
        change(writer, tensors)
        writer.add_bos_token_id(1)
        writer.add_unk_token_id(0)

    tokenizer, config = build_tokenizer(open_gguf(write(with_bos)[0]))
    for sample in (*words, "the cat", " two  spaces ", "你好 cat", "newline\nthe", "x", "garden, mat!", "<0x0A> the"):
        ids = tokenizer.encode(sample, add_special_tokens=False).ids
        assert ids == model.encode(sample), sample
        assert tokenizer.decode(ids) == model.decode(ids), sample
    assert tokenizer.encode("the").ids == [1, *model.encode("the")]
    assert config["add_bos_token"] is True


def test_eot_also_ends_a_generation(write):
    def change(writer, _):
        writer.add_eos_token_id(2)
        writer.add_eot_token_id(5)

    file = open_gguf(write(change)[0])
    assert generation_config_of(file)["eos_token_id"] == [2, 5]
    assert config_of(file)["eos_token_id"] == 2
