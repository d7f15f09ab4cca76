"""Reward models: the loss and every gradient from packed rows, however they are cut, are those of one pair at a time;
whole runs learn, and what they write scores the same."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from configs.errors import UsageError
from configs.load import load
from configs.objective import Objective
from configs.sample import Sample
from configs.schema import Data
from convert.heads import with_scores
from convert.load import load_params, resolve
from data.pack import fill_row, pack_window
from data.rewards import fit_reward
from decode.load import load_model
from decode.prompts import pad_right
from decode.reward import score_rewards
from model import lora
from model.compute import Compute
from model.transformer import declare, forward, nest
from model.tree import flatten
from sharding.mesh import make_mesh
from sharding.place import place_batch
from sharding.rules import make_rules
from tests.train import tiny
from tests.train.test_dpo import SEEDS, T, pair, sides
from tests.train.test_step import ARCH, MESHES, adapters_of
from train.cli import app
from train.loop import train
from train.losses.reward import bradley_terry
from train.recipes import make_recipe
from train.rewards import load_rewards
from train.step import averages, denominators, split_batch

CENTER = 0.1
ENSEMBLE, STEPS = replace(ARCH, num_labels=3), replace(ARCH, num_labels=2, token_labels=True)
OBJECTIVE = Objective(type="reward", num_labels=3, center_rewards_coefficient=CENTER)
MARGINS = np.random.default_rng(5).normal(size=len(SEEDS)).round(2)


def weights(arch, dtype=np.float32):
    rng = np.random.default_rng(0)
    return {
        path: ((path.endswith("scale")) + 0.1 * rng.standard_normal(declared.shape)).astype(dtype)
        for path, declared in sorted(declare(arch).items())
    }


def policy(arch, dtype=np.float32):
    """A reward model with adapters on its trunk."""
    base = nest({path: jnp.asarray(x) for path, x in weights(arch, dtype).items()})
    pairs = {p: (jnp.asarray(a), jnp.asarray(b)) for p, (a, b) in adapters_of(dtype=dtype).items()}
    return lora.attach(base, pairs, 0.5)


def batch_of(share=True, rows=8, swap=False):
    """All pairs, packed; the last rows are empty."""
    data = Data(train=("x",), max_length=T + 2, share_prompt=share)
    made = []
    for seed, margin in zip(SEEDS, MARGINS, strict=True):
        chosen, rejected = sides(*pair(seed))
        made.append(fit_reward((rejected, chosen, 0.0) if swap else (chosen, rejected, margin), data)[0])
    return filled(made, rows, ("branches", "margins"))


def filled(made, rows, more):
    plan = pack_window([len(e["tokens"]) for e in made], T + 2, 0)
    assert len(plan) <= rows
    full = [fill_row([made[i] for i in row], T + 2, more=more) for row in plan + [[]] * (rows - len(plan))]
    return {name: np.stack([row[name] for row in full]) for name in full[0]}


def hidden_of(params, rows, dtype):
    """Hidden states of unpacked rows, each by itself."""
    tokens, segments = map(jnp.asarray, pad_right(rows, T))
    where = jnp.broadcast_to(jnp.arange(T), tokens.shape)
    return forward(ARCH, Compute(dtype, "reference"), params, tokens, where, segments)


def plain(params):
    """The loss as the papers write it, one row for each sequence."""
    rows = [[*prompt, *completion] for prompt, *both in map(pair, SEEDS) for completion in both]
    read = hidden_of(params, rows, jnp.float64)[np.arange(len(rows)), [len(row) - 1 for row in rows]]
    rewards = read @ params["score"]["weight"]
    w, l = rewards[0::2], rewards[1::2]  # noqa: E741
    return (jnp.log1p(jnp.exp(-(w - l - MARGINS[:, None]))) + CENTER * (w + l) ** 2).mean()


@pytest.fixture(scope="module")
def single():
    """A policy, and the loss and gradient of single pairs."""
    with jax.enable_x64(True):
        params = policy(ENSEMBLE, np.float64)
        return params, *jax.jit(jax.value_and_grad(plain))(params)


def value_and_grad(recipe, params, batch, pieces):
    """Loss, gradients and metrics of a batch in micro-batches."""

    def ours(params):
        norms, parts = denominators(recipe.weights, batch), split_batch(batch, pieces)
        found = [recipe.loss(params, jax.tree.map(lambda x: x[i], parts), norms) for i in range(pieces)]  # noqa: B023
        return sum(one for one, _ in found), jax.tree.map(lambda *x: sum(x), *(sums for _, sums in found))

    (value, sums), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    return value, grads, {name: float(total / weight) for name, (total, weight) in sums.items()}


def assert_close(found, expected, atol):
    expected = flatten(expected)
    for path, value in flatten(found).items():
        np.testing.assert_allclose(value, expected[path], rtol=0, atol=atol, err_msg=path)


def test_the_formula_is_the_papers():
    rng = np.random.default_rng(0)
    w, l, m = rng.normal(0, 3, (3, 50))  # noqa: E741
    with jax.enable_x64(True):
        got = bradley_terry(jnp.asarray(w), jnp.asarray(l), jnp.asarray(m), 0.01)
        far = bradley_terry(jnp.asarray([1e3, -1e3]), jnp.zeros(2))
    np.testing.assert_allclose(
        got, -np.log(1 / (1 + np.exp(-(w - l - m)))) + 0.01 * (w + l) ** 2, rtol=1e-12, atol=1e-15
    )
    np.testing.assert_allclose(far, [0, 1000], atol=1e-12)


@pytest.mark.parametrize(("share", "pieces"), [(True, 2), (False, 1)])
def test_loss_and_gradients_are_those_of_single_pairs(single, share, pieces):
    params, want, expected = single
    with jax.enable_x64(True):
        recipe = make_recipe(OBJECTIVE, ENSEMBLE, Compute(jnp.float64, "reference"))
        batch = {name: jnp.asarray(column) for name, column in batch_of(share).items()}
        batch["margins"] = batch["margins"].astype(jnp.float64).round(2)
        got, found, metrics = value_and_grad(recipe, params, batch, pieces)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    assert_close(found, expected, 1e-9)
    assert metrics["margin"] == pytest.approx(metrics["rewards/chosen"] - metrics["rewards/rejected"], abs=1e-12)
    assert metrics["rewards/spread"] > 0


def test_a_mesh_changes_nothing():
    params, batch = policy(ENSEMBLE), batch_of()

    def value(mesh, pieces):
        rules, grid = make_rules("fsdp", {}), make_mesh(MESHES[mesh], jax.devices()[: 1 if mesh == "1" else 8])
        recipe = make_recipe(OBJECTIVE, ENSEMBLE, Compute(jnp.float32, "reference", rules=rules))
        with jax.set_mesh(grid):
            return value_and_grad(recipe, params, place_batch(batch, grid, rules), pieces)[:2]

    (want, expected), (got, found) = value("1", 1), value("2x2x2", 1)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    norm = lambda tree: float(np.sqrt(sum((np.asarray(x) ** 2).sum() for x in jax.tree.leaves(tree))))  # noqa: E731
    difference = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), found, expected)
    assert norm(difference) < 2e-5 * norm(expected)


def test_swapping_mirrors():
    params = policy(ENSEMBLE)
    recipe = make_recipe(OBJECTIVE.model_copy(update={"center_rewards_coefficient": 0.0}), ENSEMBLE, Compute())
    there, back = ({n: jnp.asarray(c) for n, c in batch_of(swap=swap).items()} for swap in (False, True))
    there = {**there, "margins": 0 * there["margins"]}
    loss = jax.jit(lambda batch: recipe.loss(params, batch, denominators(recipe.weights, batch)))
    (one, a), (other, b) = ((value, averages(sums)) for value, sums in map(loss, (there, back)))
    assert float(a["margin"]) == pytest.approx(-float(b["margin"]), abs=1e-6)
    assert float(a["accuracy"]) == pytest.approx(1 - float(b["accuracy"]))
    assert float(a["mean_reward"]) == pytest.approx(float(b["mean_reward"]), abs=1e-6)
    assert float(other - one) == pytest.approx(float(a["margin"]), abs=1e-6)  # -log s(-x) = -log s(x) + x


def processes(seeds=range(8)):
    """Tokens, where they are read, and labels."""
    made = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        tokens, steps = rng.integers(3, 96, rng.integers(6, 20)), rng.integers(1, 4)
        ends = np.sort(rng.choice(np.arange(2, len(tokens)), steps, replace=False))
        made.append((tokens.tolist(), ends, rng.integers(0, 2, steps)))
    return made


def test_a_process_is_judged_step_by_step():
    made = []
    for tokens, ends, labels in processes():
        columns = {name: np.zeros(len(tokens), np.float32) for name in ("weights", "labels")}
        columns["weights"][ends], columns["labels"][ends] = 1, labels
        tokens = np.asarray(tokens, np.int32)
        made.append({"tokens": tokens, "targets": tokens, "positions": np.arange(len(tokens)), **columns})

    def plain(params):
        losses = []
        hidden = hidden_of(params, [tokens for tokens, *_ in processes()], jnp.float64)
        for row, (_, ends, labels) in zip(hidden, processes(), strict=True):
            logits = row[ends] @ params["score"]["weight"] + params["score"]["bias"][None]
            losses += [-jax.nn.log_softmax(one)[label] for one, label in zip(logits, labels, strict=True)]
        return jnp.stack(losses).mean()

    with jax.enable_x64(True):
        params = policy(STEPS, np.float64)
        recipe = make_recipe(Objective(type="process_reward"), STEPS, Compute(jnp.float64, "reference"))
        batch = {name: jnp.asarray(column) for name, column in filled(made, 8, ("labels",)).items()}
        got, found, metrics = value_and_grad(recipe, params, batch, 2)
        want, expected = jax.jit(jax.value_and_grad(plain))(params)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    assert_close(found, expected, 1e-9)
    assert metrics["good_steps"] == pytest.approx(np.mean(np.concatenate([labels for *_, labels in processes()])))


# Whole runs.


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pairs whose better answer has no 'zz', and steps that are wrong where they have it: separable."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("data")
    say = lambda most: " ".join(rng.choice(tiny.WORDS, rng.integers(1, most)))  # noqa: E731
    ask = lambda: [{"role": "user", "content": say(4)}]  # noqa: E731
    pairs = [{"prompt": ask(), "chosen": say(5), "rejected": f"{say(3)} zz {say(3)}", "margin": 1} for _ in range(80)]
    tiny.write_rows(folder / "pairs.jsonl", pairs[:60])
    tiny.write_rows(folder / "held_out.jsonl", pairs[60:])
    steps = []
    for _ in range(60):
        labels = [bool(rng.integers(2)) for _ in range(3)]
        steps.append({"prompt": say(4), "completions": [say(4) + " zz" * (not x) for x in labels], "labels": labels})
    tiny.write_rows(folder / "steps.jsonl", steps)
    return folder


def run(output, model, rows, *more):
    settings = (
        "data.eval=[]",
        "train.eval_every=0",
        "data.max_length=64",
        "train.batch_size=16",
        "optim.weight_decay=0",
    )
    more = ("tune.method=full", "optim.learning_rate=5e-3", *settings, *more)
    with tiny.one_device():
        train(load("reward", tiny.overrides(output, model, rows, *more)))
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model, data):
    """A run of two heads on separable pairs, and its metrics."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    held = ("train.eval_every=12", f"data.eval={data / 'held_out.jsonl'}")
    return folder, run(folder, tiny_model, data / "pairs.jsonl", "train.steps=24", "objective.num_labels=2", *held)


