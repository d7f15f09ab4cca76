"""Scores of completions: functions, reward models and a judge, each checked; and how they add up."""

import inspect
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from configs.errors import RunError, UsageError
from configs.sample import Sample
from data.prompts import Prompt, Value
from decode.results import Completion
from train.functions import BUILT_IN, GIVEN, ROW_BY_ROW, Function, Takes, load, nearest
from train.verifiers.extract import text_of
from train.workers import Hung, Pool, Worker

Score = float | None  # None: not judged
Columns = dict[str, Any]
ANYTHING = Takes(None, frozenset(), ())


@dataclass(frozen=True)
class Reward:
    """A reward as it is called: with the columns it takes; gives a score for each completion, or what went wrong."""

    call: Callable[..., Sequence[Any]]
    takes: Takes = ANYTHING


@dataclass
class Rewards:
    """The rewards of a run by short name, what a failure of one does, and how many scores so far failed, and how many
    took longer than a verifier may over a row."""

    each: dict[str, Reward]
    on_error: str = "stop"
    failed: dict[str, int] = field(default_factory=dict)
    late: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Judged:
    """Scores of every completion of every prompt; how many of a reward failed (they are None) or were late (0)."""

    scores: list[list[dict[str, Score]]]
    failed: dict[str, int]
    late: dict[str, int]


def weights_of(sample: Sample) -> dict[str, float]:
    """{short name of each reward: its weight}, in the order of sample.reward, the judge last."""
    names = [name.rpartition("/")[2] for name in sample.reward] + ["judge"] * (sample.judge is not None)
    if not names:
        raise UsageError("sample.reward is empty and sample.judge is not set: nothing says which completion is better")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"sample.reward has two of the name '{twice}': rename one")
    return dict(zip(names, sample.reward_weights or (1.0,) * len(names), strict=True))


def load_rewards(sample: Sample, prompts: Sequence[Prompt] = ()) -> Rewards:
    """The rewards of a run: what cannot be found or used on these prompts is refused before sampling."""
    names = list(weights_of(sample))
    for name in sample.reward_options:
        if name not in names:
            raise UsageError(
                f"sample.reward_options has '{name}', sample.reward has: {', '.join(names)}{nearest(names, name)}"
            )
    each: dict[str, Reward] = {}
    pool = Pool(sample.reward_workers)  # of processes; one starts when a row is to be judged
    for short, name in zip(names, sample.reward, strict=False):
        each[short] = _load(name, short, sample, pool)
    if sample.judge is not None:
        each["judge"] = Reward(_judge(sample, sample.judge))
    rewards = Rewards(each, sample.on_reward_error)
    if prompts:
        _check_columns(rewards, prompts, sample)
        _try(rewards, sample)
    return rewards


def _load(name: str, key: str, sample: Sample, pool: Pool) -> Reward:
    """A function here, or in another process where it may take for ever; or a reward MODEL."""
    function = ":" in name or name in BUILT_IN
    if not function:
        try:
            return Reward(_reward_model(name))
        except UsageError as error:
            raise UsageError(
                f"sample.reward '{name}' is no function (module:function, or file.py:function), none of the built-in "
                f"ones ({', '.join(BUILT_IN)}{nearest(BUILT_IN, name)}) and no reward MODEL: {error}"
            ) from error
    said = (name, key, json.dumps(sample.reward_options.get(key, {})))
    if name in ROW_BY_ROW:
        return Reward(*_row_by_row(said, pool))
    if name in BUILT_IN or sample.reward_timeout is None:
        return Reward(*load(*said))
    worker, seconds = Worker(), sample.reward_timeout
    columns, options, needs = worker.call("train.functions:describe", *said)
    takes = Takes(None if columns is None else frozenset(columns), frozenset(options), tuple(map(tuple, needs)))

    def reward(**columns: Any) -> list[Any]:
        worker.call("train.functions:describe", *said)  # anew, after a process that was stopped
        return worker.call("train.functions:call", *said, columns, seconds=seconds)

    return Reward(reward, takes)


