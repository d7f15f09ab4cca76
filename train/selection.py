"""Which of the samples are kept: preferences or completions, as rows to train on, and what all of them are like."""

import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import RunError
from configs.sample import Sample
from decode.jsonl import write_rows
from train.estimators import best_of_n, majority_at_k, pass_at_k, sizes
from train.rewards import Score, total, weights_of
from train.verifiers.extract import answer_of

PREFERENCES, COMPLETIONS = "preferences.jsonl", "completions.jsonl"
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "max_new_tokens", "num_generations")  # said with what is kept
CHOICES = {"pairs": "no pair", "all_pairs": "no pair", "best": "score (not among the best)", "all": "the threshold"}
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


def sift(row: Row, sample: Sample) -> tuple[list[Score], Counter[str]]:
    """The scores of the completions that pass every filter, None for the others; how many fell to which filter.

    Similarity is exact: a prompt has too few completions for hashes of their word pairs to pay.
    """
    made, scores = row["completions"], scores_of(row, sample)
    faults = [_fault(one, score, sample) for one, score in zip(made, scores, strict=True)]
    rate = pass_rate(row, sample)
    if rate is not None and not sample.min_pass_rate <= rate <= sample.max_pass_rate:
        faults = [fault or "pass rate" for fault in faults]
    if sample.max_similarity < 1:
        kept: list[set[tuple[str, str]]] = []
        for i in sorted(range(len(made)), key=lambda i: -(scores[i] or 0)):
            words = word_pairs(made[i]["text"]) if not faults[i] else set()
            if any(len(words & other) > sample.max_similarity * len(words | other) for other in kept if not faults[i]):
                faults[i] = "similarity"
            elif not faults[i]:
                kept.append(words)
    return [None if fault else s for fault, s in zip(faults, scores, strict=True)], Counter(filter(None, faults))


def _fault(one: Mapping[str, Any], score: Score, sample: Sample) -> str:
    """The filter that a completion falls to by itself, or nothing."""
    length, perplexity = len(one["tokens"]), perplexity_of(one)
    if score is None:
        return "not judged" if score_of(one, sample) is None else "said before"
    if sample.finished_only and one["finish_reason"] != "stop":
        return "not finished"
    if length < sample.min_tokens or length > (sample.max_tokens or length):
        return "length"
    if perplexity < sample.min_perplexity or perplexity > (sample.max_perplexity or perplexity):
        return "perplexity"
    return ""


def perplexity_of(completion: Mapping[str, Any]) -> float:
    """exp of the mean negative log-prob of a completion's tokens, as the sampling model has it (temperature 1)."""
    return math.exp(-completion["logprob"] / max(1, len(completion["tokens"])))


def pass_rate(row: Row, sample: Sample) -> float | None:
    """The share of a prompt's judged completions that reach sample.threshold."""
    known = [score for one in row["completions"] if (score := score_of(one, sample)) is not None]
    if sample.threshold is None or not known:
        return None
    return sum(score >= sample.threshold for score in known) / len(known)


def word_pairs(text: str) -> set[tuple[str, str]]:
    """Adjacent words of a text without case and punctuation, its ends included."""
    words = ["", *re.findall(r"\w+", text.casefold()), ""]
    return set(pairwise(words))


def choose_pairs(
    scores: Sequence[Score], keep: str, min_margin: float = 0.0, threshold: float | None = None
) -> list[tuple[int, int]]:
    """(better, worse) by number: the best against the worst, or ("all_pairs") every two; equal scores never pair.

    Of equals the first stands for all where one is wanted; none is better that is below the threshold.
    """
    known = [(score, i) for i, score in enumerate(scores) if score is not None]
    if not known:
        return []
    best, worst = max(known, key=lambda one: one[0]), min(known, key=lambda one: one[0])
    candidates = [(best, worst)] if keep == "pairs" else [(a, b) for a in known for b in known]
    least = -math.inf if threshold is None else threshold
    return [(i, j) for (high, i), (low, j) in candidates if high > low and high - low >= min_margin and high >= least]


def choose_best(scores: Sequence[Score], keep: str, threshold: float | None = None, n: int = 1) -> list[int]:
    """Numbers of the completions to keep: the n best, earlier ones first, or ("all") each; none below the threshold."""
    known = [i for i, score in enumerate(scores) if score is not None and (threshold is None or score >= threshold)]
    return known if keep == "all" else sorted(known, key=lambda i: -(scores[i] or 0))[:n]


