"""Preference rows to columns: a prompt once, and behind it the chosen and the rejected completion as two branches."""

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.errors import UsageError
from data.chat import Example, encode_chat, encode_completion
from data.formats import is_number, normalise
from data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from configs.schema import Data

Columns = dict[str, np.ndarray]
CHOSEN, REJECTED = 1, 2  # branches; 0 is what both go on from
Form = Mapping[str, Any]


def pairs_of(form: Form, data: "Data") -> list[Form]:
    """The pairs that a row stands for: itself, or those that data.pairs takes from its ranked completions.

    Equal completions, equal scores and margins below data.min_margin give none."""
    ranked = "completions" in form and "labels" not in form  # labelled steps are no list of answers
    found = _ranked_pairs(form, data.pairs) if ranked else [form]
    return [pair for pair in found if "margin" not in pair or _margin(pair) >= data.min_margin]


def _ranked_pairs(form: Form, which: str) -> list[Form]:
    completions, scores = form["completions"], form.get("scores")
    order = list(range(len(completions)))
    if scores is not None:
        order.sort(key=lambda number: -scores[number])  # stable: the first of equals stays first
    pairs = {"all": combinations(order, 2), "adjacent": pairwise(order), "best_worst": [(order[0], order[-1])]}[which]
    shared, made = {key: form[key] for key in ("prompt", "tools") if key in form}, []
    for better, worse in pairs:
        chosen, rejected = completions[better], completions[worse]
        if chosen == rejected or (scores is not None and scores[better] == scores[worse]):
            continue
        row = {**shared, "chosen": chosen, "rejected": rejected}
        margin = {} if scores is None else {"margin": scores[better] - scores[worse]}
        made.append(normalise(row | margin, "preference"))
    return made


def _margin(form: Form) -> float:
    """By how much chosen is better; 0 where nothing is said."""
    margin = form.get("margin", 0.0)
    if not is_number(margin):
        raise ValueError(f"'margin' must be a finite number, got {margin!r}")
    return float(margin)


def encode_pair(form: Form, tokenizer: Tokenizer, data: "Data") -> tuple[Example, Example]:
    """Prompt and chosen, prompt and rejected: unshifted, weight 1 (or the row's own) on the completion, and `margins`
    everywhere. Malformed rows: ValueError."""
    if "chosen_tokens" not in form:
        if "chosen" not in form:
            raise UsageError("the objective trains on pairs: a row needs chosen and rejected (or their _tokens)")
        form = {**form, **(_split_text(form) if isinstance(form["chosen"], str) else _split_messages(form, data))}
    chosen, rejected = encode_completions(form, ("chosen", "rejected"), tokenizer, data)
    if np.array_equal(chosen["tokens"], rejected["tokens"]):
        raise ValueError("'chosen' and 'rejected' are the same tokens: the pair says nothing")
    if shared_tokens((chosen, rejected)) < 1:
        raise ValueError("'chosen' and 'rejected' do not begin alike: they are not of one prompt")
    for side in (chosen, rejected):
        side["margins"] = np.full(len(side["tokens"]), _margin(form), np.float32)
    return chosen, rejected


def encode_completions(form: Form, names: Sequence[str], tokenizer: Tokenizer, data: "Data") -> list[Example]:
    """The prompt of a form with each of the named completions behind it: unshifted, weight 0 on the prompt; up to the
    last token that is learnt."""
    examples = []
    for name in names:
        if "prompt_tokens" in form:
            example = _from_tokens(form, name, tokenizer)
        elif _is_empty(form[name]):
            raise ValueError(f"'{name}' is empty: there is nothing to prefer or to avoid")
        elif isinstance(form[name], str):
            example = encode_completion(tokenizer, form["prompt"], form[name], data.add_eos)
        else:
            still = [
                {**message, "weight": 0} if isinstance(message, Mapping) else message for message in form["prompt"]
            ]
            example = encode_chat(tokenizer, [*still, *form[name]], data.train_on, form.get("tools"))
        if example["weights"][:1].any():
            raise ValueError(f"the prompt has no token of its own: '{name}' needs one to come after")
        if not example["weights"].any():
            raise ValueError(f"'{name}' is empty, or nothing in it carries loss (data.train_on, weights)")
        examples.append(ended(example))
    return examples


def ended(example: Example) -> Example:
    """The example up to its last learnt token: templates write a newline behind the end of a turn."""
    last = int(np.flatnonzero(example["weights"])[-1])
    return {name: column[: last + 1] for name, column in example.items()}


def _is_empty(completion: Any) -> bool:
    """Whether it is no text, or messages that say and call nothing."""
    if isinstance(completion, str):
        return not completion
    return all(isinstance(m, Mapping) and not m.get("content") and not m.get("tool_calls") for m in completion)


def _from_tokens(form: Form, name: str, tokenizer: Tokenizer) -> Example:
    prompt, completion = form["prompt_tokens"], form[f"{name}_tokens"]
    for key, tokens in (("prompt_tokens", prompt), (f"{name}_tokens", completion)):
        if not isinstance(tokens, list) or not all(isinstance(t, int) and not isinstance(t, bool) for t in tokens):
            raise ValueError(f"'{key}' must be a list of integers")
        wrong = next((t for t in tokens if not 0 <= t < tokenizer.vocab_size), None)
        if wrong is not None:
            raise ValueError(f"'{key}': token id {wrong} is outside the vocabulary (0 to {tokenizer.vocab_size - 1})")
    if not prompt:
        raise ValueError("'prompt_tokens' is empty: a completion needs a token to come after")
    weights = form.get(f"{name}_weights", [1.0] * len(completion))
    if not isinstance(weights, list) or len(weights) != len(completion):
        raise ValueError(f"'{name}_weights' must be a list as long as '{name}_tokens' ({len(completion)})")
    if not all(is_number(weight) and weight >= 0 for weight in weights):
        raise ValueError(f"'{name}_weights' must be finite numbers >= 0")
    weights = np.concatenate([np.zeros(len(prompt)), weights])
    return {"tokens": np.asarray([*prompt, *completion], np.int32), "weights": weights.astype(np.float32)}


