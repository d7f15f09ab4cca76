"""Rollouts: what is sampled is what is trained on, packed with each prompt once; runs that resume in the middle."""

import json

import jax
import numpy as np
import pytest

from configs.load import load
from data.prompts import Prompt
from decode.results import Completion
from tests.train import tiny
from train import loop
from train.groups import Group, pack, pack_arrays, places_of, portion_of, unpack_arrays
from train.loop import train
from train.metrics import is_time

MORE = ("train.steps=3", "train.batch_size=2", "sample.num_generations=4", "checkpoint.every=1", "data.max_length=64",
        "optim.learning_rate=1e-2")  # fmt: skip


@pytest.fixture
def run_of(tmp_path, sampling_settings):
    """run_of(name, *overrides) -> a run of grpo on a tiny model, on one device."""

    def make(name, *more):
        return load("grpo", [f"output={tmp_path / name}", *sampling_settings, *MORE, *more])

    with tiny.one_device():
        yield make


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(folder):
    return [{k: v for k, v in row.items() if not is_time(k)} for row in rows_of(folder / "metrics.jsonl")]


def make_group(rng, generations, longest, most):
    """Random tokens as a prompt and its completions."""
    prompt = rng.integers(1, 99, rng.integers(1, longest + 1)).tolist()
    made = []
    for _ in range(generations):
        tokens = rng.integers(1, 99, rng.integers(1, most + 1)).tolist()
        made.append(Completion(tokens, "", rng.normal(size=len(tokens)).tolist(), 0.0, "stop", prompt))
    return Group(Prompt("here", "", prompt, {}), made, {"completions": []})


def test_packed_groups_hold_each_completion_once_with_its_prompt(run_of):
    """In rows of any length, whether or not a group fits one, and never more rows than planned."""
    rng = np.random.default_rng(0)
    one = tiny_mesh()
    for trial in range(40):
        generations, longest, most = (int(rng.integers(1, high)) for high in (6, 12, 8))
        least = longest - 1 + most
        capacity = int(rng.integers(least, 3 * least + 10))
        run = run_of(
            "x", f"sample.num_generations={generations}", f"sample.max_new_tokens={most}", "train.batch_size=5",
            f"data.max_length={max(2, capacity)}", f"train.microbatch_rows={rng.integers(1, 4)}",
            "objective.advantage=reinforce",
        )  # fmt: skip
        portion = portion_of(run, longest, *one)
        groups = [make_group(rng, generations, longest, most if trial % 2 else max(1, most // 2)) for _ in range(5)]
        batch = pack(groups, run, portion, 0)
        assert batch["tokens"].shape == (portion.rows * portion.microbatches, max(2, capacity))
        wanted = [(group.prompt.tokens, made) for group in groups for made in group.made]
        places = places_of(batch["completions"])
        assert len(places) == len(wanted)
        for at, (prompt, made) in zip(places, wanted, strict=True):
            flat = {name: column.reshape(-1) for name, column in batch.items()}
            assert flat["targets"][at].tolist() == made.tokens
            assert flat["tokens"][at].tolist() == [prompt[-1], *made.tokens[:-1]]
            assert flat["positions"][at].tolist() == list(range(len(prompt) - 1, len(prompt) - 1 + len(made.tokens)))
            np.testing.assert_array_equal(flat["sampler_logprobs"][at], np.float32(made.logprobs))
            row, segment = at[0] // batch["tokens"].shape[1], flat["segments"][at[0]]
            mine = (batch["segments"][row] == segment) & (batch["branches"][row] == 0)
            assert batch["tokens"][row][mine].tolist() == prompt[:-1]
        assert (batch["weights"] > 0).sum() == sum(len(made.tokens) for _, made in wanted)


def tiny_mesh():
    from sharding.mesh import make_mesh
    from sharding.rules import make_rules

    return make_mesh({}, jax.devices()[:1]), make_rules("fsdp", {})


def test_arrays_as_text():
    columns = {"a": np.arange(6, dtype=np.int32).reshape(2, 3), "b": np.float32([1.5, -np.inf])}
    found = unpack_arrays(pack_arrays(columns))
    assert found.keys() == columns.keys()
    assert all((found[name] == x).all() and found[name].dtype == x.dtype for name, x in columns.items())


def test_a_run_tells_and_keeps_what_it_sampled(run_of, capsys):
    folder = train(run_of("run"))
    metrics, made = rows_of(folder / "metrics.jsonl"), rows_of(folder / "completions.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3]
    for row in metrics:
        assert row["ratio/min"] == row["ratio/max"] == 1, "on policy the ratio is exactly 1"
        assert row["sampler_gap/max"] < 1e-4
        mine = [one for group in made if group["step"] == row["step"] for one in group["completions"]]
        assert len(mine) == 8
        assert row["reward"] == pytest.approx(np.mean([one["reward"] for one in mine]))
        assert row["completions/mean_length"] == np.mean([len(one["tokens"]) for one in mine])
        assert row["tokens"] > 0
    assert all(abs(sum(one["advantage"] for one in group["completions"])) < 1e-4 for group in made)
    assert len({group["seed"] for group in made}) == 6
    assert "reward" in capsys.readouterr().err


@pytest.mark.parametrize("more", [(), ("objective.beta=0.1", "objective.num_iterations=2", "train.steps=4")])
def test_stopped_and_run_again_is_as_never_stopped(run_of, monkeypatch, more):
    """Also between a rollout and its last update, when the weights that made the samples are gone."""
    whole = train(run_of("whole", *more))

    class Stop(Exception):
        pass

    save = loop.Loop._save

    def stop(self, step, state):
        save(self, step, state)
        raise Stop

    run = run_of("parts", *more)
    for _ in range(run.train.steps):
        with monkeypatch.context() as patch:
            patch.setattr(loop.Loop, "_save", stop)
            with pytest.raises(Stop):
                train(run)
    parts = train(run)
    assert timeless(parts) == timeless(whole)
    assert rows_of(parts / "completions.jsonl") == rows_of(whole / "completions.jsonl")
    same(parts, whole)


def same(one, other):
    from safetensors.numpy import load_file

    found, wanted = (load_file(folder / "export" / "model.safetensors") for folder in (one, other))
    assert all((found[name] == x).all() for name, x in wanted.items())
