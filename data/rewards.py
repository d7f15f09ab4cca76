"""Rows of reward models to columns: nothing is predicted, a score is read at some tokens; these have weight 1.

Of a pair, the prompt stands once and both completions behind it, whole: each is read at its last token, for chat the
end of the turn. Of a process, each step is read at its last token. `targets` are the tokens themselves.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.errors import UsageError
from data.chat import Example, encode_completion
from data.pairs import CHOSEN, REJECTED, encode_pair
from data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from configs.schema import Data

Columns = dict[str, np.ndarray]
Judged = tuple[Example, Example, float]  # chosen, rejected, by how much it should be better


def encode_reward(form: Mapping[str, Any], tokenizer: Tokenizer, data: "Data") -> Judged:
    """As encode_pair: each side ends where its reward is read; and the row's margin."""
    chosen, rejected = encode_pair(form, tokenizer, data)
    return chosen, rejected, float(chosen["margins"][0])


def fit_reward(judged: Judged, data: "Data") -> tuple[Columns | None, str]:
    """The columns of a pair; the second value says what happened, as examples.fit.

    A completion without its end cannot be judged: of a pair that is too long the prompt's beginning is cut with
    truncation=keep_end, else the pair is dropped (as TRL does), or refused.
    """
    chosen, rejected, margin = judged
    share, prompt = _common(chosen["tokens"], rejected["tokens"]), int((chosen["weights"] > 0).argmax())
    copies = 1 if data.share_prompt else 2
    over = len(chosen["tokens"]) + len(rejected["tokens"]) - (share if copies == 1 else 0) - data.max_length
    cut = max(0, -(-over // copies))
    if over > 0 and data.truncation == "error":
        raise UsageError(
            f"the pair takes {over + data.max_length} positions, data.max_length is {data.max_length}: raise it, or "
            "set data.truncation to keep_end or drop"
        )
    if over > 0 and (data.truncation != "keep_end" or cut >= min(share, prompt)):
        return None, "too_long"
    sides = [side["tokens"][cut:] for side in (chosen, rejected)]
    start = share - cut if data.share_prompt else 0
    sizes = [start, *(len(side) - start for side in sides)]
    tokens = np.concatenate([sides[0][:start], *(side[start:] for side in sides)])
    positions = [np.arange(start), *(np.arange(start, len(side)) for side in sides)]
    columns = _read_at(tokens, np.cumsum(sizes)[1:] - 1)
    columns["positions"] = np.concatenate(positions).astype(np.int32)
    columns["branches"] = np.repeat(np.asarray([0, CHOSEN, REJECTED], np.int32), sizes)
    columns["margins"] = np.full(len(tokens), margin, np.float32)
    return columns, "truncated" if cut else ""


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Leading tokens that both have; each keeps one of its own, to be read at."""
    size = min(len(a), len(b)) - 1
    apart = a[:size] != b[:size]
    return int(apart.argmax()) if apart.any() else size


def encode_steps(form: Mapping[str, Any], tokenizer: Tokenizer, data: "Data") -> Columns:
    """Prompt and steps, each tokenised by itself and followed by data.step_separator (TRL's PRMTrainer)."""
    if "completions" not in form:
        raise UsageError(
            "objective.type=process_reward trains on rows {prompt, completions: [step, ...], labels: [...]}"
        )
    prompt, pieces = form["prompt"], [tokenizer.encode(step) for step in form["completions"]]
    if isinstance(prompt, str):
        start = encode_completion(tokenizer, prompt, "", add_eos=False)["tokens"].tolist()
    else:
        start = tokenizer.encode(tokenizer.render(prompt, add_generation_prompt=True))
    if not start:
        raise ValueError("'prompt' is empty: the steps need something to answer")
    separator = tokenizer.encode(data.step_separator)
    steps = [[*piece, *separator] for piece in pieces]
    if empty := [number for number, step in enumerate(steps, 1) if not step]:
        raise ValueError(f"step {empty[0]} has no token to be read at: it is empty, and so is data.step_separator")
    ends = len(start) - 1 + np.cumsum([len(step) for step in steps])
    columns = _read_at(np.asarray([*start, *(token for step in steps for token in step)]), ends)
    columns["positions"] = np.arange(len(columns["tokens"]), dtype=np.int32)
    columns["labels"] = np.zeros(len(columns["tokens"]), np.float32)
    columns["labels"][ends] = form["labels"]
    return columns


def fit_steps(columns: Columns, data: "Data") -> tuple[Columns | None, str]:
    """Cut a process to data.max_length positions: its last steps, or (keep_end) its beginning."""
    length = len(columns["tokens"])
    if length <= data.max_length:
        return columns, ""
    if data.truncation == "error":
        raise UsageError(
            f"the process takes {length} positions, data.max_length is {data.max_length}: raise it, or set "
            "data.truncation to keep_start, keep_end or drop"
        )
    if data.truncation == "drop":
        return None, "too_long"
    cut = slice(0, data.max_length) if data.truncation == "keep_start" else slice(length - data.max_length, length)
    columns = {name: column[cut] for name, column in columns.items()}
    columns["positions"] = np.arange(data.max_length, dtype=np.int32)
    return (columns, "truncated") if columns["weights"].any() else (None, "no_trained_token")


def _read_at(tokens: np.ndarray, places: np.ndarray) -> Columns:
    tokens = tokens.astype(np.int32)
    weights = np.zeros(len(tokens), np.float32)
    weights[places] = 1.0
    return {"tokens": tokens, "targets": tokens, "weights": weights}