def keep(rows: Sequence[Row], sample: Sample, source: str, folder: Path) -> Path:
    """Write what is kept of the samples: preferences, or completions, as tokens, with the text beside them.

    The tokens are those that were sampled: text tokenised anew need not give them.
    """
    kept: list[Row] = []
    fell: Counter[str] = Counter()
    sampling = {name: getattr(sample, name) for name in SAMPLING}
    for row in rows:
        said = {"model": source, "seed": row["seed"], "sampling": sampling}
        scores, faults = sift(row, sample)
        if sample.makes_pairs:
            pairs = choose_pairs(scores, sample.keep, sample.min_margin, sample.threshold)
            used = {i for pair in pairs for i in pair}
            kept += [_preference(row, scores, i, j) | said for i, j in pairs]
        else:
            used = set(choose_best(scores, sample.keep, sample.threshold, sample.keep_n))
            kept += [_completion(row, scores, i) | said for i in sorted(used)]
        fell += faults + Counter(sample.keep for i, s in enumerate(scores) if s is not None and i not in used)
    count = sum(len(row["completions"]) for row in rows)
    lost = ", ".join(f"{number} to {CHOICES.get(why, why)}" for why, number in fell.most_common())
    if not kept:
        raise RunError(
            f"nothing is kept of {len(rows)} prompts; {count} completions fell: {lost}. Usual causes: a reward that "
            "gives every completion of a prompt the same score, or sample.min_margin or sample.threshold too high"
        )
    path = folder / (PREFERENCES if sample.makes_pairs else COMPLETIONS)
    write_rows(str(path), kept)
    what = f"kept {len(kept)} {'pairs ' if sample.makes_pairs else ''}of {count} completions in {path}"
    print(what + (f"; fell: {lost}" if lost else ""), file=sys.stderr)
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
        "rewards": {name: [better["rewards"][name], worse["rewards"][name]] for name in better["rewards"]},
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
        "rewards": one["rewards"],
    }


def _as_prompt(row: Row, text: str) -> Any:
    """A completion in its prompt's form."""
    return text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]


def summarise(rows: Sequence[Row], sample: Sample) -> dict[str, Any]:
    """What the samples are like: counts, shares and means over completions; reward is the score that is chosen by.

    best@n, pass@n, maj@n: over prompts, what n of a prompt's samples would give (train/estimators.py).
    """
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
        **_estimate(rows, sample),
    }


def _estimate(rows: Sequence[Row], sample: Sample) -> dict[str, float]:
    """{best@n, and with sample.threshold pass@n and maj@n: mean over the prompts with n judged samples}."""
    found: dict[str, list[float]] = {}
    for row in rows:
        judged = [(one, score) for one in row["completions"] if (score := score_of(one, sample)) is not None]
        scores, answers = np.array([score for _, score in judged]), [vote_of(one["text"]) for one, _ in judged]
        for n in sizes(max(len(row["completions"]) for row in rows)):
            if n > len(judged):
                continue
            found.setdefault(f"best@{n}", []).append(best_of_n(scores, n))
            if sample.threshold is not None:
                passed = scores >= sample.threshold
                found.setdefault(f"pass@{n}", []).append(pass_at_k(passed, n))
                found.setdefault(f"maj@{n}", []).append(majority_at_k(answers, passed, n))
    return {name: _mean(values) for name, values in found.items()}


def vote_of(text: str) -> str | None:
    """What a completion votes for in a majority: its marked answer, its last number, or its words; None: nothing."""
    return answer_of(text) or answer_of(text, "number") or " ".join(re.findall(r"\w+", text.casefold())) or None


def _mean(values: Iterable[Score]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def describe(summary: Mapping[str, Any]) -> str:
    """A line for people."""
    each = ", ".join(f"{name.removeprefix('rewards/')} {value:.4g}" for name, value in summary.items() if "/" in name)
    passes = ", ".join(f"{name} {value:.0%}" for name, value in summary.items() if name.startswith(("pass@", "maj@")))
    return (
        f"{summary['prompts']} prompts, {summary['samples']} samples of {summary['tokens']:.0f} tokens on average "
        f"({summary['truncated']:.0%} do not end): mean reward {summary['reward']:.4g} ({each}), of each prompt's best "
        f"{summary['reward_best']:.4g}; {summary['ties']:.0%} of prompts give no pair, {summary['unjudged']} samples "
        "are not judged" + (f"; {passes}" if passes else "")
    )