def said(*args):
    result = CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(autouse=True)
def _cache_elsewhere(monkeypatch):
    monkeypatch.setattr("sharding.compile_cache.enable_compilation_cache", lambda: None)


def test_separable_preferences_are_learnt(tmp_path, tiny_model, data, trained):
    folder, rows = trained
    assert rows[0]["loss"] == pytest.approx(np.log(1 + np.e), abs=0.2)  # near zero rewards, a margin of 1
    assert rows[-1]["accuracy"] == 1
    assert rows[-1]["loss"] < 0.2
    assert rows[-1]["eval_accuracy"] == 1
    before = json.loads(said("eval", tiny_model, "--data", data / "held_out.jsonl", "--json"))
    after = json.loads(said("eval", folder, "--data", data / "held_out.jsonl", "--json"))
    assert set(before) == {"sum", "mean"}
    assert set(after) == {"reward"}
    assert after["reward"]["accuracy"] == 1
    assert after["reward"]["pairs"] == 20 == sum(count for _, count in after["reward"]["by_length"].values())
    assert after["reward"]["margin"] == pytest.approx(rows[-1]["eval_margin"], rel=1e-4)
    source = tmp_path / "rows.jsonl"
    ask = [{"role": "user", "content": "red"}]
    answers = [[*ask, {"role": "assistant", "content": text}] for text in ("blue sun", "zz blue")]
    tiny.write_rows(source, [{"messages": messages} for messages in answers])
    good, bad = (json.loads(line) for line in said("score", folder, "--input", source, "--json").splitlines())
    assert good["reward"] > bad["reward"] + 1
    assert good["reward"] == pytest.approx(np.mean(good["rewards"]))
    model = load_model(str(folder), rewards=True)
    read = score_rewards(model, [good["tokens"], bad["tokens"]], batch_size=1)
    assert read.shape == (2, 2)
    np.testing.assert_allclose(read, [good["rewards"], bad["rewards"]], atol=1e-5)
    assert model.tokenizer.decode(good["tokens"][-1:]) == "<|im_end|>", "read at the end of the turn"
    (reward,) = load_rewards(Sample(reward=(str(folder),))).each.values()
    scores = reward.call([ask, ask], [messages[1:] for messages in answers])
    assert scores == pytest.approx([good["reward"], bad["reward"]], abs=1e-5), "of sampled completions"
    with pytest.raises(UsageError, match="is a language model, which may be"):
        load_rewards(Sample(reward=(str(tiny_model),)))
    config = json.loads((folder / "export" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert len(config["id2label"]) == 2
    assert config["pad_token_id"] == model.tokenizer.pad_id not in model.tokenizer.eos_ids


@pytest.mark.slow
def test_adapters_and_a_whole_head(tmp_path, tiny_model, data):
    options = ("tune.method=lora", "tune.r=4", "export.merge=true", "train.steps=20")
    rows = run(tmp_path / "run", tiny_model, data / "pairs.jsonl", *options, "optim.learning_rate=2e-2")
    assert rows[-1]["accuracy"] > 0.95
    # a run without its export is read from the checkpoint: trunk, adapters and head
    merged = flatten(load_params(resolve(tmp_path / "run")))
    (tmp_path / "run" / "export").rename(tmp_path / "elsewhere")
    attached = resolve(tmp_path / "run")
    assert attached.arch.num_labels == 1
    assert_close(merged, lora.merge(load_params(attached)), 1e-5)
    # what has a head keeps it, what has none gets one by the seed
    assert not with_scores(resolve(tmp_path / "elsewhere"), 1, False, 0).fresh
    made = [with_scores(resolve(tiny_model), 2, True, seed).fresh for seed in (0, 0, 1)]
    assert (made[0]["score/weight"] == made[1]["score/weight"]).all()
    assert (made[0]["score/weight"] != made[2]["score/weight"]).all()


def test_steps_are_learnt(tmp_path, tiny_model, data):
    rows = run(tmp_path / "run", tiny_model, data / "steps.jsonl", "objective.type=process_reward", "train.steps=30")
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=0.1)
    assert rows[-1]["accuracy"] > 0.97
    source = tiny.write_rows(
        tmp_path / "rows.jsonl", [{"prompt": "red", "completions": ["blue sun", "sea zz", "moon"]}]
    )
    row = json.loads(said("score", tmp_path / "run", "--input", source, "--json"))
    assert [reward > 0 for reward in row["rewards"]] == [True, False, True]
    assert row["reward"] == min(row["rewards"])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("tune.method=lora", "export.merge=false"), "export.merge is false"),
        (("objective.num_labels=0",), "num_labels"),
        (("objective.center_rewards_coefficient=-1",), "center_rewards_coefficient"),
        (("log.samples=x",), "answers nothing"),
    ],
)
def test_contradictions_are_refused(more, words):
    with pytest.raises(UsageError, match=words):
        load("reward", ["model.source=x", "data.train=y", *more])