def _row_by_row(said: tuple[str, str, str], pool: Pool) -> tuple[Callable[..., list[Any]], Takes]:
    function, takes = load(*said)
    timeout = inspect.signature(function).parameters["timeout"].default

    def reward(completions: list[Any], rewards: Any, **columns: Any) -> list[Any]:
        calls = [
            (*said, {"completions": [one], **{name: values[i : i + 1] for name, values in columns.items()}})
            for i, one in enumerate(completions)
        ]
        # a quarter and a bit for handing over; code ends its programs itself
        found = pool.map("train.functions:call", "train.functions:describe", said, calls, timeout * 1.25 + 0.5)
        return [one if isinstance(one, Exception) else one[0] for one in found]

    return reward, takes


def _check_columns(rewards: Rewards, prompts: Sequence[Prompt], sample: Sample) -> None:
    """Refuse a reward whose columns no row has; of single rows as sample.on_missing_column says."""
    for name, reward in rewards.each.items():
        for several in reward.takes.needs:
            without = [p for p in prompts if all(p.columns.get(one) is None for one in several)]
            if len(without) == len(prompts):
                have = ", ".join(dict.fromkeys(key for p in prompts for key in p.columns)) or "none"
                raise UsageError(
                    f"sample.reward '{name}' needs {_either(several)}, which no row has; they have {have}. "
                    "A built-in reward's option column says which one to read"
                )
            if without and sample.on_missing_column == "error":
                raise UsageError(
                    f"{without[0].where}: sample.reward '{name}' needs {_either(several)}, which {len(without)} of "
                    f"{len(prompts)} rows lack (sample.on_missing_column=skip leaves them unjudged)"
                )


def _try(rewards: Rewards, sample: Sample) -> None:
    """Call the built-in functions with nothing to judge: options that cannot be together, a library that is missing."""
    for number, (key, name) in enumerate(zip(rewards.each, sample.reward, strict=False)):
        if name in BUILT_IN:
            function, takes = load(name, key, json.dumps(sample.reward_options.get(key, {})))
            given: Columns = {one: [] for several in (GIVEN, *takes.needs) for one in several}
            function(**takes.choose({**given, "rewards": {one: [] for one in list(rewards.each)[:number]}}))


def _either(names: Sequence[str]) -> str:
    return "the column (or option) " + " or ".join(f"'{name}'" for name in names)


def _reward_model(name: str) -> Function:
    """A reward MODEL as a reward: what it says of the whole conversation, its heads' mean."""
    from decode.load import load_model
    from decode.reward import judge

    model = load_model(name, rewards=True)
    if not model.arch.num_labels:
        raise UsageError(f"it is a language model, which may be sample.judge={name}")

    def reward(prompts: Sequence[Value], completions: Sequence[Any], **columns: Any) -> list[float]:
        rows = []
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), 1):
            text = isinstance(prompt, str)
            whole = prompt + completion if text else [*prompt, *completion]
            rows.append((f"completion {number}", "text" if text else "messages", whole))
        return [judged.reward for judged in judge(model, rows)]

    return reward


def _judge(sample: Sample, name: str) -> Function:
    """A chat MODEL as a reward: it is asked for a grade, greedily; a reply without one does not judge."""
    from decode.generate import Sampling, generate
    from decode.load import load_model

    model, pattern = load_model(name), re.compile(sample.judge_pattern)
    model.tokenizer.render([{"role": "user", "content": "?"}])  # no template: say so before anything is sampled

    def reward(prompts: Sequence[Value], completions: Sequence[Value], **columns: Any) -> list[Score]:
        asked = []
        for prompt, completion in zip(prompts, completions, strict=True):
            shown = {"prompt": text_of(prompt), "completion": text_of(completion)}
            text = re.sub(r"\{(prompt|completion)\}", lambda found, shown=shown: shown[found[1]], sample.judge_prompt)
            asked.append([{"role": "user", "content": text}])
        replies = generate(model, asked, Sampling(sample.judge_max_new_tokens), batch_size=sample.batch_size)
        return [read_grade(reply.text, pattern) for reply in replies]

    return reward


def read_grade(reply: str, pattern: re.Pattern[str]) -> Score:
    """The number in a judge's reply; None where there is none."""
    found = pattern.search(reply)
    try:
        grade = float(found[1 if pattern.groups else 0]) if found else math.nan
    except (ValueError, TypeError):  # the pattern found other text, or its group nothing
        grade = math.nan
    return grade if math.isfinite(grade) else None


