"""Training from nothing and with more tokens: the same on any mesh, resumed bitwise, usable wherever it lies."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.errors import UsageError
from configs.load import load
from convert.load import load_params, load_tokenizer, resolve
from decode.load import load_model
from model.compute import Compute
from model.head import head_of, logits
from model.transformer import forward
from tests.train import tiny
from train.checkpoint import Checkpoints
from train.loop import train
from train.preflight import open_data
from train.rounds import go_on
from train.setup import source_of

SHORT = ("train.steps=6", "checkpoint.every=3", "model.init=random", "train.seed=3")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A config.json and a folder with a tokenizer, neither beside the other."""
    folder = tmp_path_factory.mktemp("parts")
    (folder / "sizes").mkdir()
    (folder / "sizes" / "config.json").write_text(json.dumps(tiny.CONFIG))  # no vocab_size
    tiny.make_tokenizer().save(folder / "words")
    return folder


def begin(folder, parts, chats, *more):
    more = (f"model.tokenizer={parts / 'words'}", *SHORT, *more)
    return load("sft", tiny.overrides(folder, parts / "sizes", chats, *more))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, parts, chats):
    """A run from nothing; tests copy it before they change anything."""
    with tiny.one_device():
        return begin(train(begin(tmp_path_factory.mktemp("new") / "run", parts, chats)), parts, chats)


def saved(folder):
    checkpoints = Checkpoints(folder)
    return checkpoints.arrays(checkpoints.latest())


def logits_of(model):
    source = resolve(model)
    params = load_params(source, dtype=np.float32)
    tokens = jnp.arange(24).reshape(2, 12)
    where = jnp.broadcast_to(jnp.arange(12), (2, 12))
    compute = Compute(jnp.float32, "reference")
    hidden = jax.jit(lambda p: forward(source.arch, compute, p, tokens, where, jnp.ones_like(tokens)))(params)
    return np.asarray(logits(hidden, head_of(source.arch, params)))


