"""Completions labelled desirable or not, to columns: the prompt, the completion as branch 1 and, where the objective
compares with it (KTO's z0), the completion of the row before as branch 2, which no batching changes."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.errors import UsageError
from data.chat import Example
from data.pairs import Columns, Form, encode_completions, encode_pair, fit_branches, pairs_of
from data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from configs.schema import Data

ANSWERS = ("assistant", "tool")


def labelled_of(form: Form, data: "Data") -> list[Form]:
    """The labelled completions that a row stands for: itself, or both sides of each of its pairs, chosen first."""
    if not {"chosen", "chosen_tokens", "completions"} & form.keys():
        return [form]
    return [{**pair, "label": label} for pair in pairs_of(form, data) for label in (True, False)]


def encode_labelled(form: Form, tokenizer: Tokenizer, data: "Data") -> Example:
    """Prompt and completion, unshifted: weight 1 on the completion, `desirable` (the label) everywhere; of a pair, the
    side that the label names. Malformed rows: ValueError."""
    if {"text", "tokens"} & form.keys():
        raise UsageError("the objective trains on labelled completions: a row needs prompt, completion and label")
    label = form.get("label")
    if label is None:
        raise ValueError("the row has no 'label': true where the completion is desirable, else false")
    if not isinstance(label, bool | int) or label not in (0, 1):
        raise ValueError(f"'label' must be true or false (or 1 or 0), got {label!r}")
    if "chosen" in form or "chosen_tokens" in form:
        example = encode_pair(form, tokenizer, data)[0 if label else 1]
    else:
        form = {**form, **_split(form["messages"])} if "messages" in form else form
        (example,) = encode_completions(form, ("completion",), tokenizer, data)
    tokens, weights = example["tokens"], example["weights"]
    return {"tokens": tokens, "weights": weights, "desirable": np.full(len(tokens), label, np.float32)}


def _split(messages: list[Any]) -> dict[str, Any]:
    """A conversation's completion is what stands after the last message that is not the model's or a tool's."""
    size = len(messages)
    while size and isinstance(messages[size - 1], Mapping) and messages[size - 1].get("role") in ANSWERS:
        size -= 1
    if size == len(messages):
        raise ValueError("'messages' must end with an assistant's message: that is what the label is about")
    return {"prompt": messages[:size], "completion": messages[size:]}


def fit_labelled(example: Example, data: "Data") -> tuple[Columns | None, str]:
    """The columns of a labelled completion, cut to data.max_length positions, and what happened, as examples.fit."""
    return fit_branches((example,), data)


def fit_mismatched(given: tuple[Example, Example], data: "Data") -> tuple[Columns | None, str]:
    """The same, and as branch 2 the completion of the second example behind the prompt of the first.

    The labelled completion is what is learnt, so data.truncation is about it. The mismatched one only samples how far
    the policy has gone from the reference: what room is left is enough, a cut end makes its part of that smaller.
    """
    own, other = given
    start, begin = (int((example["weights"] > 0).argmax()) for example in given)
    mismatched = {name: np.concatenate([own[name][:start], other[name][begin:]]) for name in ("tokens", "weights")}
    shared = start if data.share_prompt else 1
    room = shared + data.max_length - (len(own["tokens"]) - 1)  # in tokens, the shared ones too
    cut = {name: column[: max(room, start + 1)] for name, column in mismatched.items()}
    cut["desirable"] = np.full(len(cut["tokens"]), own["desirable"][0])
    columns, happened = fit_branches((own, cut), data)
    short = columns is not None and len(cut["tokens"]) < len(mismatched["tokens"])
    return columns, happened or ("truncated" if short else "")