def judge_completions(rewards: Rewards, prompts: Sequence[Prompt], made: Sequence[Sequence[Completion]]) -> Judged:
    """Every reward's score of every completion of every prompt; each reward is called once, with all of them.

    A chat's completion is handed over as a list of one message, like its prompt; text as text. Of a row's other
    columns each becomes a list, None where a row lacks it; completion_ids, finish_reason and `rewards` (the scores that
    those before it gave, by name) come with them. A failure raises RunError naming the reward and the row, or, with
    on_error skip, is counted, told once, and leaves None.
    """
    rows = [(prompt, one) for prompt, several in zip(prompts, made, strict=True) for one in several]
    where = [
        f"row {prompt.where}, completion {i + 1}"
        for prompt, n in zip(prompts, made, strict=True)
        for i in range(len(n))
    ]
    before: dict[str, list[Score]] = {}
    columns: Columns = {name: [prompt.columns.get(name) for prompt, _ in rows] for p in prompts for name in p.columns}
    columns |= {
        "prompts": [prompt.value for prompt, _ in rows],
        "completions": [
            one.text if isinstance(prompt.value, str) else [{"role": "assistant", "content": one.text}]
            for prompt, one in rows
        ],
        "completion_ids": [one.tokens for _, one in rows],
        "finish_reason": [one.finish_reason for _, one in rows],
        "rewards": before,
    }
    failed: dict[str, int] = {}
    late: dict[str, int] = {}
    for name, reward in rewards.each.items():
        before[name], errors, overdue = _call(name, reward, columns, where)
        if errors and rewards.on_error == "stop":
            raise RunError(errors[0])
        for found, now, ever, said in (
            (errors, failed, rewards.failed, "not judged, as others of this reward that fail (sample.on_reward_error)"),
            (overdue, late, rewards.late, "it scores 0, as others over which this reward takes too long"),
        ):
            if found:
                if name not in ever:
                    print(f"{found[0]}; {said}", file=sys.stderr)
                now[name] = len(found)
                ever[name] = ever.get(name, 0) + len(found)
    each = [dict(zip(before, found, strict=True)) for found in zip(*before.values(), strict=True)]
    ends = iter(each)
    return Judged([[next(ends) for _ in several] for several in made], failed, late)


def _call(
    name: str, reward: Reward, columns: Columns, where: Sequence[str]
) -> tuple[list[Score], list[str], list[str]]:
    """The scores; what is wrong with each one that has become None for it; which are 0 as they took too long."""
    here = f"reward '{name}'" + (f", {where[0]} to {where[-1]}" if where else "")
    lost: list[Score] = [None] * len(where)
    try:
        found = list(reward.call(**reward.takes.choose(columns)))
    except Hung:
        said = "it gave no scores in sample.reward_timeout seconds and was stopped"
        return lost, [f"{here}: {said}"] * len(where), []
    except RunError as error:  # of another process, which has put it into words
        return lost, [f"{here}: {error}"] * len(where), []
    except Exception as error:  # whatever the user's function raises
        return lost, [f"{here}: it raised {type(error).__name__}: {error}"] * len(where), []
    if len(found) != len(where):
        said = f"it gave {len(found)} scores for {len(where)} completions, one for each is due"
        return lost, [f"{here}: {said}"] * len(where), []
    scores: list[Score] = []
    errors, late = [], []
    for place, score in zip(where, found, strict=True):
        if isinstance(score, Hung):  # a built-in verifier's own limit: what cannot be verified is not right
            late.append(f"reward '{name}', {place}: it took longer than the option timeout")
            score = 0.0
        if isinstance(score, RunError):
            scores.append(None)
            errors.append(f"reward '{name}', {place}: {score}")
            continue
        try:
            scores.append(None if score is None else float(score))
        except (TypeError, ValueError):
            scores.append(math.nan)
        if scores[-1] is not None and not math.isfinite(scores[-1]):
            scores[-1] = None
            errors.append(
                f"reward '{name}', {place}: the score is {score!r}, allowed: a finite number, or None for a row "
                "that it does not judge"
            )
    return scores, errors, late


def total(scores: Mapping[str, Score], weights: Mapping[str, float]) -> Score:
    """The weighted sum of what was judged; None where nothing was."""
    judged = [weight * score for name, weight in weights.items() if (score := scores[name]) is not None]
    return sum(judged) if judged else None
