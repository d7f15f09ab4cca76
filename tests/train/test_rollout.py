"""Rollouts: what is sampled is what is trained on, packed with each prompt once; runs that resume in the middle."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from configs.errors import RunError, UsageError
from configs.load import load
from data.prompts import Prompt
from decode.jsonl import dump_row
from decode.results import Completion
from tests.train import tiny
from train import loop, rollout
from train.groups import Group, pack, pack_arrays, places_of, portion_of, unpack_arrays
from train.loop import train
from train.metrics import Bar, cut_metrics, is_time
from train.rewards import Judged, Reward, Rewards
from train.rollout import Rollouts, fitting
from train.setup import Job
from train.state import State

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
        for group, value in zip(groups, rng.integers(0, 2, 5).tolist(), strict=True):
            group.advantages = [np.full(len(one.tokens), value) for one in group.made]
        batch = pack(groups, run, portion, 0)
        assert batch["tokens"].shape == (portion.rows * portion.microbatches, max(2, capacity))
        wanted = [(group.prompt.tokens, made) for group in groups for made in group.made]
        apart = [set(), set()]
        neutral = (group.neutral for group in groups for _ in group.made)
        places = places_of(batch["completions"])
        assert len(places) == len(wanted)
        for at, (prompt, made) in zip(places, wanted, strict=True):
            flat = {name: column.reshape(-1) for name, column in batch.items()}
            assert flat["targets"][at].tolist() == made.tokens
            assert flat["tokens"][at].tolist() == [prompt[-1], *made.tokens[:-1]]
            assert flat["positions"][at].tolist() == list(range(len(prompt) - 1, len(prompt) - 1 + len(made.tokens)))
            np.testing.assert_array_equal(flat["sampler_logprobs"][at], np.float32(made.logprobs))
            row, segment = at[0] // batch["tokens"].shape[1], flat["segments"][at[0]]
            apart[next(neutral)].add(row % portion.microbatches)
            mine = (batch["segments"][row] == segment) & (batch["branches"][row] == 0)
            assert batch["tokens"][row][mine].tolist() == prompt[:-1]
        assert max(apart[0], default=-1) < min(apart[1], default=99), "what is not learnt from comes in parts behind"
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


@pytest.mark.parametrize(
    "more",
    [pytest.param((), marks=pytest.mark.slow), ("objective.beta=0.1", "objective.num_iterations=2", "train.steps=4")],
)
def test_stopped_and_run_again_is_as_never_stopped(run_of, monkeypatch, more):
    """Also between a rollout and its last update, when the weights that made the samples are gone."""
    whole = train(run_of("whole", *more))

    class Stop(Exception):
        pass

    save = loop.Loop._save

    def stop(self, *given):
        save(self, *given)
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


@pytest.mark.slow
def test_one_device_or_many_learn_the_same(tmp_path, sampling_settings):
    """The same samples, rewards and steps, whatever the mesh; with a reference, and the adapters of two steps each."""
    more = (*MORE, "objective.beta=0.1", "tune.method=lora", "tune.r=4", "objective.num_iterations=2",
            "objective.reference=adapterless", "train.steps=2", "sample.batch_size=8")  # fmt: skip
    settings = [*sampling_settings, *more]
    with tiny.one_device():
        one = train(load("grpo", [f"output={tmp_path / 'one'}", *settings]))
    many = train(
        load("grpo", [f"output={tmp_path / 'many'}", *settings, "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"])
    )
    ours, theirs = (rows_of(folder / "completions.jsonl") for folder in (one, many))
    assert [[one["tokens"] for one in row["completions"]] for row in ours] == [
        [one["tokens"] for one in row["completions"]] for row in theirs
    ]
    for mine, other in zip(timeless(one), timeless(many), strict=True):
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            if name not in ("memory_gib", "mfu", "rollout/slots_live"):
                assert other[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_what_goes_wrong_is_counted_named_and_kept(run_of, tmp_path, monkeypatch, capsys):
    """A reward without numbers for some, one that is always the same, one that raises: the run goes on as told."""
    monkeypatch.setattr(rollout, "PATIENCE", 2)
    (tmp_path / "mine.py").write_text(
        "def nan(completions, **_):\n    return [float('nan') if i % 4 == 0 else i for i in range(len(completions))]\n"
        "def same(completions, **_):\n    return [1] * len(completions)\n"
        "def raises(**_):\n    raise ZeroDivisionError('by zero')\n"
    )
    rewards = ",".join(f"{tmp_path / 'mine.py'}:{name}" for name in ("nan", "same", "raises"))
    skip = ("sample.on_reward_error=skip", "sample.reward_timeout=null")
    held_out = run_of("any").data.train[0]
    eval_ = (f"data.eval=[{held_out}]", "train.eval_on_start=true", "train.eval_every=3")
    folder = train(run_of("run", f"sample.reward=[{rewards}]", *skip, *eval_))
    before, *steps = rows_of(folder / "metrics.jsonl")
    assert [before[name] for name in ("step", "eval_prompts", "eval_unjudged")] == [0, 10, 0]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert steps[-1]["eval_samples"] == 40
    for row in steps:
        assert row["rewards/mine.py:nan/failed"] == 2
        assert row["rewards/mine.py:raises/failed"] == 8
        assert row["rewards/mine.py:same/std"] == 0
        assert not {"rewards/mine.py:same/failed", "rewards/mine.py:raises/mean"} & row.keys()
    made = [one for row in rows_of(folder / "completions.jsonl") for one in row["completions"]]
    assert len(made) == 24
    assert sum(one["rewards"]["mine.py:nan"] is None for one in made) == 6
    assert all(one["rewards"]["mine.py:same"] == 1 for one in made)
    said = " ".join(capsys.readouterr().err.split())
    assert "reward 'mine.py:same': one score for all completions of 2 rollouts in a row" in said
    assert "reward 'mine.py:raises': one score" not in said
    assert "it raised ZeroDivisionError: by zero; not judged" in said


def test_nothing_to_learn_ends_the_run_if_told_to_and_no_completion_is_lost(run_of, tmp_path):
    (tmp_path / "mine.py").write_text("def same(completions, **_):\n    return [1] * len(completions)\n")
    reward = (f"sample.reward={tmp_path / 'mine.py'}:same", "sample.reward_timeout=null", "sample.max_uniform=2")
    with pytest.raises(RunError, match=r"step 2: in 2 rollouts in a row all completions of each prompt had one score"):
        train(run_of("run", *reward))
    assert [row["step"] for row in rows_of(tmp_path / "run" / "completions.jsonl")] == [1, 1, 2, 2]


def test_a_reward_that_fails_ends_the_run_and_no_completion_is_lost(run_of, tmp_path):
    (tmp_path / "mine.py").write_text("def raises(**_):\n    raise ZeroDivisionError('by zero')\n")
    with pytest.raises(RunError, match=r"reward 'mine.py:raises', .* it raised ZeroDivisionError: by zero"):
        train(run_of("run", f"sample.reward={tmp_path / 'mine.py'}:raises", "sample.reward_timeout=null"))
    with pytest.raises(RunError, match="by zero"):
        train(run_of("run", f"sample.reward={tmp_path / 'mine.py'}:raises", "sample.reward_timeout=null"))
    made = rows_of(tmp_path / "run" / "completions.jsonl")
    assert [len(row["completions"]) for row in made] == [4, 4], "none is lost, and none is there twice"
    assert all(one["tokens"] for row in made for one in row["completions"])


class Told:
    """A feed whose completions are given: each drawn prompt's rewards by its number."""

    def __init__(self, run, table):
        self.run, self.table, self.drawn = run, table, []
        prompts = [Prompt(f"row {i}", "", [i + 1], {}) for i in range(len(table))]
        rewards = Rewards({"letters": Reward(lambda **_: [])})
        portion = portion_of(run, 1, *tiny_mesh())
        self.feed = Rollouts(run, prompts, [], rewards, tiny.make_tokenizer(), (), portion)
        self.feed._sample = self.sample

    def sample(self, job, state, drawn, stats, step):
        self.drawn.append(len(drawn))
        self.feed._seconds["rollout"] = 1.0
        groups = []
        for number, prompt in drawn:
            scores = self.table[number % len(self.table)]
            rows = [{"rewards": {"letters": s}, "reward": s, "finish_reason": "stop", "text": ""} for s in scores]
            made = [Completion([5, 6], "", [-1.0, -1.0], -2.0, "stop", prompt.tokens) for _ in scores]
            groups.append(Group(prompt, made, {"prompt": "", "completions": rows}))
        return groups, Judged([], {}, {})

    def roll(self):
        said = []
        *both, told = self.feed._roll(object.__new__(Job), object.__new__(State), 1, said.append)
        groups, left = ([int(group.prompt.where.split()[1]) for group in several] for several in both)
        return groups, left, told


