"""Conversations to tokens, and which of them the model is to learn: every turn, in any template.

What is learnt in an assistant turn is all that the model itself would have to produce there: everything after what
the template's generation prompt supplies, tool calls and reasoning included, up to and with the end-of-turn token.
The conversation is rendered once and tokenised once; the turns are found as characters of that one text. A template
may say where they are ({% generation %} markers). Where it does not, two questions to the template find them: how it
renders the conversation up to the turn (fast; fails where a template writes old turns differently), and what changes
when only this turn's content is replaced by something unique (always exact for the content).
"""

import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from configs.errors import UsageError
from data.tokenizer import Tokenizer

ROLES = ("template", "system", "user", "assistant", "tool", "other")
WEIGHT_KEYS = ("weight", "loss_weight", "train")
Example = dict[str, np.ndarray]


class Span(NamedTuple):
    """Characters [start, end) of the rendered text, and what they are."""

    start: int
    end: int
    weight: float
    role: str


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    train_on: Sequence[str] = ("assistant",),
    tools: Sequence[Any] | None = None,
    roles: bool = False,
) -> Example:
    """Tokens i32[n] and weights f32[n] (1 where a token of a role in train_on is to be produced, times the message's
    own `weight`, if any); with roles=True also roles i8[n], indices into ROLES. Malformed messages: ValueError."""
    weights = [_weight(message, train_on) for message in messages]
    clean = [_clean(message, number) for number, message in enumerate(messages, 1)]
    if not clean:
        raise ValueError("'messages' is empty: a conversation needs at least one message")
    clean, text = _render(tokenizer, clean, tools)
    spans = find_turns(tokenizer, clean, tools, text, weights)
    ids, offsets = tokenizer.encode_with_offsets(text)
    example = {"tokens": np.asarray(ids, np.int32), "weights": np.zeros(len(ids), np.float32)}
    for span in spans:
        example["weights"][_covered(offsets, span)] = span.weight
    if roles:
        example["roles"] = np.zeros(len(ids), np.int8)
        for span in [*_contents(tokenizer, clean, tools, text), *spans]:
            name = span.role if span.role in ROLES else "other"
            example["roles"][_covered(offsets, span)] = ROLES.index(name)
    return example


def encode_completion(
    tokenizer: Tokenizer, prompt: str, completion: str, add_eos: bool = True, completion_only: bool = True
) -> Example:
    """Prompt and completion tokenised as one text (as at inference), weights 1 on the completion and its EOS."""
    if not prompt:
        ids = tokenizer.encode(completion)  # three times sooner: no places in the text are needed
        weights = np.ones(len(ids), np.float32)
    else:
        ids, offsets = tokenizer.encode_with_offsets(prompt + completion)
        weights = np.zeros(len(ids), np.float32)
        start = len(prompt) if completion_only else 0
        weights[_covered(offsets, Span(start, len(prompt) + len(completion), 1.0, "assistant"))] = 1.0
    begin, end = _frame(tokenizer, ids, add_eos)
    return {
        "tokens": np.asarray([*begin, *ids, *end], np.int32),
        "weights": np.concatenate([np.zeros(len(begin)), weights, np.ones(len(end))]).astype(np.float32),
    }


def encode_document(tokenizer: Tokenizer, text: str, add_eos: bool = True) -> list[int]:
    """The tokens that encode_completion gives for a text alone."""
    ids = tokenizer.encode(text)
    begin, end = _frame(tokenizer, ids, add_eos)
    return [*begin, *ids, *end]


def _frame(tokenizer: Tokenizer, ids: list[int], add_eos: bool) -> tuple[list[int], list[int]]:
    """What goes before and behind a text's tokens: the start (BOS) and the end, unless they are written out already."""
    end = list(tokenizer.eos_ids[:1]) if add_eos and not (ids and ids[-1] in tokenizer.eos_ids) else []
    return [] if ids[: len(tokenizer.prefix)] == tokenizer.prefix else tokenizer.prefix, end


