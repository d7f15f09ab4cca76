"""Preference rows to columns: a prompt once, and behind it the chosen and the rejected completion as two branches."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.errors import UsageError
from data.chat import Example, encode_chat, encode_completion
from data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from configs.schema import Data

Columns = dict[str, np.ndarray]
CHOSEN, REJECTED = 1, 2  # branches; 0 is what both go on from


def encode_pair(form: Mapping[str, Any], tokenizer: Tokenizer, data: "Data") -> tuple[Example, Example]:
    """Prompt and chosen, prompt and rejected: unshifted, weight 1 on the completion. Malformed rows: ValueError."""
    if "prompt_tokens" in form:
        start = form["prompt_tokens"]
        sides = [_from_tokens(start, form[name], name, tokenizer) for name in ("chosen_tokens", "rejected_tokens")]
    elif "chosen" not in form:
        raise UsageError("the objective trains on pairs: a row needs chosen and rejected (or their _tokens)")
    elif isinstance(form["chosen"], str):
        prompt = form.get("prompt")
        if prompt is None:
            prompt = _common_text(form["chosen"], form["rejected"])
            form = {**form, "chosen": form["chosen"][len(prompt) :], "rejected": form["rejected"][len(prompt) :]}
        sides = [_from_text(prompt, form[name], name, tokenizer, data) for name in ("chosen", "rejected")]
    else:
        sides = _from_messages(form, tokenizer, data)
    chosen, rejected = sides
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not side["weights"][1:].any():
            raise ValueError(f"'{name}' is empty: there is nothing to prefer or to avoid")
    if np.array_equal(chosen["tokens"], rejected["tokens"]):
        raise ValueError("'chosen' and 'rejected' are the same tokens: the pair says nothing")
    if _shared(chosen, rejected) < 1:
        raise ValueError("'chosen' and 'rejected' do not begin alike: they are not of one prompt")
    return chosen, rejected


def _from_tokens(prompt: Any, completion: Any, name: str, tokenizer: Tokenizer) -> Example:
    for key, tokens in (("prompt_tokens", prompt), (name, completion)):
        if not isinstance(tokens, list) or not all(isinstance(t, int) and not isinstance(t, bool) for t in tokens):
            raise ValueError(f"'{key}' must be a list of integers")
        wrong = next((t for t in tokens if not 0 <= t < tokenizer.vocab_size), None)
        if wrong is not None:
            raise ValueError(f"'{key}': token id {wrong} is outside the vocabulary (0 to {tokenizer.vocab_size - 1})")
    if not prompt:
        raise ValueError("'prompt_tokens' is empty: a completion needs a token to come after")
    weights = np.concatenate([np.zeros(len(prompt)), np.ones(len(completion))])
    return {"tokens": np.asarray([*prompt, *completion], np.int32), "weights": weights.astype(np.float32)}


def _from_text(prompt: str, completion: str, name: str, tokenizer: Tokenizer, data: "Data") -> Example:
    if not completion:
        raise ValueError(f"'{name}' is empty: there is nothing to prefer or to avoid")
    return encode_completion(tokenizer, prompt, completion, data.add_eos)


def _from_messages(form: Mapping[str, Any], tokenizer: Tokenizer, data: "Data") -> list[Example]:
    """The messages that both have are the prompt: nothing is learnt in them."""
    prompt, chosen, rejected = list(form.get("prompt") or ()), form["chosen"], form["rejected"]
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    prompt += chosen[:common]
    still = [{**message, "weight": 0} if isinstance(message, Mapping) else message for message in prompt]
    return [
        encode_chat(tokenizer, [*still, *side[common:]], data.train_on, form.get("tools"))
        if side[common:]
        else _nothing()
        for side in (chosen, rejected)
    ]


def _nothing() -> Example:
    return {"tokens": np.zeros(1, np.int32), "weights": np.zeros(1, np.float32)}


def _common_text(a: str, b: str) -> str:
    """What two texts begin with, up to the end of a word (TRL's extract_prompt)."""
    size = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    common = a[:size]
    return common if common in (a, b) else common[: common.rfind(" ") + 1] or common[: common.rfind("\n") + 1]


def _shared(chosen: Example, rejected: Example) -> int:
    """Leading tokens that are the same in both, and learnt in neither."""
    size = min(len(chosen["tokens"]), len(rejected["tokens"]))
    apart = chosen["tokens"][:size] != rejected["tokens"][:size]
    apart |= (chosen["weights"][:size] > 0) | (rejected["weights"][:size] > 0)
    return int(apart.argmax()) if apart.any() else size


def fit_pair(pair: tuple[Example, Example], data: "Data") -> tuple[Columns | None, str]:
    """The columns of a pair, cut to data.max_length positions; the second value says what happened, as examples.fit.

    keep_start cuts the longer completion, then both; keep_end the prompt's beginning.
    """
    chosen, rejected = pair
    share = _shared(*pair) if data.share_prompt else 1
    sizes = [len(side["tokens"]) - share for side in pair]  # predictions in each branch
    over, happened = share - 1 + sum(sizes) - data.max_length, ""
    if over > 0:
        if data.truncation == "error":
            raise UsageError(
                f"the pair takes {over + data.max_length} positions, data.max_length is {data.max_length}: raise it, "
                "or set data.truncation to keep_start, keep_end or drop"
            )
        if data.truncation == "drop":
            return None, "too_long"
        happened = "truncated"
        if data.truncation == "keep_end":
            # without sharing the prompt is there twice
            cut = over if data.share_prompt else -(-over // 2)
            if cut >= _shared(*pair):
                return None, "too_long"
            chosen, rejected = ({name: column[cut:] for name, column in side.items()} for side in pair)
            share = _shared(chosen, rejected) if data.share_prompt else 1
        else:
            room = data.max_length - (share - 1)
            most = _level(sizes, room)
            if most < 1:
                return None, "too_long"
            chosen, rejected = ({name: column[: share + most] for name, column in side.items()} for side in pair)
            if np.array_equal(chosen["tokens"], rejected["tokens"]):
                return None, "too_long"  # they differed in what is cut off only
    if not (chosen["weights"][share:].any() and rejected["weights"][share:].any()):
        return None, "no_trained_token"
    return join_pair(chosen, rejected, share), happened


def _level(sizes: Sequence[int], room: int) -> int:
    """The largest cap under which both sizes fit into the room."""
    small = min(sizes)
    return room // 2 if 2 * small >= room else room - small


def join_pair(chosen: Example, rejected: Example, share: int) -> Columns:
    """The two as one example of shifted columns: the first `share` - 1 tokens once, then each from its token number
    `share` on (the last common token predicts two things, so each branch has its own)."""
    start, sides = share - 1, (chosen, rejected)
    pieces: dict[str, list[np.ndarray]] = {
        "tokens": [chosen["tokens"][:start], *(side["tokens"][start:-1] for side in sides)],
        "targets": [chosen["tokens"][1:share], *(side["tokens"][share:] for side in sides)],
        "weights": [np.zeros(start, np.float32), *(side["weights"][share:] for side in sides)],
        "positions": [np.arange(start), *(np.arange(start, len(side["tokens"]) - 1) for side in sides)],
    }
    columns = {name: np.concatenate(parts) for name, parts in pieces.items()}
    columns["positions"] = columns["positions"].astype(np.int32)
    lengths = [start, *(len(side["tokens"]) - share for side in sides)]
    columns["branches"] = np.repeat(np.asarray([0, CHOSEN, REJECTED], np.int32), lengths)
    return columns