def test_a_head_for_another_job_is_refused(tmp_path, tiny_model, data, trained):
    model = trained[0] / "export"
    with pytest.raises(UsageError, match=r"objective.type=reward: .* with 2 head\(s\), wanted are sequences with 1"):
        run(tmp_path / "a", model, data / "pairs.jsonl")
    with pytest.raises(UsageError, match=r"objective.type=process_reward: .* wanted are tokens"):
        run(tmp_path / "b", model, data / "steps.jsonl", "objective.type=process_reward")
    with pytest.raises(UsageError, match=r"objective.type=sft: .* is a reward model: .* no language-model head"):
        run(tmp_path / "c", model, data / "pairs.jsonl", "objective.type=sft")
    for command in (["generate", model, "red"], ["chat", model]):
        with pytest.raises(UsageError, match="no language-model head"):
            CliRunner().invoke(app, [str(a) for a in command], catch_exceptions=False)
    with pytest.raises(UsageError, match="no score head"):
        score_rewards(load_model(str(tiny_model)), [[5, 6]])
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": "red", "completions": ["blue"]}])
    with pytest.raises(UsageError, match=r"rows.jsonl:1: 'completions' are the steps"):
        CliRunner().invoke(app, ["score", str(model), "--input", str(rows)], catch_exceptions=False)
    with pytest.raises(UsageError, match="needs chosen and rejected"):
        run(tmp_path / "d", tiny_model, data / "steps.jsonl")
    with pytest.raises(UsageError, match="trains on rows"):
        run(tmp_path / "e", tiny_model, data / "pairs.jsonl", "objective.type=process_reward")