def end_of_turn(tokenizer: Tokenizer) -> str:
    """The special token that the template puts after an assistant's turn; '' where it puts none."""
    return _probe(tokenizer)[1]


def find_turns(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: Any, text: str, weights: Sequence[float]
) -> list[Span]:
    """The characters of `text` that turns with a weight have to produce, in order."""
    wanted = [number for number, weight in enumerate(weights) if weight]
    if not wanted:
        return []
    only_assistant = all(messages[number]["role"] == "assistant" for number in wanted)
    if only_assistant and tokenizer.has_generation_markers(tools):
        return _marked(tokenizer, messages, tools, text, weights)
    spans: list[Span] = []
    for number in wanted:
        found = _by_prefix(tokenizer, messages, tools, text, number)
        start, end = found or _by_difference(tokenizer, messages, tools, text, number)
        if spans and start < spans[-1].end:
            raise _lost(number, "its text overlaps that of an earlier turn")
        spans.append(Span(start, end, weights[number], messages[number]["role"]))
    return spans


def _weight(message: Any, train_on: Sequence[str]) -> float:
    if not isinstance(message, Mapping) or message.get("role") not in train_on:
        return 0.0
    value = next((message[key] for key in WEIGHT_KEYS if message.get(key) is not None), 1.0)
    if not isinstance(value, bool | int | float) or value < 0:
        raise ValueError(f"a message's weight must be a number >= 0 or true/false, got {value!r}")
    return float(value)


def _clean(message: Any, number: int) -> dict[str, Any]:
    """The message as the template is to see it: without our keys, text parts joined."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"message {number} must be an object with a 'role', got {_short(message)}")
    message = {key: value for key, value in message.items() if key not in WEIGHT_KEYS}
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        parts = [part.get("text", part.get("value")) for part in content]
        if all(isinstance(part, str) for part in parts):
            content = message["content"] = "".join(parts)
    if content is None and not message.get("tool_calls"):
        raise ValueError(f"message {number} ({message['role']}) has neither 'content' nor 'tool_calls'")
    if content is not None and not isinstance(content, str):
        raise ValueError(f"message {number} ({message['role']}): 'content' must be text, got {_short(content)}")
    return message


def _render(tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: Any) -> tuple[list[dict[str, Any]], str]:
    """The conversation's text. Some templates want the content of a message of tool calls to be there, if empty."""
    try:
        return messages, tokenizer.render(messages, tools=tools)
    except ValueError:
        filled = [{**message, "content": message.get("content") or ""} for message in messages]
        if filled == messages:
            raise
        return filled, tokenizer.render(filled, tools=tools)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _covered(offsets: Sequence[tuple[int, int]], span: Span) -> np.ndarray:
    """Tokens that stand for at least one character of the span. (Pieces of a character may have width 0.)"""
    if not offsets:
        return np.zeros(0, bool)
    starts, ends = np.asarray(offsets).T
    return (starts < span.end) & ((ends > span.start) | ((starts == ends) & (starts == span.start)))


def _marked(tokenizer: Tokenizer, messages: Any, tools: Any, text: str, weights: Sequence[float]) -> list[Span]:
    """The turns as the template marks them. A marker that stops short of the end-of-turn token is extended by it:
    a model that never learns to stop is never wanted."""
    rendered, marks = tokenizer.render_with_generation(messages, tools)
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if rendered != text:
        raise UsageError("the chat template renders the same conversation differently each time")
    if len(marks) != len(turns) and len({weights[number] for number in turns}) > 1:
        raise ValueError(
            f"messages carry weights, but the template marks {len(marks)} generated parts for {len(turns)} turns"
        )
    values = [weights[number] for number in turns] if len(marks) == len(turns) else [1.0] * len(marks)
    marked = zip(marks, values, strict=True)
    return [Span(start, _closed(tokenizer, text, start, end), weight, "assistant") for (start, end), weight in marked]


