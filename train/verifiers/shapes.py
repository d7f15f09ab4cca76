"""Rewards of what an answer looks like: its format, its length, its language, whether it repeats itself."""

import math
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field

from configs.errors import UsageError
from train.verifiers.extract import text_of

Unit = Literal["tokens", "words", "characters"]
Count = Annotated[int, Field(ge=1)]
SCRIPTS = {
    "ar": ("ARABIC",), "el": ("GREEK",), "en": ("LATIN",), "he": ("HEBREW",), "hi": ("DEVANAGARI",),
    "ja": ("CJK", "HIRAGANA", "KATAKANA"), "ko": ("HANGUL",), "ru": ("CYRILLIC",), "th": ("THAI",), "zh": ("CJK",),
}  # fmt: skip


def brevity(completions: Sequence[Any], **columns: Any) -> list[float]:
    """1 for an answer of at most 20 words, 20 / words for a longer one; half where its last sentence has no end."""
    scores = []
    for text in map(text_of, completions):
        words, ended = len(text.split()), text.strip().endswith((".", "!", "?"))
        scores.append(min(1.0, 20 / words) * (1.0 if ended else 0.5) if words else 0.0)
    return scores


def format(
    completions: Sequence[Any],
    *,
    tags: Annotated[Sequence[str], Field(min_length=1)] = ("think", "answer"),
    opened: bool = False,
    partial: bool = False,
    **columns: Any,
) -> list[float]:
    """1 where the text is <tag>..</tag> for each tag, once, in order, with nothing around; else 0.

    opened: the prompt has opened the first tag. partial: else half the share of marks that are there once.
    """
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    scores = []
    for completion in completions:
        text = ("" if not opened else marks[0]) + text_of(completion)
        once = [text.count(mark) == 1 for mark in marks]
        whole = all(once) and _in_order(text.strip(), marks)
        scores.append(1.0 if whole else sum(once) / len(marks) / 2 if partial else 0.0)
    return scores


def _in_order(text: str, marks: Sequence[str]) -> bool:
    """Whether each mark follows the one before, a closed pair at once; all of them are there once."""
    begin = 0
    for number, mark in enumerate(marks):
        at = text.find(mark, begin)
        if at < 0 or (number % 2 == 0 and text[begin:at].strip()):
            return False
        begin = at + len(mark)
    return not text[begin:].strip()


def _measure(completions: Sequence[Any], ids: Sequence[Sequence[int]], unit: Unit) -> list[int]:
    if unit == "tokens":
        return [len(one) for one in ids]
    return [len(text.split()) if unit == "words" else len(text) for text in map(text_of, completions)]


def length(
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    *,
    least: Annotated[int, Field(ge=0)] = 0,
    most: Count,
    fade: Annotated[int, Field(ge=0)] = 0,
    unit: Unit = "tokens",
    **columns: Any,
) -> list[float]:
    """1 for a length from least to most, falling to 0 over the next `fade` tokens (or words) to either side."""
    if least > most:
        raise UsageError(
            f"sample.reward_options.length: least is {least} and most is {most}: no length is between them"
        )
    off = [max(least - n, n - most, 0) for n in _measure(completions, completion_ids, unit)]
    return [max(0.0, 1 - one / fade) if fade else float(one == 0) for one in off]


def cosine_length(
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    rewards: Mapping[str, Sequence[float | None]],
    *,
    max_len: Count,
    correct: str = "math",
    threshold: float = 1.0,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
    unit: Unit = "tokens",
    **columns: Any,
) -> list[float | None]:
    """Cosine reward of the length (2502.03373): right answers gain by being short, wrong ones by being long.

    Right is what the reward `correct`, named before this one in sample.reward, scores at least `threshold`.
    low + (high - low)(1 + cos(pi length / max_len)) / 2, with high and low exchanged for a wrong answer.
    """
    if correct not in rewards:
        raise UsageError(
            f"sample.reward 'cosine_length' needs the reward '{correct}' before it (its option correct), before it are "
            f"{', '.join(rewards) or 'none'}"
        )
    scores: list[float | None] = []
    for n, score in zip(_measure(completions, completion_ids, unit), rewards[correct], strict=True):
        low, high = min_value_correct, max_value_correct
        if score is None or score < threshold:
            low, high = max_value_wrong, min_value_wrong
        cosine = math.cos(math.pi * min(n / max_len, 1.0))
        scores.append(None if score is None else low + (high - low) * (1 + cosine) / 2)
    return scores


def repetition(
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    *,
    ngram_size: Count = 3,
    max_penalty: Annotated[float, Field(le=0)] = -1.0,
    unit: Unit = "words",
    **columns: Any,
) -> list[float]:
    """max_penalty times the share of n-grams that were there before (2502.03373); 0 for a text shorter than one.

    Text without spaces between words (Chinese) is measured in tokens or characters.
    """
    texts = map(text_of, completions)
    kinds: dict[Unit, Any] = {
        "tokens": completion_ids,
        "words": (t.lower().split() for t in texts),
        "characters": texts,
    }
    scores = []
    for items in kinds[unit]:
        count = len(items) - ngram_size + 1
        grams = {tuple(items[i : i + ngram_size]) for i in range(count)}
        scores.append(max_penalty * (1 - len(grams) / count) if count > 0 else 0.0)
    return scores


def soft_overlong(
    completion_ids: Sequence[Sequence[int]], *, max_completion_len: Count, soft_punish_cache: Count, **columns: Any
) -> list[float]:
    """DAPO's soft overlong punishment (2503.14476), in tokens: 0, linear over the cache, -1 from the maximum on."""
    if soft_punish_cache > max_completion_len:
        raise UsageError(
            f"sample.reward_options.soft_overlong: soft_punish_cache is {soft_punish_cache}, more than "
            f"max_completion_len, {max_completion_len}"
        )
    free = max_completion_len - soft_punish_cache
    return [max(-1.0, min(0.0, (free - len(ids)) / soft_punish_cache)) for ids in completion_ids]


def language(completions: Sequence[Any], *, script: str = "en", **columns: Any) -> list[float | None]:
    """The share of letters that belong to a language's script, by Unicode; None for a text without letters."""
    if script not in SCRIPTS:
        raise UsageError(f"sample.reward_options.language.script is {script}, allowed: {', '.join(SCRIPTS)}")
    scores: list[float | None] = []
    for completion in completions:
        letters = {c: n for c, n in Counter(text_of(completion)).items() if c.isalpha()}
        known = sum(n for c, n in letters.items() if _script(c) in SCRIPTS[script])
        scores.append(known / sum(letters.values()) if letters else None)
    return scores


@cache
def _script(letter: str) -> str:
    return unicodedata.name(letter, "").partition(" ")[0]
