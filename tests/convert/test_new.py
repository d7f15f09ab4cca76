"""Models from nothing: presets, the same draws on any mesh, their statistics, whose vocabulary, refusals."""

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UsageError
from configs.presets import presets, read_preset
from convert.heads import with_scores
from convert.load import load_params, load_tokenizer, open_start
from convert.new import RESIDUAL, Drawn, draw, make_new
from model.architecture import Architecture
from model.families import architecture_from_hf
from model.lora import sharding_of
from model.transformer import declare
from model.tree import flatten
from sharding.mesh import make_mesh
from sharding.place import placer
from sharding.rules import DEFAULT
from tests.train import tiny

WIDE = Architecture(512, 128, 6, 8, 4, 16, 320, 64)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.make_tokenizer()


@pytest.fixture
def words(tmp_path, tokenizer):
    """A folder with a tokenizer and nothing else."""
    tokenizer.save(tmp_path / "words")
    return tmp_path / "words"


def open_new(source, tokenizer=None, seed=0, **model):
    words = None if tokenizer is None else str(tokenizer)
    return open_start({"source": str(source), "init": "random", "tokenizer": words, **model}, seed)


@pytest.mark.parametrize("name", presets())
def test_presets_have_the_size_that_they_say(name):
    arch = architecture_from_hf({**read_preset(name), "vocab_size": 32_000})
    size = sum(math.prod(declared.shape) for declared in declare(arch).values())
    said, unit = re.match(
        r"# ([\d.]+)([MB]) parameters with a vocabulary of 32,000", presets()[name].read_text()
    ).groups()
    assert size == pytest.approx(float(said) * {"M": 1e6, "B": 1e9}[unit], rel=0.005)
    assert size == pytest.approx(int(name[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]], rel=0.15)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_a_part_is_drawn_as_the_whole_is(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4)))
    whole = Drawn("a/b", shape, 0.5, 0.0, 3)[()]
    cut = st.tuples(st.integers(0, 40), st.integers(0, 40)).map(lambda ends: slice(min(ends), max(ends)))
    index = tuple(data.draw(cut) for _ in shape)
    np.testing.assert_array_equal(Drawn("a/b", shape, 0.5, 0.0, 3)[index], whole[index])
    assert len(np.unique(whole)) > 0.99 * whole.size  # nothing is drawn twice


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"tensor": 2, "fsdp": 4}, {"data": 8}])
def test_the_same_weights_on_any_mesh(axes, tokenizer):
    config = {**tiny.CONFIG, "tie_word_embeddings": False}
    source = make_new("tiny", config, tokenizer, seed=5)
    place = placer(sharding_of(source.arch, make_mesh(axes), DEFAULT))
    alone = flatten(load_params(source, dtype="bfloat16"))
    for path, value in flatten(load_params(source, place, dtype="bfloat16")).items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(alone[path]), err_msg=path)
        assert np.asarray(value).dtype == "bfloat16"


@pytest.mark.parametrize("scheme", ["normal", "scaled"])
def test_statistics_of_the_draws(scheme):
    for path, drawn in draw(WIDE, 1, scheme).items():
        values, std = drawn[()].astype(np.float64), 0.02
        if path.endswith("scale"):
            assert (values == 1).all()
            continue
        if scheme == "scaled" and path in RESIDUAL:
            std /= math.sqrt(12)
        error = std / math.sqrt(values.size)
        assert abs(values.mean()) < 5 * error, path
        assert values.std() == pytest.approx(std, abs=4 * error), path
        assert np.mean(np.abs(values) > 2 * std) == pytest.approx(0.0455, abs=0.01), path


def test_norms_and_biases_begin_as_the_model_declares():
    drawn = draw(Architecture(64, 16, 2, 2, 2, 8, 32, 64, attention_bias=True, norm_offset=1.0), 0)
    assert not drawn["layers/attn/q/bias"][()].any()
    assert not drawn["norm/scale"][()].any()  # Gemma's: 1 + scale


def test_every_weight_layer_and_seed_has_numbers_of_its_own():
    one, other = draw(WIDE, 0), draw(WIDE, 1)
    found = [drawn[path][()] for drawn in (one, other) for path in drawn if drawn[path].std]
    values = np.concatenate([value.ravel() / value.std() for value in found])
    assert len(np.unique(values)) > 0.97 * values.size  # float32 itself repeats some
    gate, up = one["layers/mlp/gate/weight"][()], one["layers/mlp/up/weight"][()]
    for a, b in ((gate, up), (gate[0], gate[1]), (gate, other["layers/mlp/gate/weight"][()])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / math.sqrt(a.size)


def test_the_vocabulary_is_the_tokenizers(words, tokenizer):
    source = open_new("10m", words)
    assert source.kind == "new"
    assert source.arch.vocab_size == -(-tokenizer.vocab_size // 64) * 64
    assert source.config["eos_token_id"] == tokenizer.eos_ids[0] == source.generation_config["eos_token_id"]
    assert source.config["bos_token_id"] == tokenizer.bos_id
    assert load_tokenizer(source).encode("red sun") == tokenizer.encode("red sun")


def test_an_architecture_alone_is_enough(words, tmp_path):
    """A config.json, its folder, and a model whose weights are left aside."""
    folder = tmp_path / "only"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**tiny.CONFIG, "vocab_size": 448}))
    whole = tiny.make_model(tmp_path / "whole")
    for name, tokenizer, size in ((folder, words, 448), (folder / "config.json", words, 448), (whole, None, 320)):
        source = open_new(name, tokenizer)
        assert (source.arch.vocab_size, source.arch.d_model) == (size, 32)
    first = np.asarray(flatten(load_params(source))["embed/weight"])
    assert abs(first.std() - 0.02) < 1e-3  # the folder's own have 0.1
    load_tokenizer(open_new(whole / "config.json"))  # lies beside it


def test_a_small_vocabulary_is_refused_or_grown(words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**tiny.CONFIG, "vocab_size": 100}))
    with pytest.raises(UsageError, match=r"only 100 rows.*model.resize_vocab=true"):
        open_new(tmp_path, words)
    assert open_new(tmp_path, words, resize_vocab=True).arch.vocab_size % 64 == 0


def test_a_score_head_takes_the_place_of_the_language_models(tokenizer):
    config = {**tiny.CONFIG, "tie_word_embeddings": False}
    source = make_new("tiny", config, tokenizer, seed=5)
    scoring = flatten(load_params(with_scores(source, 1, False, 5)))
    plain = flatten(load_params(source))
    assert set(plain) - set(scoring) == {"head/weight"}
    assert set(scoring) - set(plain) == {"score/weight"}
    np.testing.assert_array_equal(scoring["embed/weight"], plain["embed/weight"])


def test_refusals(words, tmp_path):
    with pytest.raises(UsageError, match=r"no tokenizer: say whose to use with model.tokenizer"):
        open_new("125m")
    with pytest.raises(UsageError, match=r"neither a preset \(.*125m.*\); nearest: 125m nor"):
        open_new("126m", words)
    with pytest.raises(UsageError, match=r"'125m' is a preset, an architecture without weights: .*model.init=random"):
        open_start({"source": "125m"}, 0)
    with pytest.raises(UsageError, match=r"^model.tokenizer: .*does not exist"):
        open_new("125m", tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({**tiny.CONFIG, "vocab_size": 448}))
    with pytest.raises(UsageError, match=r"holds no tokenizer.*say another's with model.tokenizer"):
        open_new(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UsageError, match="num_attention_heads is missing"):
        open_new(tmp_path / "config.json", words)