def _closed(tokenizer: Tokenizer, text: str, start: int, end: int) -> int:
    """Where the turn text[start:end] really ends: with its end-of-turn token, which may follow it, and without the
    newline after that token, which is never generated."""
    bare = start + len(text[start:end].rstrip())
    if _marks_end(tokenizer):
        return bare if any(match.end() == bare for match in _ends(tokenizer).finditer(text, start, end)) else end
    following = re.compile(rf"\s*({_ends(tokenizer).pattern})").match(text, end)
    return following.end() if following else end


def _by_prefix(tokenizer: Tokenizer, messages: Any, tools: Any, text: str, number: int) -> tuple[int, int] | None:
    """The turn between two shorter renderings, where both begin the full text and all looks as it should."""
    message = messages[number]
    header = _probe(tokenizer)[0]
    content = (message.get("content") or "").strip()
    if number == 0 or message["role"] != "assistant" or not header or not content or message.get("tool_calls"):
        return None
    prompt = _try(tokenizer, messages[:number], tools, True)
    upto = text if number == len(messages) - 1 else _try(tokenizer, messages[: number + 1], tools)
    if not prompt or not upto or not prompt.endswith(header):
        return None
    if not text.startswith(prompt) or not text.startswith(upto):
        return None
    at = text.rfind(content, len(prompt), len(upto))
    stop = _ends(tokenizer).search(text, at + len(content), len(upto)) if at >= 0 else None
    if stop is None or text[at + len(content) : stop.start()].strip():
        return None
    return len(prompt), stop.end()


def _by_difference(tokenizer: Tokenizer, messages: Any, tools: Any, text: str, number: int) -> tuple[int, int]:
    """The turn around the characters that change when its content does."""
    first, last = _difference(tokenizer, messages, tools, text, number)
    start = first
    if messages[number]["role"] == "assistant":
        start = _start(tokenizer, messages, tools, text, number, first)
    own = text if number == len(messages) - 1 else _try(tokenizer, messages[: number + 1], tools)
    known = own is not None and len(own) >= last and text.startswith(own)
    limit = len(own) if known and own is not None else len(text)
    stop = _ends(tokenizer).search(text, last, limit)
    if stop and (known or not text[last : stop.start()].strip()):
        return start, stop.end()
    if not known:
        return start, last
    end = last + len(text[last:limit].rstrip())
    # no end-of-turn token of its own: the model stops at the next turn's first token, where that is an EOS (GLM)
    following = _ends(tokenizer).match(text, limit)
    return start, following.end() if following and end == last else end


def _start(tokenizer: Tokenizer, messages: Any, tools: Any, text: str, number: int, first: int) -> int:
    """Where the model takes over in an assistant turn whose content begins at `first`."""
    header = _probe(tokenizer)[0]
    prompt = _try(tokenizer, messages[:number], tools, True) if number else None
    if prompt is not None and len(prompt) <= first and text.startswith(prompt):
        # without a generation prompt, anything but space before the content is the role's header
        if header or not text[len(prompt) : first].strip():
            return len(prompt)
        return first
    at = text.rfind(header, 0, first) if header else -1
    if at >= 0 and not _ends(tokenizer).search(text, at + len(header), first):
        return at + len(header)
    return first


def _difference(tokenizer: Tokenizer, messages: Any, tools: Any, text: str, number: int) -> tuple[int, int]:
    """First and last+1 character of what the template makes of a message's content and tool calls."""
    mark = _unused(text + json.dumps(messages, ensure_ascii=False, default=str))
    for trial in _replacements(messages[number], mark):
        other = _try(tokenizer, [*messages[:number], trial, *messages[number + 1 :]], tools)
        if other is None or other.count(mark) != sum(_count(value, mark) for value in trial.values()):
            continue
        first = _shared(text, other)
        after = min(_shared(text[::-1], other[::-1]), len(text) - first, len(other) - first)
        changed = other[first : len(other) - after]
        # text right after the last mark that also changed would belong to another message
        if changed.endswith(mark) or (trial.get("tool_calls") and changed.count(mark) == other.count(mark)):
            return first, len(text) - after
    raise _lost(number, "it drops, repeats or moves the message's content")


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    return len(os.path.commonprefix([one, other]))  # noqa: RUF071 (characters are meant, these are no paths)