def test_dynamic_sampling_draws_on_until_enough_prompts_say_something(run_of):
    flat, varied = [1.0, 1.0], [0.0, 1.0]
    table = [varied, flat, flat, flat, varied, flat, varied, varied]
    more = ("data.shuffle=false", "sample.num_generations=2", "train.batch_size=4", "sample.max_gen_batches=5")
    told = Told(run_of("x", *more), table)
    groups, left, metrics = told.roll()
    assert groups == [0, 4, 6, 7]
    assert left == [1, 2, 3, 5]  # still in completions.jsonl
    assert told.drawn == [4, 4]  # 3 were missing: as many as the next power of two
    assert metrics["frac_reward_zero_std"] == 0.5  # of all that were drawn
    assert told.feed.drawn == 8


def test_dynamic_sampling_gives_up_and_fills_with_those_that_say_nothing(run_of):
    more = ("data.shuffle=false", "sample.num_generations=2", "train.batch_size=4", "sample.max_gen_batches=2")
    told = Told(run_of("x", *more), [[1.0, 1.0], [0.0, 0.0], [0.0, 1.0], [1.0, 1.0], *[[0.0, 0.0]] * 4])
    groups, left, _ = told.roll()
    assert groups == [2, 0, 1, 3]
    assert left == [4, 5, 6, 7]
    assert told.drawn == [4, 4]


