"""Which of the samples are kept: preferences or completions, as rows to train on, and what all of them are like."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.errors import RunError
from configs.sample import Sample
from decode.jsonl import write_rows
from train.rewards import Score, total, weights_of

PREFERENCES, COMPLETIONS = "preferences.jsonl", "completions.jsonl"
Row = dict[str, Any]  # of a file of samples: a prompt with its completions and their rewards


def score_of(completion: Mapping[str, Any], sample: Sample) -> Score:
    """The weighted sum of a completion's rewards, less sample.missing_eos_penalty where it never ended."""
    score = total(completion["rewards"], weights_of(sample))
    if score is None or completion["finish_reason"] == "stop":
        return score
    return score - sample.missing_eos_penalty


def scores_of(row: Row, sample: Sample) -> list[Score]:
    """The score of each completion; None where nothing judged it, and for one that says what an earlier one said."""
    made = row["completions"]
    new = [all(one["tokens"] != other["tokens"] for other in made[:i]) for i, one in enumerate(made)]
    return [score_of(one, sample) if first else None for one, first in zip(made, new, strict=True)]


def choose_pairs(scores: Sequence[Score], keep: str, min_margin: float = 0.0) -> list[tuple[int, int]]:
    """(better, worse) by number: the best against the worst, or ("all_pairs") every two; equal scores never pair.

    Of equals the first stands for all where one is wanted.
    """
    known = [(score, i) for i, score in enumerate(scores) if score is not None]
    if not known:
        return []
    best, worst = max(known, key=lambda one: one[0]), min(known, key=lambda one: one[0])
    candidates = [(best, worst)] if keep == "pairs" else [(a, b) for a in known for b in known]
    return [(i, j) for (high, i), (low, j) in candidates if high > low and high - low >= min_margin]


def choose_best(scores: Sequence[Score], keep: str, threshold: float | None = None) -> list[int]:
    """Numbers of the completions to keep: the first of the best, or ("all") each; none below the threshold."""
    known = [i for i, score in enumerate(scores) if score is not None and (threshold is None or score >= threshold)]
    return known if keep == "all" else sorted(known, key=lambda i: -(scores[i] or 0))[:1]


def keep(rows: Sequence[Row], sample: Sample, source: str, folder: Path) -> Path:
    """Write what is kept of the samples: preferences, or completions, as tokens, with the text beside them.

    The tokens are those that were sampled: text tokenised anew need not give them.
    """
    kept: list[Row] = []
    for row in rows:
        scores, said = (
            scores_of(row, sample),
            {"model": source, "seed": row["seed"], "reward": list(weights_of(sample))},
        )
        if sample.makes_pairs:
            pairs = choose_pairs(scores, sample.keep, sample.min_margin)
            kept += [_preference(row, scores, i, j) | said for i, j in pairs]
        else:
            kept += [_completion(row, scores, i) | said for i in choose_best(scores, sample.keep, sample.threshold)]
    if not kept:
        raise RunError(
            f"nothing is kept of {len(rows)} prompts; usual causes: a reward that gives every completion of a prompt "
            "the same score, or sample.min_margin or sample.threshold too high"
        )
    path = folder / (PREFERENCES if sample.makes_pairs else COMPLETIONS)
    write_rows(str(path), kept)
    print(f"kept {len(kept)} {'pairs' if sample.makes_pairs else 'completions'} in {path}", file=sys.stderr)
    return path


def _preference(row: Row, scores: Sequence[Score], i: int, j: int) -> Row:
    better, worse = row["completions"][i], row["completions"][j]
    high, low = scores[i], scores[j]
    assert high is not None
    assert low is not None
    return {
        "prompt": row["prompt"],
        "chosen": _as_prompt(row, better["text"]),
        "rejected": _as_prompt(row, worse["text"]),
        "prompt_tokens": row["prompt_tokens"],
        "chosen_tokens": better["tokens"],
        "rejected_tokens": worse["tokens"],
        "score_chosen": high,
        "score_rejected": low,
        "margin": high - low,
        "samples": [i, j],
    }


def _completion(row: Row, scores: Sequence[Score], i: int) -> Row:
    one, prompt = row["completions"][i], row["prompt_tokens"]
    return {
        "prompt": row["prompt"],
        "completion": _as_prompt(row, one["text"]),
        "tokens": [*prompt, *one["tokens"]],
        "weights": [0] * len(prompt) + [1] * len(one["tokens"]),
        "score": scores[i],
        "samples": [i],
    }


def _as_prompt(row: Row, text: str) -> Any:
    """A completion in its prompt's form."""
    return text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]


def summarise(rows: Sequence[Row], sample: Sample) -> dict[str, Any]:
    """What the samples are like: counts, shares and means over completions; reward is the score that is chosen by."""
    made = [one for row in rows for one in row["completions"]]
    scored, scores = [scores_of(row, sample) for row in rows], [score_of(one, sample) for one in made]
    return {
        "prompts": len(rows),
        "samples": len(made),
        "reward": _mean(scores),
        "reward_best": _mean(max((s for s in several if s is not None), default=None) for several in scored),
        **{f"rewards/{name}": _mean(one["rewards"][name] for one in made) for name in weights_of(sample)},
        "unjudged": sum(score is None for score in scores),
        "ties": _mean(not choose_pairs(several, "pairs") for several in scored),
        "tokens": _mean(len(one["tokens"]) for one in made),
        "truncated": _mean(one["finish_reason"] != "stop" for one in made),
    }


def _mean(values: Iterable[Score]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def describe(summary: Mapping[str, Any]) -> str:
    """A line for people."""
    each = ", ".join(f"{name.removeprefix('rewards/')} {value:.4g}" for name, value in summary.items() if "/" in name)
    return (
        f"{summary['prompts']} prompts, {summary['samples']} samples of {summary['tokens']:.0f} tokens on average "
        f"({summary['truncated']:.0%} do not end): mean reward {summary['reward']:.4g} ({each}), of each prompt's best "
        f"{summary['reward_best']:.4g}; {summary['ties']:.0%} of prompts give no pair, {summary['unjudged']} samples "
        "are not judged"
    )
