"""Bad steps change nothing: as if their batches had not been; rollback; resume amid them. Norms, profile."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.errors import RunError, UsageError
from model.tree import flatten
from sharding.mesh import make_mesh
from sharding.place import replicated
from tests.train import tiny
from tests.train.test_loop import metrics, same, saved, timeless
from train.faults import StopSignal
from train.guard import GOOD, KEY, Guard, judge, start_guard
from train.loop import Loop, train
from train.setup import Job
from train.state import init_state
from train.statistics import group_norms, group_of
from train.step import Columns, guarded, make_step

COLUMNS = Columns(
    gather=lambda carried, batch: ({}, {**carried, "mean": carried["mean"] + batch["tokens"].mean()}),
    start=lambda params: {"mean": jnp.zeros(())},
    follow=lambda carried, params, step: {**carried, "sum": params["w"].sum()} if "sum" in carried else carried,
)


def loss(params, batch, norms):
    """Quadratic; `harm` multiplies it, and so can make it infinite, no number, or a spike."""
    total = (batch["harm"] * (params["w"][batch["tokens"]] - 1) ** 2).sum()
    return total / norms["tokens"], {"loss": (total, jnp.float32(batch["tokens"].size))}


def batch_of(seed, harm=1.0):
    tokens = np.random.default_rng(seed).integers(0, 16, (4, 6)).astype(np.int32)
    return {"tokens": tokens, "segments": tokens * 0 + 1, "positions": tokens * 0,
            "harm": np.full((4, 6), harm, np.float32)}  # fmt: skip


def do(batches, guard, microbatches=1, state=None, columns=COLUMNS):
    tx, mesh = optax.adam(1e-2), make_mesh({}, jax.devices()[:1])
    if state is None:
        params = jax.device_put({"w": np.linspace(-1, 2, 16, dtype=np.float32)}, replicated(mesh))
        start = columns.start if guard is None else guarded(columns.start)
        state = init_state(params, tx, mesh, start)
    weights = lambda batch: {"tokens": jnp.float32(batch["tokens"].size)}  # noqa: E731
    step, rows = make_step(loss, weights, tx, microbatches, 1.0, None, columns, guard=guard), []
    for batch in batches:
        state, made = step(state, {"w": None}, batch)
        rows.append({name: float(x) for name, x in made.items()})
    return state, rows


def leaves(state, *left):
    return {path: np.asarray(x) for path, x in flatten(state).items() if path not in ("step", *left)}


@pytest.mark.parametrize("microbatches", [1, 2])
def test_skipped_is_as_if_the_batch_had_not_been(microbatches):
    good, bad = [batch_of(i) for i in range(30)], {25: np.nan, 26: np.inf, 28: 1e6, 3: np.nan}
    guard = Guard(spike_factor=100.0)
    mixed = [b for i, b in enumerate(good) for b in ([batch_of(99 + i, bad[i]), b] if i in bad else [b])]
    (without, want), (found, rows) = do(good, guard, microbatches), do(mixed, guard, microbatches)
    skipped = f"carried/{KEY}/skipped"
    same(leaves(found, skipped), leaves(without, skipped))
    assert int(found.step) == len(mixed) == int(without.step) + len(bad)
    assert [row["skipped"] for row in rows] == [float(b["harm"][0, 0] != 1) for b in mixed]
    assert rows[-1]["skipped_steps"] == len(bad)
    assert [row["loss"] for row in rows if not row["skipped"]] == [row["loss"] for row in want]


def test_the_guard_changes_no_good_step_and_its_absence_no_program():
    batches = [batch_of(i) for i in range(5)]
    (off, rows), (on, guarded_rows) = do(batches, None), do(batches, Guard(100.0))
    assert not any(KEY in path for path in flatten(off))
    same(leaves(off), {path: x for path, x in leaves(on).items() if KEY not in path})
    assert rows == [{name: row[name] for name in rows[0]} for row in guarded_rows]


def test_amid_bad_steps_the_state_holds_all_that_the_rest_needs():
    batches = [batch_of(i, np.nan if 24 <= i < 28 else 1.0) for i in range(32)]
    whole, rows = do(batches, Guard(3.0))
    half, _ = do(batches[:26], Guard(3.0))
    copied = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), half)
    assert int(half.carried[KEY]["bad"]) == 2
    found, more = do(batches[26:], Guard(3.0), state=copied)
    same(leaves(found), leaves(whole))
    same({str(i): np.array(list(r.values())) for i, r in enumerate(more)},
         {str(i): np.array(list(r.values())) for i, r in enumerate(rows[26:])})  # fmt: skip


def test_a_spike_is_one_against_the_running_average_of_good_steps_only():
    seen, guard = start_guard(), Guard(2.0)
    ask = jax.jit(lambda seen, norm: judge(guard, seen, jnp.float32(1), norm))
    for i in range(GOOD):
        bad, seen = ask(seen, jnp.float32(4.0 if i % 2 else 1.0))
        assert not bad
    assert float(jnp.exp(seen["log_norm"])) == pytest.approx(2)  # of few steps, their geometric mean
    bad, after = ask(seen, jnp.float32(4.1))
    assert bad
    assert {**after, "bad": 0, "skipped": 0} == {**seen, "bad": 0, "skipped": 0}
    assert not ask(seen, jnp.float32(3.9))[0]
    bad, after = ask(seen, jnp.float32(0.0))  # nothing to learn: no bad step, and no part of the average
    assert (bool(bad), after["log_norm"], after["good"]) == (False, seen["log_norm"], seen["good"])


def test_groups_of_weights():
    groups = {
        "embed/weight": "embed", "layers/attn/q/weight": "attention", "layers/attn/q_norm/scale": "norms",
        "layers/attn_norm/scale": "norms", "norm/scale": "norms", "layers/mlp/up/weight": "mlp",
        "head/weight": "head", "score/bias": "head", "layers/mlp/up/weight/a": "adapters",
    }  # fmt: skip
    assert {path: group_of(path) for path in groups} == groups
    made = group_norms("n", {"embed": {"weight": jnp.array([3.0])}, "head": {"weight": jnp.array([4.0]), "bias": None}})
    assert {name: float(x) for name, x in made.items()} == {"n/embed": 3, "n/head": 4}


# Whole runs, whose step turns chosen batches into harm.


@pytest.fixture(autouse=True)
def _one_device():
    with tiny.one_device():
        yield


@pytest.fixture
def harm(monkeypatch):
    """harm(*steps): at these steps the loss is no number; the data is found by the loop's own count."""
    chosen, following, make = set(), Loop._next, Job.step_for

    def spoil(self, state, step, *more):
        batch, told, rest = following(self, state, step, *more)
        if step in chosen:
            batch = {**batch, "weights": batch["weights"] * jnp.nan}
        return batch, told, rest

    monkeypatch.setattr(Loop, "_next", spoil)
    assert make is Job.step_for
    return lambda *steps: chosen.clear() or chosen.update(steps)