def test_what_did_not_end_is_left_out_of_the_loss_if_told_to(run_of):
    rng = np.random.default_rng(1)
    group = make_group(rng, 4, 5, 6)
    group.made[::2] = [replace(one, finish_reason="length") for one in group.made[::2]]
    for masked in (False, True):
        run = run_of("x", f"objective.mask_truncated_completions={masked}", "sample.max_new_tokens=6")
        batch = pack([group], run, portion_of(run, 5, *tiny_mesh()), 0)
        flat = batch["weights"].reshape(-1)
        found = [flat[at].tolist() for at in places_of(batch["completions"])]
        assert found == [[float(one.finish_reason == "stop" or not masked)] * len(one.tokens) for one in group.made]


def test_a_completion_may_hold_any_end_of_line(tmp_path):
    """What is kept of completions.jsonl when a run goes on is whole, but for a last line that is not."""
    rows = [dump_row({"step": step, "text": "a\u2028b\x85c\x0bd"}) for step in (1, 2, 3)]
    (tmp_path / "completions.jsonl").write_text("\n".join([*rows, '{"step": 3, "te']), encoding="utf-8")
    cut_metrics(tmp_path / "completions.jsonl", 2)
    assert (tmp_path / "completions.jsonl").read_text(encoding="utf-8") == f"{rows[0]}\n{rows[1]}\n"


def test_prompts_too_long_for_a_row_are_refused_or_dropped(run_of, capsys):
    prompts = [Prompt(f"rows.jsonl:{i}", "", [1] * n, {}) for i, n in enumerate((3, 60, 7, 59))]
    run = run_of("x", "data.max_length=64", "sample.max_new_tokens=6")
    said = r"rows.jsonl:1: the prompt has 60 tokens.* leave out 1 prompts with data.truncation=drop"
    with pytest.raises(UsageError, match=said):
        fitting(run, prompts)
    kept = fitting(run_of("x", "data.max_length=64", "sample.max_new_tokens=6", "data.truncation=drop"), prompts)
    assert [len(prompt.tokens) for prompt in kept] == [3, 7, 59]
    assert "1 prompts are dropped" in capsys.readouterr().err
    with pytest.raises(UsageError, match="no prompt is left"):
        fitting(run_of("x", "data.max_length=64", "sample.max_new_tokens=6", "data.truncation=drop"), prompts[1:2])


@pytest.mark.parametrize(
    "reference", ["moving", *(pytest.param(one, marks=pytest.mark.slow) for one in ("cached", "model"))]
)
def test_references(run_of, tiny_model, tmp_path, reference):
    """At the first step a reference that is the start has KL 0, another model has not; each is one throughout."""
    other = tiny.make_model(tmp_path / "other", seed=7) if reference == "model" else None
    more = [f"objective.reference={reference}", *([f"objective.reference_model={other}"] if other else [])]
    folder = train(run_of("run", "objective.beta=0.05", *more, "train.steps=2"))
    first, second = rows_of(folder / "metrics.jsonl")
    if reference == "model":
        assert first["kl"] > 1e-3
    else:
        assert abs(first["kl"]) < 1e-6
    assert second["kl"] > 1e-6


