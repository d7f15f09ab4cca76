"""Rounds of sampling and training: each goes on from the one before, stopped anywhere and run again included."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from configs.errors import UsageError
from configs.load import load
from convert.load import resolve
from tests.train import tiny
from train import loop
from train import rounds as module
from train import sample as sampling
from train.rounds import train_rounds

MORE = ("train.rounds=2", "train.steps=2", "data.max_length=64", "optim.learning_rate=1e-2", "checkpoint.every=1")


@pytest.fixture
def run_of(tmp_path, sampling_settings, monkeypatch):
    """run_of(name, *overrides) -> two rounds of a tiny model on one device; held-out: the same prompts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sampling, "PER_CALL", 2)
    (asked,) = (one for one in sampling_settings if one.startswith("data.train="))

    def make(name, *more, recipe="dpo"):
        held_out = asked.replace("train", "eval", 1)
        return load(recipe, [f"output={tmp_path / name}", *sampling_settings, held_out, *MORE, *more])

    with tiny.one_device():
        yield make


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


LORA = ("tune.method=lora", "tune.r=4")


def weights(folder):
    (file,) = (folder / "export").glob("*.safetensors")
    return load_file(file)


def same(one, other):
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)


@pytest.mark.slow
def test_each_round_starts_from_the_one_before_and_may_be_interrupted(run_of, tmp_path, monkeypatch, capsys):
    whole = train_rounds(run_of("whole", *LORA))
    said = capsys.readouterr().err
    assert all(f"held-out {when}" in said for when in ("at the start", "after round 1", "after round 2"))
    for number in (1, 2):
        first, *_ = rows_of(whole / f"round-{number}" / "metrics.jsonl")
        assert first["loss"] == pytest.approx(0.693147, abs=1e-5), "the round's start is its reference"
    second = load(whole / "round-2")
    assert second.tune.init_adapter == str(whole / "round-1" / "export"), "one adapter goes on"
    assert second.model == load(whole).model
    assert second.data.train == (str(whole / "round-2" / "preferences.jsonl"),)
    seeds = [row["seed"] for n in (1, 2) for row in rows_of(whole / f"round-{n}" / "samples.jsonl")]
    assert len(set(seeds)) == 20
    models = [{row["model"] for row in rows_of(whole / f"round-{n}" / "preferences.jsonl")} for n in (1, 2)]
    assert models == [{load(whole).model.source}, {str(whole / "round-1" / "export")}]
    assert (whole / "export").readlink() == Path("round-2/export")
    assert resolve(str(whole)).kind == "adapter"
    report = rows_of(whole / "rounds.jsonl")
    assert [row["round"] for row in report] == [0, 1, 2]
    assert report[2]["held_out_reward"] != report[1]["held_out_reward"] != report[0]["held_out_reward"]
    assert report[1]["reward"] == report[0]["held_out_reward"], "the same prompts, seeds and model"
    assert {"ties", "rewards/accuracies", "rewards/small.py:letters", "held_out_truncated"} <= report[2].keys()

    def interrupt(*_):
        raise KeyboardInterrupt

    def stop(run):
        if run.output.endswith("round-2"):
            monkeypatch.setattr(loop.Loop, "_log", interrupt)  # in its first step
        return loop.train(run)

    log = loop.Loop._log
    monkeypatch.setattr(module, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        train_rounds(run_of("cut", *LORA))
    monkeypatch.setattr(module, "train", loop.train)
    monkeypatch.setattr(loop.Loop, "_log", log)
    assert not (tmp_path / "cut" / "export").exists()
    kept = tmp_path / "cut" / "round-1" / "export" / "adapter_model.safetensors"
    before = kept.stat().st_mtime_ns
    cut = train_rounds(run_of("cut", *LORA))
    assert kept.stat().st_mtime_ns == before, "a finished round is not done again"
    for number in (1, 2):
        same(weights(cut / f"round-{number}"), weights(whole / f"round-{number}"))
    assert (cut / "rounds.jsonl").read_text() == (whole / "rounds.jsonl").read_text()

    with pytest.raises(UsageError, match=r"another config.*\n  sample\.temperature: 1\.0 -> 0\.5"):
        train_rounds(run_of("cut", *LORA, "sample.temperature=0.5"))
    with pytest.raises(UsageError, match=r"another config.*\n  train\.rounds: 2 -> 0"):
        loop.train(run_of("cut", *LORA, "train.rounds=0"))


def test_every_weight_and_the_best_completions(run_of, tmp_path):
    """Expert iteration: the same rounds with another objective and another choice; and one round more."""
    folder = train_rounds(run_of("sft", "sample.keep=best", "train.rounds=1", recipe="sft"))
    assert (folder / "export").readlink() == Path("round-1/export")
    assert train_rounds(run_of("sft", "sample.keep=best", recipe="sft")) == folder
    second = load(folder / "round-2")
    assert second.model.source == str(folder / "round-1" / "export")
    assert second.data.train == (str(folder / "round-2" / "completions.jsonl"),)
    rewards = [row["held_out_reward"] for row in rows_of(folder / "rounds.jsonl")]
    assert rewards[2] > rewards[0]
    assert resolve(str(folder)).kind == "hf"


@pytest.mark.slow
def test_rounds_from_the_base_with_all_that_was_kept(run_of, tmp_path):
    """STaR: every round trains the first model, on its own samples by the newest one and on those before."""
    star = ("sample.keep=all", "train.round_start=base", "train.accumulate=true")
    folder = train_rounds(run_of("star", *star, *LORA, recipe="sft"))
    first, second = load(folder / "round-1"), load(folder / "round-2")
    assert second.model == first.model
    assert first.tune.init_adapter is second.tune.init_adapter is None
    files = [str(folder / f"round-{n}" / "completions.jsonl") for n in (1, 2)]
    assert (first.data.train, second.data.train) == ((files[0],), tuple(files))
    assert {row["model"] for row in rows_of(Path(files[1]))} == {str(folder / "round-1" / "export")}
    before = (folder / "rounds.jsonl").read_text()
    assert train_rounds(run_of("star", *star, *LORA, recipe="sft")) == folder
    assert (folder / "rounds.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("sample.keep=best",), r"sample.keep is best and objective.type is dpo, which trains on pairs"),
        (("train.eval_every=2",), "in rounds data.eval is prompts"),
        (("train.eval_on_start=true",), "train.eval_on_start is True and train.rounds is"),
        ((*LORA, "objective.reference=adapterless"), "a later round starts with adapters"),
        (("data.max_length=99",), "data.max_length 99 is beyond the model's context"),
        (("sample.reward=nowhere:f",), "cannot be imported"),
        (("sample.max_new_tokens=60",), "max_new_tokens is 60"),
    ],
)
def test_refused_before_anything_is_written(run_of, tmp_path, more, words):
    with pytest.raises(UsageError, match=words):
        train_rounds(run_of("bad", *more))
    assert not (tmp_path / "bad").exists()
