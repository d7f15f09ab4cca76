"""Pretraining whole: from nothing, on a mixture, with every optimizer; gone on with, exactly."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from configs.data import Data
from configs.errors import UsageError
from configs.load import load
from convert.load import load_params, resolve
from convert.run import restore_params
from data.pack import fill_pieces, pack_rows
from decode.load import load_model
from model.architecture import Architecture
from model.compute import Compute
from model.transformer import init
from model.tree import flatten
from tests.train import tiny
from tests.train.test_resume import finish, lines, wait_until
from train.checkpoint import Checkpoints
from train.loop import train
from train.losses.lm import lm_loss, lm_weights
from train.metrics import is_time
from train.step import denominators

OPTIMIZERS = {
    "muon": ["optim.name=muon", "optim.ema_decay=0.9", "optim.schedule=wsd", "optim.decay_ratio=0.5"],
    "schedule_free": ["optim.name=schedule_free", "optim.schedule=constant"],
    "lion": ["optim.name=lion", "optim.schedule=inverse_sqrt", "optim.warmup_steps=2"],
    "adafactor": ["optim.name=adafactor", "optim.rates={embed/*: 0.5}"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a shape, a tokenizer and two sources of text."""
    folder = tmp_path_factory.mktemp("pretrain")
    (folder / "config.json").write_text(json.dumps(tiny.CONFIG))
    tiny.make_tokenizer().save(folder / "tokenizer")
    rng = np.random.default_rng(0)
    for name, count in (("prose", 40), ("code", 20)):
        (folder / name).mkdir()
        for i in range(count):
            words = rng.choice(tiny.WORDS, rng.integers(3, 60))
            (folder / name / f"{i:03}.txt").write_text(f"{name} " + " ".join(words), encoding="utf-8")
    return folder


def arguments(place, output, *more):
    """A run of 8 steps on the mixture, saved every second step."""
    return [
        f"output={output}", "model.init=random", f"model.source={place / 'config.json'}",
        f"model.tokenizer={place / 'tokenizer'}", f"data.mix.prose.train={place / 'prose'}",
        "data.mix.prose.weight={0: 3.0, 4: 1.0}", f"data.mix.code.train={place / 'code'}", "data.mix.code.weight=1",
        f"data.eval={{old: {place / 'prose'}, new: {place / 'code'}}}", "train.eval_every=4", "data.max_length=32",
        "data.window=8", "data.packing=concat", "train.epochs=null", "train.steps=8", "train.batch_size=4",
        "train.microbatches=2", "train.batch_warmup_steps=4", "train.batch_warmup_start=2", "optim.learning_rate=1e-3",
        "checkpoint.every=2", "checkpoint.keep=9", "log.preflight=false", "log.tensorboard=false",
        "train.compilation_cache=false", "objective.z_loss=1e-3", *more,
    ]  # fmt: skip


def timeless(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not is_time(k)} for row in rows]


def saved(folder, step=8):
    """The state of a step."""
    return Checkpoints(folder).arrays(step)


