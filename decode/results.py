"""What generation gives back, and the text side of it: stop strings, text as it comes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from data.tokenizer import Tokenizer

REPLACEMENT = "�"  # the decoder's sign of a character whose bytes are not all there yet
Top = dict[int, float]  # token id -> log-prob


@dataclass(frozen=True)
class Completion:
    """One generated sequence. Log-probs are raw: temperature 1, before any processor; times are in seconds."""

    tokens: list[int]  # the new ones, the end-of-sequence token included
    text: str  # without special tokens and what ended it
    logprobs: list[float]
    score: float  # of beams: transformers' sequence score; else the sum of logprobs
    finish_reason: Literal["stop", "length", "timeout"]
    prompt_tokens: list[int]
    top_logprobs: list[Top] | None = None  # with `logprobs`: the likeliest at each new token
    prompt_logprobs: list[float] | None = None  # of prompt_tokens[1:]
    prompt_top_logprobs: list[Top] | None = None
    seconds: float = 0.0  # from the call to the end of this sequence


@dataclass(frozen=True)
class Cut:
    """Where a stop string ends a row: after how many tokens, and the text before it."""

    tokens: int
    text: str


def find_stop(tokenizer: Tokenizer, tokens: Sequence[int], stops: Sequence[str], known: int = 0) -> Cut | None:
    """The first stop string in the decoded text, wherever token borders lie; the first `known` tokens hold none.

    "First" as tokens come: the fewest tokens whose text holds a stop string, then the earliest in that text.
    """
    if not stops or not _earliest(tokenizer.decode(tokens, skip_special=True), stops):
        return None
    low, high = known, len(tokens)  # text of `high` tokens holds one, of `low` does not
    while high - low > 1:
        middle = (low + high) // 2
        if _earliest(tokenizer.decode(tokens[:middle], skip_special=True), stops):
            high = middle
        else:
            low = middle
    text = tokenizer.decode(tokens[:high], skip_special=True)
    found = _earliest(text, stops)
    assert found is not None
    return Cut(high, text[: found[0]])


def _earliest(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """(where, which) of the stop string that begins first."""
    return min(((at, stop) for stop in stops if (at := text.find(stop)) >= 0), default=None)


class Teller:
    """Text of a growing row, piece by piece: never half a character, nor what may become a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops, self.told = tokenizer, stops, 0

    def more(self, tokens: Sequence[int]) -> str:
        """The new text that is certain."""
        text = self.tokenizer.decode(tokens, skip_special=True)
        if text.endswith(REPLACEMENT):
            return ""
        hold = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        return self.rest(text[: len(text) - hold])

    def rest(self, text: str) -> str:
        """What of this text is not told yet."""
        piece, self.told = text[self.told :], max(self.told, len(text))
        return piece