def _split_text(form: Form) -> Form:
    """Two texts without a prompt: what both begin with is it."""
    if "prompt" in form:
        return {}
    prompt = _common_text(form["chosen"], form["rejected"])
    if not prompt:
        raise ValueError("'chosen' and 'rejected' do not begin alike: they are not of one prompt")
    return {"prompt": prompt, **{name: form[name][len(prompt) :] for name in ("chosen", "rejected")}}


def _common_text(a: str, b: str) -> str:
    """What two texts begin with, up to the end of a word (TRL's extract_prompt)."""
    size = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    common = a[:size]
    return common if common in (a, b) else common[: common.rfind(" ") + 1] or common[: common.rfind("\n") + 1]


def _split_messages(form: Form, data: "Data") -> Form:
    """The messages that both have belong to the prompt: nothing is learnt in them."""
    prompt, sides = form["prompt"], {name: form[name] for name in ("chosen", "rejected")}
    together = list(zip(*sides.values(), strict=False))
    common = next((i for i, (a, b) in enumerate(together) if a != b), len(together))
    shared = form["chosen"][:common]
    if shared[-len(prompt) :] != prompt:  # many data sets give the prompt and repeat it in both sides
        shared = prompt + shared
    for name, side in sides.items():
        role = side[common].get("role") if len(side) > common and isinstance(side[common], Mapping) else None
        if role is not None and role not in data.train_on:
            raise ValueError(f"the prompts of 'chosen' and 'rejected' differ: '{name}' parts with a {role}'s message")
    return {"prompt": shared, **{name: side[common:] for name, side in sides.items()}}


def shared_tokens(sides: Sequence[Example]) -> int:
    """Leading tokens that are the same in all, and learnt in none."""
    size = min(len(side["tokens"]) for side in sides)
    tokens, weights = (np.stack([side[name][:size] for side in sides]) for name in ("tokens", "weights"))
    apart = (tokens != tokens[0]).any(0) | (weights > 0).any(0)
    return int(apart.argmax()) if apart.any() else size


def fit_pair(pair: tuple[Example, Example], data: "Data") -> tuple[Columns | None, str]:
    """The columns of a pair, cut to data.max_length positions; the second value says what happened, as examples.fit."""
    columns, happened = fit_branches(pair, data)
    if columns is not None and happened:
        chosen, rejected = (columns["targets"][columns["branches"] == side] for side in (CHOSEN, REJECTED))
        if np.array_equal(chosen, rejected):
            return None, "too_long"  # they differed in what is cut off only
    return columns, happened


def fit_branches(sides: Sequence[Example], data: "Data") -> tuple[Columns | None, str]:
    """The columns of completions of one prompt, cut to data.max_length positions, and what happened, as examples.fit.

    keep_start cuts the longest completion, then all; keep_end the prompt's beginning.
    """
    common = shared_tokens(sides)
    share = common if data.share_prompt else 1
    sizes = [len(side["tokens"]) - share for side in sides]  # predictions in each branch
    over, happened = share - 1 + sum(sizes) - data.max_length, ""
    if over > 0:
        if data.truncation == "error":
            raise UsageError(
                f"the prompt and its completions take {over + data.max_length} positions, data.max_length is "
                f"{data.max_length}: raise it, or set data.truncation to keep_start, keep_end or drop"
            )
        if data.truncation == "drop":
            return None, "too_long"
        happened = "truncated"
        if data.truncation == "keep_end":
            # without sharing each has the prompt
            cut = over if data.share_prompt else -(-over // len(sides))
            if cut >= common:
                return None, "too_long"
            kept, share = slice(cut, None), share - cut if data.share_prompt else 1
        else:
            most = _level(sizes, data.max_length - (share - 1))
            if most < 1:
                return None, "too_long"
            kept = slice(share + most)
        sides = [{name: column[kept] for name, column in side.items()} for side in sides]
    if not all(side["weights"][share:].any() for side in sides):
        return None, "no_trained_token"
    return join_branches(sides, share), happened


def _level(sizes: Sequence[int], room: int) -> int:
    """The largest cap under which all sizes fit into the room."""
    for left, size in zip(range(len(sizes), 0, -1), sorted(sizes), strict=True):
        if size * left >= room:
            return room // left
        room -= size
    return max(sizes)


def join_branches(sides: Sequence[Example], share: int) -> Columns:
    """Completions of one prompt as one example of shifted columns: the first `share` - 1 tokens once, then each side
    from its token number `share` on (the last common token predicts several things, so each branch has its own)."""
    start, first = share - 1, sides[0]
    lengths = [start, *(len(side["tokens"]) - share for side in sides)]
    # all but tokens belong to what is predicted
    columns = {name: np.concatenate([first[name][1:share], *(side[name][share:] for side in sides)]) for name in first}
    columns["targets"] = columns["tokens"]
    columns["tokens"] = np.concatenate([first["tokens"][:start], *(side["tokens"][start:-1] for side in sides)])
    columns["positions"] = np.concatenate([np.arange(start), *(start + np.arange(size) for size in lengths[1:])])
    columns["positions"] = columns["positions"].astype(np.int32)
    columns["branches"] = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    return columns


def join_pair(chosen: Example, rejected: Example, share: int) -> Columns:
    """join_branches of two."""
    return join_branches((chosen, rejected), share)