@pytest.mark.parametrize("name", [n if n == "muon" else pytest.param(n, marks=pytest.mark.slow) for n in OPTIMIZERS])
def test_a_run_from_nothing(place, tmp_path, name):
    whole, part = tmp_path / "whole", tmp_path / "part"
    with tiny.one_device():
        train(load("pretrain", arguments(place, whole, *OPTIMIZERS[name])))
        rows = timeless(whole)
        assert rows[-1]["loss"] < rows[0]["loss"]
        assert {"eval_old_loss", "eval_new_loss", "eval_old_bits_per_byte", "mix/prose"} <= rows[3].keys()
        assert 0.5 < rows[2]["mix/prose"] < 1
        assert rows[0]["tokens"] < rows[-1]["tokens"] - rows[-2]["tokens"]  # the batch grows
        # killed after step 5 (and the checkpoint of step 4)
        shutil.copytree(whole, part)
        shutil.rmtree(part / "export")
        for step in (6, 8):
            shutil.rmtree(part / "checkpoints" / str(step))
        train(load("pretrain", arguments(place, part, *OPTIMIZERS[name])))
    assert timeless(part) == rows
    first, state = (saved(folder) for folder in (whole, part))
    for path, x in first.items():
        np.testing.assert_array_equal(np.asarray(state[path]), np.asarray(x), err_msg=path)
    ours, theirs = (load_file(folder / "export" / "model.safetensors") for folder in (part, whole))
    for path, x in theirs.items():
        np.testing.assert_array_equal(ours[path], x, err_msg=path)
    # what is exported is what a checkpoint alone gives: the average, where there is one
    exported = flatten(load_params(resolve(whole)))
    shutil.rmtree(whole / "export")
    for path, x in flatten(load_params(resolve(whole))).items():
        np.testing.assert_allclose(np.asarray(x), np.asarray(exported[path]), atol=1e-7, err_msg=path)
    trained = {path.removeprefix("params/"): x for path, x in first.items() if path.startswith("params/")}
    assert (name in ("muon", "schedule_free")) != all(
        np.array_equal(trained[path], x) for path, x in restore_params(whole).items()
    )
    assert load_model(str(whole)).tokenizer.vocab_size == 318