def test_completions_that_teach_nothing_need_not_be_computed(run_of, tmp_path):
    """The weights after two steps are the same, whether or not they are; a reward of few grades."""
    (tmp_path / "mine.py").write_text(
        "def odd(completion_ids, **_):\n    return [sum(x) % 2 for x in completion_ids]\n"
    )
    reward = (f"sample.reward={tmp_path / 'mine.py'}:odd", "sample.reward_timeout=null", "sample.num_generations=2",
              "train.batch_size=6", "train.steps=2")  # fmt: skip
    found = []
    for skip in (True, False):
        folder = train(run_of(f"run-{skip}", *reward, f"objective.skip_neutral={skip}", "data.max_length=24"))
        found.append((folder, rows_of(folder / "metrics.jsonl")))
    (skipped, short), (whole, long) = found
    assert 0 < short[0]["frac_reward_zero_std"] < 1, "there is something to skip, and something to learn"
    for few, many in zip(short, long, strict=True):
        assert few["tokens"] < many["tokens"]
        assert few["grad_norm"] == pytest.approx(many["grad_norm"], rel=1e-5)
        assert few["objective"] == pytest.approx(many["objective"], abs=1e-6)
    close(skipped, whole)


def close(one, other):
    from safetensors.numpy import load_file

    found, wanted = (load_file(folder / "export" / "model.safetensors") for folder in (one, other))
    for name, x in wanted.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-4, atol=1e-6, err_msg=name)


RECIPES = {
    "grpo": ({"prompt": "red blue", "answer": "7"}, ["sample.reward=numeric"]),
    "grpo_math": ({"question": "one and two?", "answer": "1 + 2\n#### 3"}, []),
    "grpo_quickstart": ({"prompt": "two x three", "answer": "6"}, []),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_take_two_steps(tmp_path, name):
    """Their own settings on a tiny model, but for sizes."""
    row, more = RECIPES[name]
    model = tiny.make_model(tmp_path / "model", max_position_embeddings=512)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [row] * 4)
    sizes = (
        "data.max_length=256", "train.epochs=null", "train.steps=2", "train.batch_size=2", "train.eval_every=1",
        "train.compilation_cache=false", "sample.max_new_tokens=4", "sample.batch_size=16",
        f"data.eval={rows}", "log.tensorboard=false", f"output={tmp_path / 'run'}",
    )  # fmt: skip
    with tiny.one_device():
        folder = train(load(name, [f"model.source={model}", f"data.train={rows}", *sizes, *more]))
    metrics = [row for row in rows_of(folder / "metrics.jsonl") if row["step"]]
    assert len(metrics) == 2
    for row in metrics:
        assert 0 <= row["rewards/numeric/mean"] <= 1
        assert all(row[f"time/{phase}"] > 0 for phase in ("rollout", "update", "evaluate"))
        assert row["eval_samples"] == 4 * 8
    assert (folder / "export").exists()


ALGORITHMS = {
    "grpo": ["objective.loss_type=grpo"],
    "dr_grpo": ["objective.loss_type=dr_grpo", "objective.scale_rewards=none"],
    "rloo": [
        "objective.loss_type=grpo",
        "objective.advantage=rloo",
        "objective.importance_sampling_level=sequence_sum",
    ],
    "reinforce++": ["objective.loss_type=grpo", "objective.advantage=reinforce_plus_plus"],
}


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        pytest.param(name, seed, marks=() if (name, seed) == ("grpo", 0) else pytest.mark.slow)
        for name in ALGORITHMS
        for seed in range(3)
    ],
)
def test_short_sequences_become_the_best_there_are(run_of, tmp_path, name, seed):
    """From tokens at random to four odd ones within 50 steps; the whole way, from sampling to the update."""
    (tmp_path / "mine.py").write_text(
        "def odd(completion_ids, **_):\n    return [sum(x % 2 for x in one) / 4 for one in completion_ids]\n"
    )
    sizes = ("train.steps=50", "train.batch_size=4", "sample.num_generations=16", "sample.max_new_tokens=4",
             "sample.batch_size=64", "checkpoint.enabled=false", "export.enabled=false",
             "optim.learning_rate=2e-2")  # fmt: skip
    reward = (f"sample.reward={tmp_path / 'mine.py'}:odd", "sample.reward_timeout=null", f"sample.seed={1000 * seed}")
    folder = train(run_of("run", *sizes, *reward, *ALGORITHMS[name], "optim.schedule=linear"))
    rewards = [row["reward"] for row in rows_of(folder / "metrics.jsonl")]
    print(name, seed, rewards[0], rewards[-5:])
    assert rewards[0] < 0.7
    assert np.mean(rewards[-5:]) > 0.98


def test_what_is_shown_may_look_like_markup(capsys):
    bar = Bar(1, 0)
    bar.say("step 1: 'a' -> '[/INST] [red]b[/answer]': reward 1")
    bar.show(1, {"eval_reward": 0.25, "time/evaluate": 3.0})
    said = capsys.readouterr().err
    assert said == "step 1: 'a' -> '[/INST] [red]b[/answer]': reward 1\nstep 1: held out: reward 0.25\n"
