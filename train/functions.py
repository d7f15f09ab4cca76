"""Reward functions by name: how they are found, which options and columns they take (their signature says so)."""

import difflib
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError

from configs.errors import UsageError
from configs.source import show
from train.verifiers import answers, programs, shapes

Function = Callable[..., Sequence[Any]]

BUILT_IN: dict[str, Function] = {
    "brevity": shapes.brevity,
    "code": programs.code,
    "cosine_length": shapes.cosine_length,
    "exact": answers.exact,
    "format": shapes.format,
    "json": answers.json,
    "language": shapes.language,
    "length": shapes.length,
    "math": answers.math,
    "numeric": answers.numeric,
    "reasoning_gym": programs.reasoning_gym,
    "regex": answers.regex,
    "repetition": shapes.repetition,
    "soft_overlong": shapes.soft_overlong,
}
# These may take long over one row, or for ever: they are called in other processes, a row at a time, and a row that
# takes longer than their option `timeout`, in seconds, scores 0.
ROW_BY_ROW = ("code", "json", "math", "reasoning_gym", "regex")
# What every reward may ask for beside the columns of the rows.
GIVEN = ("prompts", "completions", "completion_ids", "finish_reason", "rewards")


@dataclass(frozen=True)
class Takes:
    """What a function is to be called with: columns by name (None: whatever there is), and those it cannot miss."""

    columns: frozenset[str] | None
    options: frozenset[str]  # never filled from a column
    needs: tuple[tuple[str, ...], ...]  # of each group a row must have one

    def choose(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the columns that the function takes."""
        return {
            name: value
            for name, value in columns.items()
            if name not in self.options and (self.columns is None or name in self.columns)
        }


def find(name: str) -> Function:
    """A built-in function, or module:function, or file.py:function."""
    module, colon, function = name.rpartition(":")
    return _import(name, module, function) if colon else BUILT_IN[name]


def _import(name: str, module: str, function: str) -> Function:
    """A function of the user's own: of a file, whose folder can be imported from, or of an installed module."""
    path = Path(module)
    try:
        if path.suffix == ".py":
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None
            assert spec.loader is not None
            if (folder := str(path.absolute().parent)) not in sys.path:
                sys.path.append(folder)
            loaded = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded)
        else:
            loaded = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        hint = "" if path.suffix == ".py" else "; a file beside the recipe is found as file.py:function"
        raise UsageError(
            f"sample.reward '{name}': {module} cannot be imported: {type(error).__name__}: {error}{hint}"
        ) from error
    found: Function | None = getattr(loaded, function, None)
    if not callable(found):
        functions = [key for key, value in vars(loaded).items() if callable(value) and not key.startswith("_")]
        raise UsageError(f"sample.reward '{name}': {module} has no function '{function}'; it has {functions}")
    return found


def bind(key: str, function: Function, options: Mapping[str, Any]) -> tuple[Function, Takes]:
    """The function with its options, checked by its signature, and what it then takes.

    Options are its parameters with a default, and keyword-only ones; what has no default and is not given is a column
    that rows must have. A keyword-only parameter with a default is never filled from a column. An option `column` names
    columns of which rows must have one. `key` is the name in sample.reward_options.
    """
    where = f"sample.reward_options.{key}"
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of C, without a signature
        parameters = {}
    named = {name: one for name, one in parameters.items() if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    allowed = [
        name
        for name, one in named.items()
        if name not in GIVEN and (one.kind == one.KEYWORD_ONLY or one.default is not one.empty)
    ]
    for name in options:
        if name not in allowed:
            said = f"{where} has '{name}', its options: {', '.join(allowed) or 'none'}"
            raise UsageError(said + nearest(allowed, name))
    _check_types(where, function, options)
    needs = [(name,) for name, one in named.items() if one.default is one.empty and name not in (*GIVEN, *options)]
    if "column" in named:
        column = options.get("column", named["column"].default)
        needs.append((column,) if isinstance(column, str) else tuple(column))
    fixed = {name for name, one in named.items() if one.kind == one.KEYWORD_ONLY and one.default is not one.empty}
    any_name = not parameters or any(one.kind == one.VAR_KEYWORD for one in parameters.values())
    takes = Takes(None if any_name else frozenset(named), frozenset({*fixed, *options} - {*GIVEN}), tuple(needs))
    return partial(function, **options), takes


def nearest(names: Iterable[str], name: str) -> str:
    """A hint at the name that was probably meant."""
    close = difflib.get_close_matches(name, list(names), 1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _check_types(where: str, function: Function, options: Mapping[str, Any]) -> None:
    try:
        hints = get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError):  # names that only a type checker sees
        hints = {}
    for name, value in options.items():
        try:
            TypeAdapter(hints.get(name, Any), config=ConfigDict(strict=True, allow_inf_nan=False)).validate_python(
                value
            )
        except PydanticSchemaGenerationError:
            pass  # a type of the user's own
        except ValidationError as error:
            said = error.errors()[0]
            raise UsageError(f"{where}.{name} is {show(value)}: {said['msg']}") from None


@cache
def load(name: str, key: str, options: str) -> tuple[Function, Takes]:
    """The function of this name with its options (JSON), and what it takes."""
    return bind(key, find(name), json.loads(options))


def describe(name: str, key: str, options: str) -> tuple[Any, ...]:
    """What the function of this name takes: columns, options, needs. For a worker, as is `call`: all of it is JSON."""
    takes = load(name, key, options)[1]
    return None if takes.columns is None else sorted(takes.columns), sorted(takes.options), takes.needs


def call(name: str, key: str, options: str, arguments: Mapping[str, Any]) -> list[Any]:
    """The scores that the function of this name gives."""
    return list(load(name, key, options)[0](**arguments))
