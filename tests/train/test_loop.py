"""Whole runs of a tiny model: what they leave behind, running again, other meshes and configs, evaluation, export."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.errors import RunError, UsageError
from convert.load import load_params, load_tokenizer, resolve
from model import lora
from model.compute import Compute
from model.transformer import forward
from model.tree import flatten
from tests.train import tiny
from train.checkpoint import Checkpoints
from train.loop import train
from train.marks import differences
from train.metrics import TIME_FIELDS, cut_metrics, is_time
from train.setup import Job

FULL = ("log.tensorboard=true", "log.preflight=true")
LORA = ("tune.method=lora", "tune.r=4", "optim.weight_decay=0")


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(folder):
    return [{k: v for k, v in row.items() if not is_time(k)} for row in metrics(folder)]


def saved(folder, step=None):
    """{path: array} of a checkpoint."""
    checkpoints = Checkpoints(folder)
    step = checkpoints.latest() if step is None else step
    return checkpoints.arrays(step), checkpoints.meta(step)


def same(a, b):
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def logits(model):
    source = resolve(model)
    params = load_params(source, dtype=np.float32)
    tokens = jnp.arange(24).reshape(2, 12)
    where = jnp.broadcast_to(jnp.arange(12), (2, 12))
    compute = Compute(np.float32, "reference")
    hidden = jax.jit(lambda p: forward(source.arch, compute, p, tokens, where, jnp.ones_like(tokens)))
    return np.asarray(hidden(params)) @ np.asarray(lora.detach(params)["embed"]["weight"]).T


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model, chats):
    """A whole run of 12 steps on 8 devices; tests copy it before they change anything."""
    from configs.load import load

    folder = tmp_path_factory.mktemp("finished") / "run"
    run = load("sft", tiny.overrides(folder, tiny_model, chats, *FULL))
    assert train(run) == folder
    return run


@pytest.fixture
def copy(finished, tmp_path):
    """copy(drop=steps) -> (folder, run): the finished run, less its checkpoints after some step."""
    folder = tmp_path / "copy"
    shutil.copytree(finished.output, folder)

    def cut(back_to=None, export=True, **changes):
        for step in (folder / "checkpoints").iterdir():
            if back_to is not None and int(step.name) > back_to:
                shutil.rmtree(step)
        if not export:
            shutil.rmtree(folder / "export")
        return folder, finished.model_copy(update={"output": str(folder), **changes})

    return cut


def test_what_a_run_leaves_behind(finished):
    folder = Path(finished.output)
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoints", "config.yaml", "export", "metrics.jsonl", "tensorboard"
    ]  # fmt: skip
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["12", "8"]
    assert (folder / "export" / "model.safetensors").is_file()
    assert list((folder / "tensorboard").iterdir())
    rows = metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert set(rows[0]) == {
        "step", "loss", "objective", "token_accuracy", "grad_norm", "learning_rate", "tokens", "time/data", *TIME_FIELDS
    }  # fmt: skip
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[0]["learning_rate"] == 0
    assert rows[1]["learning_rate"] == pytest.approx(1e-3)
    _, meta = saved(folder)
    assert meta["tokens"] == rows[-1]["tokens"]
    assert meta["config"] == (folder / "config.yaml").read_text()


def test_the_same_command_again_only_exports(finished, copy, monkeypatch):
    folder, run = copy(export=False)
    monkeypatch.setattr("train.setup.Job.step_for", lambda *_: pytest.fail("a step was made"))
    train(run)
    same(saved(folder)[0], saved(Path(finished.output))[0])
    assert metrics(folder) == metrics(Path(finished.output))
    theirs, ours = Path(finished.output) / "export", folder / "export"
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    train(run)  # and once more, over an export that is there
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()


def test_going_on_from_an_earlier_checkpoint_is_exact(finished, copy):
    folder, run = copy(back_to=8)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')  # a line that a kill cut in half
    train(run)
    assert timeless(folder) == timeless(Path(finished.output))
    (ours, meta), (theirs, want) = saved(folder), saved(Path(finished.output))
    same(ours, theirs)
    assert {**meta, "config": None} == {**want, "config": None}


def test_a_stale_export_is_gone_while_training_goes_on(finished, copy, monkeypatch):
    """A MODEL that is a run folder means its export where there is one: an old one would be taken for the result."""
    folder, run = copy(back_to=8)

    def look(*_):
        assert [p.name for p in folder.iterdir() if "export" in p.name] == []
        raise RunError("seen")

    monkeypatch.setattr("train.setup.Job.step_for", look)
    with pytest.raises(RunError, match="seen"):
        train(run)


@pytest.mark.parametrize(
    "mesh", [pytest.param({"data": 8, "fsdp": 1}, marks=pytest.mark.slow), {"data": 2, "fsdp": 2, "tensor": 2}]
)
def test_a_checkpoint_restores_on_another_mesh(finished, copy, mesh, monkeypatch):
    folder, run = copy(back_to=8, mesh=finished.mesh.model_copy(update=mesh))
    before, seen = saved(folder)[0], {}
    from train.loop import Loop

    resume = Loop._resume

    def spy(self, state):
        step, state = resume(self, state)
        seen.update(state=flatten(state), mesh=self.job.mesh)
        found = {path: np.asarray(x) for path, x in seen["state"].items()}
        same(found, before)
        for path, x in seen["state"].items():
            assert x.sharding.mesh == self.job.mesh, path
        assert len({s.data.shape for s in seen["state"]["params/layers/mlp/up/weight"].addressable_shards}) == 1
        return step, state

    monkeypatch.setattr(Loop, "_resume", spy)
    train(run)
    assert {axis: seen["mesh"].shape[axis] for axis in mesh} == mesh
    for mine, theirs in zip(timeless(folder), timeless(Path(finished.output)), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["tokens"] == theirs["tokens"]


def test_another_config_in_the_same_folder_is_refused_with_the_difference(finished, copy):
    folder, run = copy(optim=finished.optim.model_copy(update={"learning_rate": 0.5}))
    with pytest.raises(UsageError) as raised:
        train(run)
    assert str(raised.value).splitlines() == [
        f"{folder} holds a run with another config; choose another output=..., or restore:",
        "  optim.learning_rate: 0.001 -> 0.5",
    ]
    assert "0.001" in (folder / "config.yaml").read_text()


def test_knobs_that_change_nothing_learnt_may_change(copy, finished):
    folder, run = copy(checkpoint=finished.checkpoint.model_copy(update={"every": 100}))
    train(run)
    assert "every: 100" in (folder / "config.yaml").read_text()


def test_a_checkpoint_of_another_model_is_refused(copy, tmp_path, finished):
    """The folder of the same name holds another model now: the shapes differ."""
    other = tiny.make_model(tmp_path / "models" / "other", hidden_size=16)
    folder, run = copy(model=finished.model.model_copy(update={"source": str(other)}))
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(finished.model.source, str(other)))
    with pytest.raises(RunError) as raised:
        train(run)
    lines = str(raised.value).splitlines()
    assert lines[0].startswith(f"{folder / 'checkpoints' / '12'} does not fit this run (has the model")
    assert "  params/layers/mlp/up/weight: (2, 32, 48) float32 in saved, (2, 16, 48) float32 in expected" in lines
    assert len(lines) == 14


@pytest.mark.parametrize("change", ["a row more", "a word"])
def test_changed_data_is_refused_on_resume(tmp_path, finished, copy, change):
    data = Path(finished.data.train[0])
    rows = data.read_text()
    other = tmp_path / data.name
    other.write_text(rows + rows.splitlines()[0] + "\n" if change == "a row more" else rows.replace("moon", "noon"))
    folder, run = copy(back_to=8, data=finished.data.model_copy(update={"train": (str(other),)}))
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(str(data), str(other)))
    with pytest.raises(UsageError) as raised:
        train(run)
    lines = str(raised.value).splitlines()
    assert lines[0] == (
        f"the data is not what {folder} was trained on up to step 8; restore the files, or choose another output=...:"
    )
    assert any(line.startswith("  0 rows.jsonl: ") for line in lines)
    assert ("  rows: 60 -> 61" in lines) == (change == "a row more")


def test_evaluation_while_training(make_run, chats, monkeypatch):
    held_out = tiny.write_rows(chats.with_name("held_out.jsonl"), tiny.make_chats(60, seed=1))  # two batches
    run = make_run("train.steps=5", "train.eval_every=2", f"data.eval={held_out}", "export.enabled=false")
    made, step_for = [], Job.step_for
    monkeypatch.setattr(Job, "step_for", lambda self, state: made.extend([self, step_for(self, state)]) or made[1])
    folder = train(run)
    job, step = made
    assert step._cache_size() == 1, "the step was traced more than once"
    assert job.evaluate._cache_size() == 1, "the evaluation was traced more than once"
    monkeypatch.undo()
    rows = metrics(folder)
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 4]
    assert 0 < rows[3]["eval_loss"] < rows[1]["eval_loss"] + 1
    assert set(rows[1]) - set(rows[0]) == {
        "eval_loss",
        "eval_token_accuracy",
        "eval_bits_per_byte",
        "time/evaluate",
    }
    # the evaluation changes nothing that is learnt
    without = train(make_run("train.steps=5", "export.enabled=false", output="without"))
    assert [row["loss"] for row in rows] == [row["loss"] for row in metrics(without)]


def test_a_loss_that_is_no_number_stops_the_run(make_run, tmp_path):
    run = make_run("optim.learning_rate=1e30", "optim.schedule=constant", "optim.warmup_ratio=0",
                   "optim.max_grad_norm=null", "checkpoint.every=1")  # fmt: skip
    said = r"step \d+: (loss|grad_norm) is (nan|inf) \(all that was read for it is finite\); the last checkpoint"
    with pytest.raises(RunError, match=said):
        train(run)
    checkpoints = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert checkpoints
    assert not (tmp_path / "run" / "export").exists()


def test_exports_have_the_logits_of_the_checkpoint(finished, make_run, tmp_path, tiny_model):
    """Run folder, its export, adapter, merged: the same model through convert.load."""

    def without_export(folder):
        beside = folder.with_name(folder.name + "-bare")
        shutil.copytree(folder, beside, ignore=shutil.ignore_patterns("export"))
        return beside

    base = logits(tiny_model)
    full = logits(finished.output)
    assert abs(full - base).max() > 1e-2
    np.testing.assert_array_equal(full, logits(Path(finished.output) / "export"))
    np.testing.assert_array_equal(full, logits(without_export(Path(finished.output))))
    folder = train(make_run(*LORA, "train.steps=4", "optim.learning_rate=1e-2", "optim.warmup_ratio=0"))
    assert sorted(p.name for p in (folder / "export").iterdir() if "adapter" in p.name) == [
        "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    attached = logits(folder)
    assert abs(attached - base).max() > 1e-2
    np.testing.assert_array_equal(attached, logits(without_export(folder)))
    assert resolve(folder / "export").kind == "adapter"
    # only the adapters are in the checkpoint
    assert all(p.endswith(("/a", "/b")) for p in saved(folder)[0] if p.startswith("params/"))
    run = make_run(*LORA, "train.steps=4", "optim.learning_rate=1e-2", "optim.warmup_ratio=0", "export.merge=true")
    train(run)  # finished already: this writes the other kind of export
    assert resolve(folder / "export").kind == "hf"
    np.testing.assert_allclose(logits(folder / "export"), attached, atol=1e-5)
    assert load_tokenizer(resolve(folder / "export")).chat_template == tiny.TEMPLATE


def test_only_part_of_the_weights(make_run, tiny_model):
    folder = train(make_run("train.steps=3", "tune.trainable=['layers/mlp/*']", "optim.decay_patterns=['*/up/*']"))
    before, after = (flatten(load_params(resolve(m))) for m in (tiny_model, folder / "export"))
    for path, x in before.items():
        assert np.array_equal(x, after[path]) == (not path.startswith("layers/mlp/")), path
    assert {p for p in saved(folder)[0] if p.startswith("params/")} == {
        f"params/layers/mlp/{name}/weight" for name in ("up", "gate", "down")
    }


def test_samples_before_and_after(make_run, tmp_path):
    asked = tiny.write_rows(tmp_path / "asked.jsonl", [
        {"messages": [{"role": "user", "content": "name"}], "expect": "e"},
        {"messages": [{"role": "system", "content": "sun"}, {"role": "user", "content": "my name is"}]},
    ])  # fmt: skip
    run = make_run("train.steps=2", f"log.samples={asked}", "log.sample_max_new_tokens=3", "export.enabled=false")
    kept = json.loads((train(run) / "samples.json").read_text())
    assert list(kept) == ["before", "after"]
    assert all(isinstance(row["answer"], str) for rows in kept.values() for row in rows)
    assert [row["messages"][-1]["content"] for row in kept["after"]] == ["name", "my name is"]


def test_metrics_are_cut_back_to_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    cut_metrics(path, 3)
    assert not path.exists()
    path.write_text("".join(f'{{"step": {i}}}\n' for i in range(1, 7)) + '{"step": 7')
    cut_metrics(path, 9)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    cut_metrics(path, 3)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_marks_see_a_change_anywhere_in_a_large_file(tmp_path, monkeypatch):
    from train import marks

    path = tmp_path / "x.bin"
    monkeypatch.setattr(marks, "BLOCK", 16)
    path.write_bytes(bytes(1000))
    seen = {marks._mark(path, 64)}
    for at in (0, 15, 500, 999):
        path.write_bytes(bytes(at) + b"x" + bytes(999 - at))
        seen.add(marks._mark(path, 64))
    assert len(seen) == 5
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == ["b: 2 -> 3", "c: absent -> 4"]
    path.write_bytes(bytes(1000))
    sampled = marks._mark(path, 4)
    for at in (0, 999):
        path.write_bytes(bytes(at) + b"x" + bytes(999 - at))
        assert marks._mark(path, 4) != sampled
