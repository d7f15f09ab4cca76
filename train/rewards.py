"""Scores of completions: functions, reward models and a judge, each checked; and how they add up."""

import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.errors import RunError, UsageError
from configs.sample import Sample
from data.prompts import Prompt, Value

Score = float | None  # None: not judged
Reward = Callable[..., Sequence[Any]]  # (prompts, completions, **columns) -> a Score for each


def brevity(prompts: Sequence[Value], completions: Sequence[Value], **columns: Any) -> list[float]:
    """1 for an answer of at most 20 words, 20 / words for a longer one; half where its last sentence has no end."""
    scores = []
    for text in map(text_of, completions):
        words, ended = len(text.split()), text.strip().endswith((".", "!", "?"))
        scores.append(min(1.0, 20 / words) * (1.0 if ended else 0.5) if words else 0.0)
    return scores


BUILT_IN: dict[str, Reward] = {"brevity": brevity}


def text_of(value: Value) -> str:
    """The text of a prompt or completion: one message's content, or a conversation with its roles."""
    if isinstance(value, str):
        return value
    if len(value) == 1:
        return str(value[0].get("content") or "")
    return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in value)


def weights_of(sample: Sample) -> dict[str, float]:
    """{short name of each reward: its weight}, in the order of sample.reward, the judge last."""
    names = [name.rpartition("/")[2] for name in sample.reward] + ["judge"] * (sample.judge is not None)
    if not names:
        raise UsageError("sample.reward is empty and sample.judge is not set: nothing says which completion is better")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"sample.reward has two of the name '{twice}': rename one")
    return dict(zip(names, sample.reward_weights or (1.0,) * len(names), strict=True))


def load_rewards(sample: Sample) -> dict[str, Reward]:
    """{short name: reward}: what cannot be found or loaded is refused before anything is sampled."""
    names = weights_of(sample)
    rewards = [_find(name) for name in sample.reward]
    if sample.judge is not None:
        rewards.append(_judge(sample, sample.judge))
    return dict(zip(names, rewards, strict=True))


def _find(name: str) -> Reward:
    module, colon, function = name.rpartition(":")
    if colon:
        return _import(name, module, function)
    if name in BUILT_IN:
        return BUILT_IN[name]
    try:
        return _reward_model(name)
    except UsageError as error:
        raise UsageError(
            f"sample.reward '{name}' is no function (module:function, or file.py:function), none of the built-in ones "
            f"({', '.join(BUILT_IN)}) and no reward MODEL: {error}"
        ) from error


def _import(name: str, module: str, function: str) -> Reward:
    """A function of the user's own: of a file, whose folder can be imported from, or of an installed module."""
    path = Path(module)
    try:
        if path.suffix == ".py":
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None
            assert spec.loader is not None
            if (folder := str(path.absolute().parent)) not in sys.path:
                sys.path.append(folder)
            loaded = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded)
        else:
            loaded = importlib.import_module(module)
    except Exception as error:  # whatever the user's file raises
        hint = "" if path.suffix == ".py" else "; a file beside the recipe is found as file.py:function"
        raise UsageError(
            f"sample.reward '{name}': {module} cannot be imported: {type(error).__name__}: {error}{hint}"
        ) from error
    found: Reward | None = getattr(loaded, function, None)
    if not callable(found):
        functions = [key for key, value in vars(loaded).items() if callable(value) and not key.startswith("_")]
        raise UsageError(f"sample.reward '{name}': {module} has no function '{function}'; it has {functions}")
    return found


def _reward_model(name: str) -> Reward:
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


def _judge(sample: Sample, name: str) -> Reward:
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


def judge_completions(
    rewards: Mapping[str, Reward], prompts: Sequence[Prompt], texts: Sequence[Sequence[str]]
) -> list[list[dict[str, Score]]]:
    """Every reward's score of every completion of every prompt; each reward is called once, with all of them.

    A chat's completion is handed over as a list of one message, like its prompt; text as text. Of a row's other
    columns each becomes a list, None where a row lacks it. Raises RunError naming the reward and the row.
    """
    rows = [(prompt, text) for prompt, several in zip(prompts, texts, strict=True) for text in several]
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    columns = {
        name: [prompt.columns.get(name) for prompt, _ in rows]
        for name in names
        if name not in ("prompts", "completions")
    }
    values = [prompt.value for prompt, _ in rows]
    completions = [
        text if isinstance(prompt.value, str) else [{"role": "assistant", "content": text}] for prompt, text in rows
    ]
    scores: list[dict[str, Score]] = [{} for _ in rows]
    for name, reward in rewards.items():
        for score, found in zip(scores, _call(name, reward, values, completions, columns, prompts), strict=True):
            score[name] = found
    ends = iter(scores)
    return [[next(ends) for _ in several] for several in texts]


def _call(
    name: str,
    reward: Reward,
    prompts: list[Value],
    completions: list[Any],
    columns: dict[str, list[Any]],
    rows: Sequence[Prompt],
) -> list[Score]:
    each = len(completions) // len(rows)
    here = f"reward '{name}', rows {rows[0].where} to {rows[-1].where}"
    try:
        found = list(reward(prompts=prompts, completions=completions, **columns))
    except Exception as error:  # whatever the user's function raises
        raise RunError(f"{here}: it raised {type(error).__name__}: {error}") from error
    if len(found) != len(completions):
        raise RunError(f"{here}: it gave {len(found)} scores for {len(completions)} completions, one for each is due")
    scores: list[Score] = []
    for number, score in enumerate(found):
        try:
            scores.append(None if score is None else float(score))
        except (TypeError, ValueError):
            scores.append(math.nan)
        if scores[-1] is not None and not math.isfinite(scores[-1]):
            raise RunError(
                f"reward '{name}', row {rows[number // each].where}, completion {number % each + 1}: the score is "
                f"{score!r}, allowed: a finite number, or None for a row that it does not judge"
            )
    return scores


def total(scores: Mapping[str, Score], weights: Mapping[str, float]) -> Score:
    """The weighted sum of what was judged; None where nothing was."""
    judged = [weight * score for name, weight in weights.items() if (score := scores[name]) is not None]
    return sum(judged) if judged else None
