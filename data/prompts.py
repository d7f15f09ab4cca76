"""Rows as prompts: what a model is to go on from, and the other columns, which rewards may read."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from configs.errors import UsageError
from data.formats import kind_of, normalise
from data.sources import open_source
from data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from configs.schema import Data

Value = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Prompt:
    """What completions go on from: as a reward sees it (text or messages), and as the model does."""

    where: str  # file and line
    value: Value
    tokens: list[int]
    columns: dict[str, Any]  # what else the row holds


def read_prompts(paths: Sequence[str], tokenizer: Tokenizer, data: "Data") -> tuple[list[Prompt], int]:
    """The prompts of files of any training rows, and how many malformed rows data.on_bad_row=skip left out."""
    if data.chat_template is not None:
        tokenizer = tokenizer.with_chat_template(data.chat_template)
    template = data.prompt_template
    format = data.format if template is None else "prompt"
    records = open_source(paths, data.format if template is None else None)
    prompts, bad = [], ""
    for index in range(len(records)):
        where = records.where(index)
        try:
            prompts.append(_read(fill_template(records[index], template), format, tokenizer, where))
        except UsageError as error:  # not the row is at fault: no row would do
            raise UsageError(f"{where}: {error}") from error
        except ValueError as error:
            message = str(error) if str(error).startswith(where) else f"{where}: {error}"
            if data.on_bad_row == "error":
                raise UsageError(f"{message} (data.on_bad_row=skip would count and skip such rows)") from error
            bad = bad or message
    if not prompts:
        raise UsageError(f"no prompt is left of {len(records)} rows; the first malformed one: {bad}")
    return prompts, len(records) - len(prompts)


def fill_template(row: Mapping[str, Any], template: str | None) -> Mapping[str, Any]:
    """The row with its prompt made of a template, a user's message with {column} in it; as it is without one."""
    if template is None:
        return row

    def cell(found: re.Match[str]) -> str:
        if row.get(found[1]) is None:
            raise ValueError(f"data.prompt_template has {found[0]}, the row has {', '.join(row)}")
        return str(row[found[1]])

    return {**row, "prompt": [{"role": "user", "content": re.sub(r"\{(\w+)\}", cell, template)}]}


def _read(row: Mapping[str, Any], format: str, tokenizer: Tokenizer, where: str) -> Prompt:
    kind = kind_of(row) if format == "auto" else format
    form = normalise(row, kind)
    value = split_prompt(form)
    if isinstance(value, str):
        tokens = tokenizer.encode(value, special=True)
    elif isinstance(value[0], int):
        tokens, value = value, tokenizer.decode(value)
    else:
        tokens = tokenizer.encode(tokenizer.render(value, add_generation_prompt=True, tools=form.get("tools")))
    return Prompt(where, value, tokens, {key: cell for key, cell in row.items() if key != "prompt"})


def split_prompt(form: Mapping[str, Any]) -> Any:
    """The prompt part of a normalised row: text, messages or token ids. A row without one raises ValueError."""
    if "prompt_tokens" in form:
        value = form["prompt_tokens"]
    elif "messages" in form:
        value = list(form["messages"])
        while value and isinstance(value[-1], Mapping) and value[-1].get("role") == "assistant":
            value.pop()
    elif form.get("prompt") or "chosen" not in form:
        value = form.get("prompt")
    elif isinstance(form["chosen"], str):
        common = os.path.commonprefix([form["chosen"], form["rejected"]])  # noqa: RUF071 (characters are meant)
        value = common.rpartition(" ")[0]
    else:
        both = zip(form["chosen"], form["rejected"], strict=False)
        value = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], both)]
    if not value:
        raise ValueError("the row has no prompt (or an empty one), so there is nothing to complete")
    if not isinstance(value, str) and "prompt_tokens" not in form:
        for number, message in enumerate(value, 1):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ValueError(f"message {number} of the prompt must be an object with a 'role'")
    return value