SKIP = ("train.on_bad_step=skip", "export.enabled=false", "optim.warmup_ratio=0", "optim.schedule=linear")


def test_a_run_leaves_bad_steps_out_and_rolls_back(make_run, harm, tmp_path, capfd):
    """Saved at 4; 6 to 8 bad: back to 4; then 11 bad alone."""
    harm(6, 7, 8, 11)
    run = make_run(*SKIP, "train.max_bad_steps=3", "checkpoint.keep=9")
    folder = train(run)
    rows = metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["step"] for row in rows if row["skipped"]] == [6, 7, 8, 11]
    assert [row["loss"] is None for row in rows] == [bool(row["skipped"]) for row in rows]
    assert [row["skipped_steps"] for row in rows] == [0] * 5 + [1, 2, 3] + [4, 4, 5, 5]  # 5 is lost with the rollback
    told = " ".join(capfd.readouterr().err.split())
    assert (
        "step 8: 3 bad steps in a row, the last with loss nan and grad_norm nan: back to the weights of step 4" in told
    )
    assert sorted(int(p.name) for p in (folder / "checkpoints").iterdir()) == [4, 8, 12]
    four, eight = saved(folder, 4)[0], saved(folder, 8)[0]
    for path, x in four.items():
        if KEY not in path and path != "step":
            np.testing.assert_array_equal(eight[path], x, err_msg=path)
    assert int(eight["step"]) == 8
    # the rates are those of updates made: step 9 is the fifth
    assert rows[8]["learning_rate"] == rows[4]["learning_rate"]
    # gone on from right behind the rollback: bitwise
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoints" / "12")
    train(run.model_copy(update={"output": str(again)}))
    assert timeless(again) == timeless(folder)
    same(saved(again)[0], saved(folder)[0])