def test_replay_and_what_is_forgotten(place, tmp_path):
    """Continued pretraining of an earlier run: both kinds of text are evaluated, one is replayed."""
    one = tmp_path / "one"
    common = ["train.steps=2", "data.replay=null", "data.mix={}", f"data.train={place / 'prose'}"]
    with tiny.one_device():
        plain = [a for a in arguments(place, one) if not a.startswith("data.mix")]
        train(load("pretrain", [*plain, *common]))
        more = [a for a in plain if not a.startswith(("model", "output", "optim"))]
        more += [f"output={tmp_path / 'two'}", f"model.source={one}", "model.init=source", "train.steps=4"]
        more += [f"data.train={place / 'code'}", f"data.replay.train={place / 'prose'}", "data.replay.share=0.25"]
        train(load("pretrain", [*more, "data.packing=none", "train.batch_warmup_steps=0"]))
    rows = timeless(tmp_path / "two")
    assert rows[0]["loss"] < 6
    assert 0.1 < rows[-1]["mix/replay"] < 0.45
    assert {"eval_old_loss", "eval_new_loss"} <= rows[3].keys()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["tune.method=lora"], "model.init is random and tune.method is lora"),
        (["model.tokenizer=null"], "say another's with model.tokenizer"),
        (["model.source=11m"], "nearest: 10m"),
        (["data.train=x.jsonl"], "data.mix and data.train are both given"),
        (["data.mix.code.weight=0"], "data.mix.code.weight is 0 at every step"),
        (["data.mix.code.epochs=0.1"], "allows no more: give it more data"),
        (["optim.name=schedule_free"], "optim.name is schedule_free and optim.schedule is wsd"),
        (["train.batch_warmup_start=9"], "train.batch_warmup_start is 9, more than train.batch_size 4"),
        (["optim.rates={nothing*: 2}"], "optim.rates: pattern 'nothing.*' matches no weight"),
    ],
)
def test_refusals(place, tmp_path, more, words):
    with pytest.raises(UsageError, match=words), tiny.one_device():
        train(load("pretrain", [*arguments(place, tmp_path / "run"), *more]))
    assert not Path(tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_bits_per_byte_of_some_batches(place, tmp_path):
    """Against the plain count: nats over ln 2 and the bytes of the text that was predicted."""
    from data.examples import open_examples
    from data.loader import Loader
    from data.tokenizer import load_tokenizer

    more = ["train.steps=1", "train.eval_every=1", "train.eval_batches=2", f"data.eval={place / 'prose'}"]
    for packing, mask in (("concat", True), ("concat", False), ("best_fit", True)):
        output = tmp_path / f"{packing}{mask}"
        run = load(
            "pretrain", [*arguments(place, output, *more), f"data.packing={packing}", f"data.document_mask={mask}"]
        )
        with tiny.one_device():
            train(run)
        row = timeless(output)[0]
        tokenizer = load_tokenizer(place / "tokenizer")
        data = run.data.model_copy(update={"shuffle": False})
        loader = Loader(open_examples((str(place / "prose"),), tokenizer, data), data, 4, 0, epochs=1)
        first = [next(loader), next(loader)]
        loader.close()
        count = sum(
            len(tokenizer.decode(targets[weights > 0].tolist(), skip_special=True).encode())
            for batch in first
            for targets, weights in zip(batch["targets"], batch["weights"], strict=True)
        )
        tokens = sum(float(batch["weights"].sum()) for batch in first)
        assert row["eval_bits_per_byte"] == pytest.approx(
            row["eval_loss"] * tokens / np.log(2) / count, rel=1e-3 if mask else 0.02
        )


@pytest.mark.slow
def test_killed_and_run_again(place, tmp_path, start):
    """kill -9 twice, with all on that has a state: mixture, stages, prefetching, growing batch, average, Muon."""
    more = [*OPTIMIZERS["muon"], "train.steps=24", "data.prefetch=2", "checkpoint.keep=2", "train.on_bad_step=skip"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    finish(start("pretrain", *arguments(place, whole, *more)))
    for line in (5, 14):
        process = start("pretrain", *arguments(place, part, *more))
        wait_until(lambda line=line: lines(part) >= line, process)
        process.kill()
        process.wait()
    finish(start("pretrain", *arguments(place, part, *more)))
    assert timeless(part) == timeless(whole)
    first, state = (saved(folder, 24) for folder in (whole, part))
    for path, x in first.items():
        np.testing.assert_array_equal(np.asarray(state[path]), np.asarray(x), err_msg=path)


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(2, 40), min_size=1, max_size=7), seed=st.integers(0, 5))
def test_in_a_row_with_others_is_alone(sizes, seed):
    """Documents joined and cut, with masks: loss and gradients are those of the same pieces, each in a row alone."""
    data = Data(train=("x",), packing="concat", max_length=16)
    rng = np.random.default_rng(seed)
    documents = [
        {"tokens": rng.integers(0, ARCH.vocab_size, size).astype(np.int32), "weights": np.ones(size, np.float32)}
        for size in sizes
    ]
    plan = pack_rows([size - 1 for size in sizes], data, None)
    joined = [fill_pieces(row, [documents[p.number] for p in row], data) for row in plan]
    alone = [fill_pieces([piece], [documents[piece.number]], data) for row in plan for piece in row]
    found = [gradients(rows) for rows in (joined, alone)]
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-6)
    for path, x in found[1][1].items():
        apart = np.linalg.norm(found[0][1][path] - x) / max(np.linalg.norm(x), 1e-6)
        assert apart < 2e-6, path


def gradients(rows):
    """Loss and every gradient of a tiny model on some rows, padded to a fixed number, as one batch."""
    empty = {name: np.zeros_like(column) for name, column in rows[0].items()}
    batch = {name: np.stack([row[name] for row in [*rows, *[empty] * (24 - len(rows))]]) for name in empty}
    total, grads = GRADIENT(PARAMS, {name: jnp.asarray(column) for name, column in batch.items()})
    return float(total), {path: np.asarray(x) for path, x in flatten(grads).items()}


ARCH = Architecture(64, 16, 2, 2, 1, 8, 24, 64)
PARAMS = init(ARCH, jax.random.key(0))
GRADIENT = jax.jit(
    jax.value_and_grad(
        lambda params, batch: lm_loss(
            params, batch, denominators(lm_weights, batch), arch=ARCH, compute=Compute(attention="reference")
        )[0]
    )
)