def losses(folder):
    return [json.loads(line)["loss"] for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def test_it_begins_at_a_uniform_guess_and_learns(finished):
    loss = losses(finished.output)
    assert loss[0] == pytest.approx(np.log(source_of(finished).arch.vocab_size), abs=0.05)
    assert loss[-1] < loss[0]


@pytest.mark.slow
def test_eight_devices_learn_the_same(finished, parts, chats, tmp_path):
    folder = train(begin(tmp_path / "eight", parts, chats, "export.enabled=false"))
    np.testing.assert_allclose(losses(folder), losses(finished.output), rtol=1e-5)


def test_resume_is_bitwise(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished.output, folder)
    shutil.rmtree(folder / "checkpoints" / "6")
    with tiny.one_device():
        train(finished.model_copy(update={"output": str(folder)}))
    ours, theirs = saved(folder), saved(Path(finished.output))
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        np.testing.assert_array_equal(ours[path], value, err_msg=path)


def test_a_run_and_its_export_are_models_of_their_own(finished, parts, tmp_path, monkeypatch):
    """Elsewhere, without preset and tokenizer; by the checkpoint, or by the export."""
    folder = tmp_path / "moved"
    shutil.copytree(finished.output, folder)
    shutil.move(parts / "words", parts / "gone")
    try:
        exported = resolve(folder)
        assert exported.kind == "hf"
        expected = logits_of(folder)
        shutil.move(folder / "export", tmp_path / "export")
        source = resolve(folder)
        assert (source.kind, source.arch) == ("run", exported.arch)
        np.testing.assert_array_equal(logits_of(folder), expected)
        model = load_model(str(folder))
        assert model.eos_ids == (model.tokenizer.special_tokens["<|im_end|>"],)
        assert model.tokenizer.render([{"role": "user", "content": "red"}]).startswith("<|im_start|>user")
    finally:
        shutil.move(parts / "gone", parts / "words")


def test_the_export_is_whole(finished):
    export, tokenizer = Path(finished.output) / "export", tiny.make_tokenizer()
    config = json.loads((export / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_ids[0], "pad_token_id": tokenizer.pad_id}
    assert ids.items() <= config.items()
    assert json.loads((export / "generation_config.json").read_text()) == ids
    assert load_tokenizer(resolve(export)).encode("red sun") == tokenizer.encode("red sun")


@pytest.mark.parity
def test_transformers_loads_the_export(finished):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export = Path(finished.output) / "export"
    theirs = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.arange(24).reshape(2, 12)).logits.numpy()
    np.testing.assert_allclose(logits_of(export), expected, atol=1e-5)
    assert theirs.generation_config.eos_token_id == AutoTokenizer.from_pretrained(export).eos_token_id


@pytest.mark.slow
def test_frozen_new_weights_are_drawn_again(parts, chats, tmp_path):
    """The checkpoint holds what learnt; the rest follows from the seed."""
    only = ("tune.trainable=['*norm*']", "train.steps=2", "optim.weight_decay=0")
    with tiny.one_device():
        folder = train(begin(tmp_path / "run", parts, chats, *only))
    assert "params/embed/weight" not in saved(folder)
    expected = logits_of(folder)
    shutil.rmtree(folder / "export")
    np.testing.assert_array_equal(logits_of(folder), expected)


@pytest.fixture
def small(tmp_path):
    """A model whose tokenizer has more tokens than it has rows."""
    return tiny.make_model(tmp_path / "small", vocab_size=288, tie_word_embeddings=False)


ADAPTERS = ("tune.method=lora", "tune.r=2", "export.merge=true")


@pytest.mark.parametrize("tuned", [("tune.method=full",), pytest.param(ADAPTERS, marks=pytest.mark.slow)])
def test_a_grown_vocabulary_trains_and_goes_on(small, chats, tmp_path, tuned):
    grown = (*SHORT[:2], "model.resize_vocab=true", "train.steps=3", *tuned)
    with tiny.one_device():
        folder = train(load("sft", tiny.overrides(tmp_path / "run", small, chats, *grown)))
    rows = -(-tiny.make_tokenizer().vocab_size // 64) * 64
    assert json.loads((folder / "export" / "config.json").read_text())["vocab_size"] == rows
    expected = logits_of(folder)
    assert expected.shape[-1] == rows
    shutil.rmtree(folder / "export")
    np.testing.assert_allclose(logits_of(folder), expected, atol=1e-6)
    assert load_tokenizer(resolve(folder)).vocab_size <= rows


def test_too_few_rows_are_refused_with_the_way_out(small, chats, tmp_path):
    run = load("sft", tiny.overrides(tmp_path / "run", small, chats))
    with pytest.raises(UsageError, match=r"only 288 rows.*model\.resize_vocab=true adds rows"):
        open_data(run, source_of(run))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("model.init=random", "tune.method=lora"), "adapters beside frozen noise"),
        (("model.resize_vocab=true", "tune.method=lora"), r"export\.merge=true"),
        (("model.resize_vocab=true", "tune.method=lora", "tune.init_adapter=a"), "merge it into its model"),
    ],
)
def test_what_does_not_go_together(given, words, parts, chats, tmp_path):
    with pytest.raises(UsageError, match=words):
        load("sft", tiny.overrides(tmp_path / "run", parts / "sizes", chats, *given))


def test_a_later_round_starts_from_the_export_not_from_nothing(finished):
    now = go_on(finished, Path(finished.output) / "export")
    assert (now.model.init, now.model.tokenizer, now.model.resize_vocab) == ("source", None, False)
    assert source_of(now).kind == "hf"


def test_what_a_run_keeps_of_its_start(finished):
    assert sorted(p.name for p in (Path(finished.output) / "start").iterdir() if "token" not in p.name) == [
        "chat_template.jinja", "config.json", "generation_config.json"
    ]  # fmt: skip
