"""The kinds of rows people have, recognised by their keys and brought to few forms: messages, prompt/completion, text,
tokens; for preferences chosen/rejected and ranked completions. A `label` or `margin` goes along."""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

# kind -> the keys that make it; the first kind whose keys are all there wins
KINDS = {
    "preference_tokens": ("prompt_tokens", "chosen_tokens", "rejected_tokens"),
    "preference": ("chosen", "rejected"),
    "stepwise": ("completions", "labels"),
    "tokens": ("tokens",),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
    "completion_tokens": ("prompt_tokens", "completion_tokens"),
    "ranked": ("completions",),
    "prompt": ("prompt",),  # to be completed: nothing in it is learnt
}
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}


def kind_of(row: Mapping[str, Any]) -> str:
    """The kind of a row by its keys."""
    for kind, keys in KINDS.items():
        if all(row.get(key) is not None for key in keys):
            return kind
    allowed = "; ".join(f"{'+'.join(keys)} ({kind})" for kind, keys in KINDS.items())
    raise ValueError(f"row with the keys {', '.join(row) or '(none)'} is of no known kind; needs one of: {allowed}")


def check_kind(row: Mapping[str, Any], kind: str) -> None:
    """Raise ValueError when a row lacks the keys of the kind it is said to be."""
    missing = [key for key in KINDS[kind] if row.get(key) is None]
    if missing:
        raise ValueError(
            f"data.format is {kind}, but the row has no '{missing[0]}' (its keys: {', '.join(row) or 'none'})"
        )


def normalise(row: Mapping[str, Any], format: str = "auto") -> dict[str, Any]:
    """A row in one of the forms. Malformed rows raise ValueError."""
    kind = kind_of(row) if format == "auto" else format
    check_kind(row, kind)
    return _form(row, kind) | {key: row[key] for key in ("label", "margin") if row.get(key) is not None}


def _form(row: Mapping[str, Any], kind: str) -> dict[str, Any]:
    if kind == "alpaca":
        return _from_alpaca(row)
    if kind == "sharegpt":
        return _from_sharegpt(row)
    if kind == "prompt_completion":
        return _prompt_completion(row)
    if kind == "preference":
        return _preference(row)
    if kind == "ranked":
        return _ranked(row)
    if kind == "stepwise":
        return _stepwise(row)
    if kind in ("preference_tokens", "completion_tokens"):
        weights = [key.replace("_tokens", "_weights") for key in KINDS[kind][1:]]
        return {key: row[key] for key in (*KINDS[kind], *weights) if row.get(key) is not None}
    if kind == "prompt":
        return _prompt(row)
    keys = {"tokens": ("tokens", "weights"), "messages": ("messages", "tools"), "text": ("text",)}[kind]
    form = {key: row[key] for key in keys if row.get(key) is not None}
    wanted = {"text": str, "tokens": list | np.ndarray}.get(kind, list)
    if not isinstance(form[kind], wanted):
        raise ValueError(f"'{kind}' must be a {'string' if wanted is str else 'list'}, got {type(form[kind]).__name__}")
    return _with_tools(form)


def _with_tools(form: dict[str, Any]) -> dict[str, Any]:
    """Tools are JSON schemas, often kept as a string of JSON; bare functions get their usual wrapper."""
    tools = form.pop("tools", None)
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"'tools' is a string but not valid JSON: {error.msg}") from error
    if not tools:
        return form
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("'tools' must be a list of JSON schemas")
    wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return {**form, "tools": wrapped}


def _preference(row: Mapping[str, Any]) -> dict[str, Any]:
    """Two texts, or two lists of messages; without a prompt, what both begin with is it."""
    prompt, sides = row.get("prompt"), {name: row[name] for name in ("chosen", "rejected")}
    texts = [isinstance(side, str) for side in sides.values()]
    if all(texts) and (prompt is None or isinstance(prompt, str)):
        return sides if prompt is None else {"prompt": prompt, **sides}
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    for name, side in sides.items():
        if isinstance(side, str):
            sides[name] = [{"role": "assistant", "content": side}]
        elif isinstance(side, Mapping):
            sides[name] = [side]
    for name, value in (("prompt", prompt), *sides.items()):
        if value is not None and not isinstance(value, list):
            raise ValueError(f"'{name}' must be a string or a list of messages, got {type(value).__name__}")
    form = {"prompt": prompt or [], **sides}
    return _with_tools(form | ({"tools": row["tools"]} if row.get("tools") else {}))