def test_stopped_amid_a_bad_stretch_and_gone_on(make_run, harm, monkeypatch):
    """SIGTERM at step 7 of the bad 6 to 8: the rollback is to 4, as without."""
    from contextlib import contextmanager

    harm(6, 7, 8)
    more = (*SKIP, "train.max_bad_steps=3")
    whole = train(make_run(*more, output="whole"))

    class AtSeven(StopSignal):
        def __call__(self, step):
            return step == 7

    @contextmanager
    def stop():
        yield AtSeven()

    with monkeypatch.context() as patch:
        patch.setattr("train.loop.stop_signal", stop)
        folder = train(make_run(*more))
    assert metrics(folder)[-1]["step"] == 7
    train(make_run(*more))
    assert timeless(folder) == timeless(whole)
    same(saved(folder)[0], saved(whole)[0])


@pytest.mark.parametrize(
    ("steps", "more", "words"),
    [
        ((2, 3), ("train.max_bad_steps=2",), "step 3: 2 bad steps in a row, .* no checkpoint from before them"),
        ((6, 7, 9), ("train.max_bad_steps=1", "train.max_rollbacks=1"), "step 7: 1 bad .* after 1 rollbacks of train"),
    ],
)  # fmt: skip
def test_where_it_ends(make_run, harm, steps, more, words):
    harm(*steps)
    with pytest.raises(RunError, match=words):
        train(make_run(*SKIP, *more))


def test_a_spike_stops_a_run_that_skips_nothing(make_run, monkeypatch):
    monkeypatch.setattr("train.guard.GOOD", 2)
    run = make_run("train.spike_factor=1.000001", "optim.learning_rate=0.3", "optim.warmup_ratio=0")
    with pytest.raises(RunError, match=r"step \d+: grad_norm .* is above train.spike_factor=1 x the running average"):
        train(run)


@pytest.mark.slow
def test_norms_activations_goodput_and_a_profile(make_run, capfd):
    run = make_run(
        "train.steps=4", "log.norms=true", "log.activations_every=2", "train.profile_steps=[2,3]",
        "train.microbatches=2", "export.enabled=false", "checkpoint.enabled=false",
    )  # fmt: skip
    folder = train(run)
    rows = metrics(folder)
    groups = ("embed", "attention", "mlp", "norms")
    for row in rows:
        total = np.sqrt(sum(row[f"grad_norm/{group}"] ** 2 for group in groups))
        assert total == pytest.approx(row["grad_norm"], rel=1e-5)
        assert all(row[f"weight_norm/{group}"] > 0 for group in groups)
        assert 0 <= row["goodput"] <= 1
        assert row["time/data"] >= 0
    assert rows[0]["update_norm/mlp"] == 0  # the warmup's first rate
    assert rows[1]["update_norm/mlp"] > 0
    assert [row["step"] for row in rows if "activations/residual_rms" in row] == [2, 4]
    for name in ("residual", "attention", "mlp"):
        rms, most = (rows[1][f"activations/{name}_{what}"] for what in ("rms", "max"))
        assert len(rms) == len(most) == 2
        assert all(0 < r < m for r, m in zip(rms, most, strict=True))
    assert list((folder / "profile").rglob("*.xplane.pb"))
    plain = train(make_run("train.steps=4", "train.microbatches=2", "export.enabled=false",
                           "checkpoint.enabled=false", output="plain"))  # fmt: skip
    assert [r["loss"] for r in metrics(plain)] == [r["loss"] for r in rows]
    assert not (plain / "profile").exists()
    json.dumps(rows, allow_nan=False)


def test_a_profile_of_steps_that_are_not_there(make_run, tmp_path):
    with pytest.raises(UsageError, match=r"train.profile_steps is \[5, 3\], allowed"):
        make_run("train.profile_steps=[5,3]")
    with pytest.raises(UsageError, match=r"profile_steps is \[5, 13\], but the run ends with step 12"):
        train(make_run("train.profile_steps=[5,13]"))
    assert not (tmp_path / "run").exists()
