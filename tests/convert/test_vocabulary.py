"""More tokens than rows: the new rows are the mean of the old, wherever the model comes from."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.hf import write_folder
from convert.load import load_params, load_tokenizer, open_start, resolve
from convert.vocabulary import grow, growing
from model.compute import Compute
from model.head import head_of, logits
from model.lora import merge, sharding_of
from model.transformer import forward
from model.tree import flatten
from model.weights import Lora
from sharding.mesh import make_mesh
from sharding.place import placer
from sharding.rules import DEFAULT
from tests.train.tiny import make_model

OLD = 40


def logits_of(source, params):
    tokens = jnp.arange(24).reshape(2, 12)
    where = jnp.broadcast_to(jnp.arange(12), (2, 12))
    hidden = forward(source.arch, Compute(jnp.float32, "reference"), params, tokens, where, jnp.ones_like(tokens))
    return np.asarray(logits(hidden, head_of(source.arch, params)), np.float64)


@pytest.mark.parametrize("tied", [True, False])
def test_old_logits_stay_and_new_ones_are_their_mean(tiny, tied):
    source = resolve(tiny(tie_word_embeddings=tied)[0])
    more = grow(source, 70)
    assert (more.arch.vocab_size, more.config["vocab_size"], more.kind) == (128, 128, "grown")
    before, after = logits_of(source, load_params(source)), logits_of(more, load_params(more))
    scale = np.abs(before).max()
    np.testing.assert_allclose(after[..., :OLD], before, rtol=0, atol=2e-6 * scale)
    mean = np.repeat(before.mean(-1, keepdims=True), 128 - OLD, -1)
    np.testing.assert_allclose(after[..., OLD:], mean, rtol=0, atol=2e-6 * scale)
    # what the new tokens take is at most their share of a uniform guess: the mean lies below the log of the mean
    total = np.exp(before).sum(-1, keepdims=True)
    shift = np.log(total / (total + (128 - OLD) * np.exp(mean[..., :1])))
    log_softmax = lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))  # noqa: E731
    np.testing.assert_allclose(log_softmax(after)[..., :OLD], log_softmax(before) + shift, rtol=0, atol=4e-6 * scale)
    assert (shift >= np.log(OLD / 128) - 1e-9).all()


def test_a_vocabulary_that_fits_is_left_alone(tiny):
    source = resolve(tiny()[0])
    assert grow(source, OLD) is source


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from([("embed/weight", 0), ("head/weight", 1)]), st.data())
def test_any_part_of_a_grown_weight(old, more, which, data):
    path, axis = which
    array = np.random.default_rng(0).standard_normal((old, 5) if axis == 0 else (5, old)).astype(np.float32)
    read = {}

    def keep(path, shape, dtype, part):
        read["it"] = part
        return shape

    assert (
        growing(keep, old, old + more)(path, array.shape, array.dtype, lambda index: array[index])[axis] == old + more
    )
    rows = np.repeat(array.astype(np.float64).mean(axis, keepdims=True).astype(np.float32), more, axis)
    whole = np.concatenate([array, rows], axis)
    np.testing.assert_array_equal(read["it"](()), whole)
    cuts = sorted(data.draw(st.integers(0, old + more)) for _ in range(2))
    index = tuple(slice(*cuts) if at == axis else slice(1, 4) for at in range(2))
    np.testing.assert_array_equal(read["it"](index), whole[index])


def test_spread_over_a_mesh_and_as_bfloat16(tiny):
    source = grow(resolve(tiny(tie_word_embeddings=False)[0]), 70)
    alone = flatten(load_params(source, dtype="bfloat16"))
    place = placer(sharding_of(source.arch, make_mesh({"fsdp": 4, "tensor": 2}), DEFAULT))
    for path, value in flatten(load_params(source, place, dtype="bfloat16")).items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(alone[path]), err_msg=path)


def test_adapters_on_the_embedding_grow_with_it(tiny):
    """The mean of rows goes through an adapter's factors as it does through their product."""
    source = resolve(tiny()[0])
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((OLD, 2), (2, 24)))
    base, place = flatten(load_params(source))["embed/weight"], lambda path, shape, dtype, read: read(())
    grown = growing(place, OLD, 64)
    parts = [
        grown(f"embed/weight{end}", x.shape, x.dtype, lambda i, x=x: np.asarray(x)[i])
        for end, x in (("", base), ("/a", a))
    ]
    merged = np.asarray(merge({"x": Lora(jnp.asarray(parts[0]), jnp.asarray(parts[1]), jnp.asarray(b), 1.0)})["x"])
    np.testing.assert_allclose(merged[OLD:], np.repeat((np.asarray(base) + a @ b).mean(0)[None], 24, 0), atol=1e-5)


def test_another_tokenizer_makes_the_model_grow(tmp_path):
    folder = make_model(tmp_path / "m", vocab_size=336)
    bigger = json.loads((folder / "tokenizer.json").read_text())
    bigger["added_tokens"] += [{**bigger["added_tokens"][0], "id": 320 + i, "content": f"<new {i}>"} for i in range(40)]
    words = tmp_path / "words"
    words.mkdir()
    for file in folder.iterdir():
        if file.suffix in (".json", ".jinja") and file.name != "config.json":
            (words / file.name).write_bytes(file.read_bytes())
    (words / "tokenizer.json").write_text(json.dumps(bigger))
    source = open_start({"source": str(folder), "tokenizer": str(words), "resize_vocab": True}, 0)
    tokens = load_tokenizer(source).vocab_size
    assert source.arch.vocab_size == -(-tokens // 64) * 64 > 336
    assert load_tokenizer(source).encode("<new 3>") == [tokens - 37]
    write_folder(tmp_path / "out", load_params(source), source.arch, config=source.config)
    assert resolve(tmp_path / "out").arch == source.arch
    same = open_start({"source": str(folder), "tokenizer": str(words)}, 0)  # refused where the data is looked at
    assert same.arch.vocab_size == 336