def _replacements(message: dict[str, Any], mark: str) -> list[dict[str, Any]]:
    """Versions of a message with its content replaced: first the simplest, then one that keeps the tool calls (a
    template may refuse tool results that nobody asked for)."""
    plain = {key: value for key, value in message.items() if key not in ("tool_calls", "reasoning_content", "thinking")}
    trials = [{**plain, "content": mark}, {**message, "content": mark}]
    if message.get("tool_calls"):
        calls = []
        for call in message["tool_calls"]:
            function = call.get("function", call)
            given = function.get("arguments")
            text = json.dumps({"a": mark}, ensure_ascii=False)
            changed = {**function, "arguments": text if isinstance(given, str) else {"a": mark}}
            calls.append({**call, "function": changed} if "function" in call else changed)
        trials[1] = {**message, "tool_calls": calls, **({"content": mark} if message.get("content") else {})}
    return trials


def _count(value: Any, mark: str) -> int:
    return json.dumps(value, ensure_ascii=False, default=str).count(mark)


def _contents(tokenizer: Tokenizer, messages: Any, tools: Any, text: str) -> list[Span]:
    """Every message's own text, for colouring; a message that the template hides is left out."""
    spans = []
    for number, message in enumerate(messages):
        try:
            spans.append(Span(*_difference(tokenizer, messages, tools, text, number), 1.0, message["role"]))
        except ValueError:
            continue
    return spans


def _unused(text: str) -> str:
    """A private-use character that occurs nowhere: cannot be confused with, or trimmed like, real content."""
    return next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)


def _try(tokenizer: Tokenizer, messages: Any, tools: Any, prompt: bool = False) -> str | None:
    """A rendering, or None where the template refuses such a conversation."""
    try:
        return tokenizer.render(messages, prompt, tools)
    except UsageError:
        raise
    except ValueError:
        return None


@functools.lru_cache(maxsize=16)
def _probe(tokenizer: Tokenizer) -> tuple[str, str]:
    """The template's generation prompt and its end-of-turn token, from a conversation of our own."""
    user, reply = {"role": "user", "content": "\ue000"}, {"role": "assistant", "content": "\ue001"}
    bare, asked = _try(tokenizer, [user], None), _try(tokenizer, [user], None, True)
    header = asked[len(bare) :] if bare is not None and asked is not None and asked.startswith(bare) else ""
    after = (_try(tokenizer, [user, reply], None) or "").partition("\ue001")[2].strip()
    names = sorted(tokenizer.special_tokens, key=len, reverse=True)
    return header, next((name for name in names if after.startswith(name)), "")


@functools.lru_cache(maxsize=16)
def _marks_end(tokenizer: Tokenizer) -> bool:
    """Whether the template's {% generation %} markers include the end-of-turn token."""
    user, reply = {"role": "user", "content": "\ue000"}, {"role": "assistant", "content": "\ue001"}
    try:
        text, marks = tokenizer.render_with_generation([user, reply])
    except ValueError:
        return True
    return bool(marks) and _ends(tokenizer).search(text, *marks[-1]) is not None


@functools.lru_cache(maxsize=16)
def _ends(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Matches the tokens at which generation stops: the tokenizer's, and the template's end of turn."""
    names = [name for name, index in tokenizer.special_tokens.items() if index in tokenizer.eos_ids]
    names = sorted({*names, _probe(tokenizer)[1]} - {""}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")


def _lost(number: int, why: str) -> ValueError:
    return ValueError(
        f"cannot tell which tokens message {number + 1} stands for in this chat template: {why}; add {{% generation %}}"
        " ... {% endgeneration %} around what the assistant writes, and pass the template as data.chat_template"
    )