def _ranked(row: Mapping[str, Any]) -> dict[str, Any]:
    """Several completions of one prompt, best first, or with scores (higher is better)."""
    completions, scores = row["completions"], row.get("scores")
    if not isinstance(completions, list) or len(completions) < 2:
        raise ValueError("'completions' must be a list of at least two")
    if scores is not None:
        if not isinstance(scores, list) or len(scores) != len(completions):
            raise ValueError(f"'scores' must be a list as long as 'completions' ({len(completions)})")
        wrong = [score for score in scores if not is_number(score)]
        if wrong:
            raise ValueError(f"'scores' must be finite numbers, got {wrong[0]!r}")
    return {key: row[key] for key in ("prompt", "completions", "scores", "tools") if row.get(key) is not None}


def is_number(value: Any) -> bool:
    """Whether it is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _stepwise(row: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt, steps, and whether each is right."""
    steps, labels = row["completions"], row["labels"]
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) for step in steps):
        raise ValueError("'completions' must be a list of texts, the steps, at least one")
    if not isinstance(labels, list) or not all(type(label) is bool or label in (0, 1) for label in labels):
        raise ValueError("'labels' must be a list of true and false")
    if len(labels) != len(steps):
        raise ValueError(f"there are {len(steps)} 'completions' and {len(labels)} 'labels': each step needs its own")
    if not isinstance(row.get("prompt"), str | list):
        raise ValueError("'prompt' must be a string or a list of messages")
    return {"prompt": row["prompt"], "completions": steps, "labels": labels}


def _prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(row["prompt"], str | list):
        raise ValueError(f"'prompt' must be text or a list of messages, got {type(row['prompt']).__name__}")
    return _with_tools({"prompt": row["prompt"]} | ({"tools": row["tools"]} if row.get("tools") else {}))


def _prompt_completion(row: Mapping[str, Any]) -> dict[str, Any]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return {"prompt": prompt, "completion": completion}
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise ValueError("'prompt' and 'completion' must be strings or lists of messages")
    form = {"prompt": prompt, "completion": completion}
    return _with_tools(form | ({"tools": row["tools"]} if row.get("tools") else {}))


def _from_alpaca(row: Mapping[str, Any]) -> dict[str, Any]:
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for turn in row.get("history") or []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise ValueError("'history' must be a list of [instruction, output] pairs")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    question = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
    return {"messages": messages}


def _from_sharegpt(row: Mapping[str, Any]) -> dict[str, Any]:
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise ValueError(f"'conversations' must be a list, got {type(turns).__name__}")
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
            raise ValueError(f"turn {number} of 'conversations' needs the keys 'from' and 'value'")
        if turn["from"] not in SHAREGPT_ROLES:
            raise ValueError(f"turn {number} is from '{turn['from']}', allowed: {', '.join(SHAREGPT_ROLES)}")
        message: dict[str, Any] = {"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}
        if turn["from"] == "function_call":
            message = {"role": "assistant", "tool_calls": _calls(turn["value"], number)}
        messages.append(message | {key: turn[key] for key in ("weight", "loss_weight", "train") if key in turn})
    return _with_tools({"messages": messages} | ({"tools": row["tools"]} if row.get("tools") else {}))


def _calls(value: Any, number: int) -> list[dict[str, Any]]:
    try:
        calls = json.loads(value) if isinstance(value, str) else value
        calls = calls if isinstance(calls, list) else [calls]
        return [{"type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}} for c in calls]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"turn {number} is a function_call, but not JSON with 'name' and 'arguments'") from error
