"""Prompts of a reasoning-gym environment as rows: data.train: reasoning_gym:NAME?size=500&seed=0&option=value."""

import difflib
from pathlib import Path
from typing import Any

from configs.errors import UsageError
from configs.source import COMMAND_LINE, parse

PREFIX = "reasoning_gym:"


def open_environment(name: str) -> Any:
    """The dataset that `reasoning_gym:NAME?option=value&...` names; equal names make equal items."""
    try:
        import reasoning_gym  # pyright: ignore[reportMissingImports]
        from reasoning_gym.factory import DATASETS  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError(f"'{name}' needs reasoning-gym ({error}): pip install 'purestep[rl]'") from error
    task, _, query = name.removeprefix(PREFIX).partition("?")
    if task not in DATASETS:
        close = difflib.get_close_matches(task, DATASETS, 3, 0.3) or sorted(DATASETS)[:5]
        raise UsageError(f"'{name}': reasoning-gym has no environment '{task}'; near it: {', '.join(close)}")
    options: dict[str, Any] = {"seed": 0}  # its own default is a new one each time
    for pair in filter(None, query.split("&")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"'{name}': '{pair}' is no option=value")
        options[key] = parse(value, COMMAND_LINE)[0]
    try:
        return reasoning_gym.create_dataset(task, **options)
    except (TypeError, AssertionError, ValueError) as error:  # of its config: a name, a range
        raise UsageError(f"'{name}': {error}") from error


class Environment:
    """The items of an environment as a file of rows: a question to a chat model, and which item it is."""

    marked: tuple[Path, ...] = ()  # nothing on disk

    def __init__(self, name: str):
        self.path, self._name = Path(name), name
        self._items = open_environment(name)

    def __len__(self) -> int:
        return len(self._items)

    def read(self, index: int) -> Any:
        item = self._items[index]
        prompt = [{"role": "user", "content": item["question"]}]
        return {"prompt": prompt, "answer": item["answer"], "environment": self._name, "item": index}

    def where(self, index: int) -> str:
        return f"{self._name}: item {index + 1}"
