"""Rounds of on-policy training: sample from the current model, keep by score, train on it, go on from the result.

With preferences kept and objective.type=dpo this is iterative (online) DPO; with the best completions kept and
objective.type=sft, expert iteration.
"""

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.errors import UsageError
from configs.load import load
from configs.schema import Run
from convert.run import find_export
from data.prompts import Prompt
from decode.jsonl import write_rows
from decode.sampling import SEEDS
from sharding.compile_cache import enable_compilation_cache
from train.folder import check_same_run, record
from train.loop import train
from train.recipes import kind_of
from train.rewards import Rewards, load_rewards, weights_of
from train.sample import SAMPLES, load_policy, make_samples, open_prompts, policy_of, read_samples
from train.selection import describe, keep, summarise
from train.setup import prepare

HELD_OUT, ROUNDS, EXPORT = "held_out.jsonl", "rounds.jsonl", "export"


def train_rounds(run: Run) -> Path:
    """Do train.rounds rounds, or what is left of them; returns the run's folder, whose export is the last round's.

    Round n is the folder round-n: what the model said (samples.jsonl), what was kept of it, and the ordinary run that
    trained on that, from the round before's export (train.round_start=base: from the first model) and with it as the
    reference. data.train and data.eval are prompts; those of data.eval are answered and scored before the first round
    and after each.
    """
    if run.train.compilation_cache:
        enable_compilation_cache()
    folder = Path(run.output)
    check_rounds(run, folder)
    prepare(run)
    prompts = open_prompts(run, run.data.train)
    held_out = open_prompts(run, run.data.held_out[""]) if run.data.eval else []
    rewards = load_rewards(run.sample, [*prompts, *held_out])
    record(run, folder)
    now = run
    for number in range(run.train.rounds + 1):
        wanted = {folder / f"round-{number}" / HELD_OUT: (now, held_out)} if held_out else {}
        following = folder / f"round-{number + 1}"
        if number < run.train.rounds:
            wanted[following / SAMPLES] = (_reseed(now, number * len(prompts)), prompts)
        _make({path: what for path, what in wanted.items() if not path.exists()}, rewards)
        _report(run, folder, number)
        if number == run.train.rounds:
            break
        if find_export(following) is None:
            kept = keep(read_samples(following / SAMPLES), run.sample, policy_of(now), following)
            earlier = [folder / f"round-{i}" / kept.name for i in range(1, number + 1)] if run.train.accumulate else []
            start = run if run.train.round_start == "base" else now
            train(training(start, following, [*earlier, kept], last=number + 1 == run.train.rounds))
        if (export := find_export(following)) is None:
            return folder  # stopped: the loop has said how to go on
        now = go_on(now, export)
    _point(folder / EXPORT, f"round-{run.train.rounds}/{EXPORT}")
    return folder


def check_rounds(run: Run, folder: Path) -> None:
    """Refuse what could not be trained on, and a folder of another run; only the number of rounds may change."""
    weights_of(run.sample)
    learns_pairs, kind = kind_of(run.objective) != "lm", run.objective.type
    if learns_pairs != run.sample.makes_pairs:
        allowed = "pairs or all_pairs" if learns_pairs else "best or all"
        raise UsageError(f"sample.keep is {run.sample.keep} and objective.type is {kind}, which trains on {allowed}")
    config = folder / "config.yaml"
    if config.exists() and (before := load(config).train.rounds):
        run = run.model_copy(update={"train": run.train.model_copy(update={"rounds": before})})
    check_same_run(run, folder)


def training(now: Run, folder: Path, kept: Sequence[Path], last: bool) -> Run:
    """The ordinary run of a round; adapters stay apart until the last one, so that the next can go on with them."""
    return now.model_copy(
        update={
            "output": str(folder),
            "data": now.data.model_copy(update={"train": tuple(map(str, kept)), "eval": (), "format": "auto"}),
            "train": now.train.model_copy(update={"rounds": 0}),
            "export": now.export.model_copy(update={"enabled": True, "merge": now.export.merge and last}),
        }
    )


def go_on(now: Run, export: Path) -> Run:
    """The run that starts from a round's export: the same adapters, or a whole model."""
    if (export / "adapter_config.json").is_file():
        return now.model_copy(update={"tune": now.tune.model_copy(update={"init_adapter": str(export)})})
    return now.model_copy(
        update={
            "model": now.model.model_copy(update={"source": str(export), **OWN}),
            "tune": now.tune.model_copy(update={"init_adapter": None}),
        }
    )


OWN = {"init": "source", "tokenizer": None, "resize_vocab": False}  # an export is whole


def _reseed(run: Run, more: int) -> Run:
    """No two prompts of any rounds sample with one seed."""
    return run.model_copy(update={"sample": run.sample.model_copy(update={"seed": (run.sample.seed + more) % SEEDS})})


def _make(missing: Mapping[Path, tuple[Run, Sequence[Prompt]]], rewards: Rewards) -> None:
    """Sample what is not there yet; the model is in memory no longer than that."""
    if missing:
        model = load_policy(next(iter(missing.values()))[0])
        for path, (run, prompts) in missing.items():
            make_samples(run, model, rewards, prompts, path)


def _report(run: Run, folder: Path, number: int) -> None:
    """Say how the model after so many rounds does, and rewrite rounds.jsonl up to there."""
    rows: list[dict[str, Any]] = []
    for i in range(number + 1):
        place, row = folder / f"round-{i}", {"round": i}
        for path, prefix in ((place / SAMPLES, ""), (place / HELD_OUT, "held_out_")):
            if path.exists():
                row |= {f"{prefix}{name}": value for name, value in summarise(read_samples(path), run.sample).items()}
        metrics = place / "metrics.jsonl"
        if metrics.exists():
            *_, last = metrics.read_text(encoding="utf-8").splitlines()
            found = json.loads(last)
            row |= {name: found[name] for name in ("loss", "rewards/accuracies", "rewards/margins") if name in found}
        rows.append({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()})
    write_rows(str(folder / ROUNDS), rows)
    held_out = folder / f"round-{number}" / HELD_OUT
    if held_out.exists():
        when = f"after round {number}" if number else "at the start"
        print(f"held-out {when}: {describe(summarise(read_samples(held_out), run.sample))}", file=sys.stderr)


def _point(link: Path, target: str) -> None:
    """A relative link, replaced at once."""
    beside = link.with_name(f".{link.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target)
    beside.replace(link)
