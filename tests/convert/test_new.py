"""Models from nothing: drawn from a seed, whatever the mesh; and models with more tokens than before."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UsageError
from convert.load import load_params, load_tokenizer, make_new, resized, resolve
from convert.new import Drawn, draw, preset_names, read_new_config
from model import lora
from model.architecture import Architecture
from model.families import architecture_from_hf
from model.transformer import declare
from model.tree import count, flatten
from sharding.mesh import make_mesh
from sharding.place import placer
from sharding.rules import make_rules
from tests.train import tiny

ARCH = Architecture(512, 32, 3, 4, 2, 8, 48, 64, attention_bias=True, qk_norm=True)


@pytest.mark.parametrize("name", preset_names())
def test_a_presets_size_is_its_name(name):
    config = read_new_config(name, resolve_nothing)
    vocab = {"10m": 4096, "30m": 16384, "125m": 49152, "350m": 49152}.get(name, 128256)
    arch = architecture_from_hf({**config, "vocab_size": vocab})
    parameters = sum(int(np.prod(declared.shape)) for declared in declare(arch).values())
    said = float(name[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
    assert parameters == pytest.approx(said, rel=0.25)
    if name == "8b":
        assert parameters == 8_030_261_248  # Llama 3.1 8B's


def resolve_nothing(name):
    raise UsageError("there is none")


def test_statistics_of_the_draws():
    drawn = {path: one.read((), np.float32) for path, one in draw(ARCH, 0, "scaled").items()}
    assert {path: x.shape for path, x in drawn.items()} == {p: d.shape for p, d in declare(ARCH).items()}
    for path, x in drawn.items():
        if path.endswith("scale"):
            assert (x == 1).all()
        elif path.endswith("bias"):
            assert (x == 0).all()
        else:
            std = 0.02 / 6**0.5 if path.endswith(("o/weight", "down/weight")) else 0.02
            assert x.std() == pytest.approx(std, rel=0.1), path
            assert abs(x.mean()) < 4 * std / x.size**0.5, path
            assert len(np.unique(x)) > 0.99 * x.size
    other = draw(ARCH, 1, "normal")
    assert other["layers/attn/o/weight"].read((), np.float32).std() == pytest.approx(0.02, rel=0.1)
    assert not np.array_equal(other["embed/weight"].read((), np.float32), drawn["embed/weight"])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_part_is_a_part_of_the_whole(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    drawn = Drawn("a", shape, data.draw(st.sampled_from([0.0, 1.0])), 2.0, 7)
    cuts = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    index = tuple(slice(*cut) for cut in cuts[: data.draw(st.integers(0, len(shape)))])
    np.testing.assert_array_equal(drawn.read(index, np.float32), drawn.read((), np.float32)[index])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.make_tokenizer().save(folder)
    return folder


@pytest.fixture
def shape(tmp_path):
    """A config.json alone."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny.CONFIG))
    return path


def test_the_same_weights_on_any_mesh(shape, tokenizer):
    source = make_new(str(shape), str(tokenizer), 3, "scaled")
    assert source.arch.vocab_size == 320
    alone = flatten(load_params(source))
    for sizes in ({"data": 8}, {"fsdp": 2, "tensor": 2, "data": 2}):
        place = placer(lora.sharding_of(source.arch, make_mesh({"fsdp": 1, **sizes}), make_rules("fsdp", {})))
        for path, x in flatten(load_params(source, place)).items():
            np.testing.assert_array_equal(np.asarray(x), np.asarray(alone[path]), err_msg=path)
    assert flatten(load_params(source, dtype="bfloat16"))["norm/scale"].dtype == "bfloat16"


def test_a_shape_can_be_any_models(tmp_path, tokenizer):
    model = tiny.make_model(tmp_path / "model")
    for name in (str(model), str(model / "config.json")):
        source = make_new(name, str(tokenizer), 0, "scaled")
        assert source.arch == resolve(model).arch
    assert load_tokenizer(make_new(str(model), None, 0, "scaled")).vocab_size == 318


@pytest.mark.parametrize(
    ("name", "tokens", "words"),
    [
        ("12m", "here", "no preset .10m, 30m, 125m, 350m, 1b, 3b, 8b.; did you mean 125m"),
        ("10m", None, "'10m' has no tokenizer: give model.tokenizer"),
        ("10m", "nowhere", "model.tokenizer=nowhere: MODEL 'nowhere' does not exist"),
    ],
)
def test_what_there_is_not(name, tokens, words, tokenizer):
    with pytest.raises(UsageError, match=words):
        make_new(name, str(tokenizer) if tokens == "here" else tokens, 0, "scaled")


@pytest.mark.parametrize("tied", [True, False])
def test_more_tokens(tmp_path, tied):
    """What the old tokens have stays, bit by bit; a new one has the mean of all logits."""
    from model.head import head_of, logits
    from model.transformer import Compute, forward

    model = tiny.make_model(tmp_path / "model", tie_word_embeddings=tied)
    old, new = resolve(model), resized(resolve(model), 330)
    assert resized(old, 320) is old
    assert (new.arch.vocab_size, new.config["vocab_size"]) == (384, 384)
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    positions = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), tokens.shape)
    found = []
    for source in (old, new):
        params = load_params(source)
        hidden = forward(source.arch, Compute(), params, tokens, positions, jnp.ones_like(tokens))
        found.append(np.asarray(logits(hidden, head_of(source.arch, params))))
    np.testing.assert_allclose(found[1][..., :320], found[0], rtol=0, atol=1e-5)
    mean = np.broadcast_to(found[0].mean(-1, keepdims=True), (2, 12, 64))
    np.testing.assert_allclose(found[1][..., 320:], mean, rtol=0, atol=1e-5)
    assert count(load_params(new)) - count(load_params(old)) == 64 * 32 * (1 if tied else 2)
    assert jax.tree.structure(load_params(new)) == jax.tree.structure(load_params(old))
