"""JSON lines in and out, in the shapes that scripts rely on (DESIGN.md, 'The command line')."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.errors import RunError, UsageError
from data.tokenizer import Tokenizer
from decode.prompts import Prompt, check_row, encode_prompt

GENERATE_KEYS = ("prompt", "messages", "tokens")
SCORE_KEYS = ("text", "tokens", "messages", "completions")  # the last two for reward models
WHOLE = ("completions",)  # keys that mean nothing without the rest of the row


@contextmanager
def at(where: str) -> Iterator[None]:
    """Any refusal inside names the place."""
    try:
        yield
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from error


def read_rows(path: str, keys: tuple[str, ...]) -> list[tuple[str, str, Any]]:
    """(where, key, value) of each line: an object with exactly one of `keys` (the value of a WHOLE key is the row).

    '-' is standard input.
    """
    rows = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        where = f"{'standard input' if path == '-' else path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{where}: not valid JSON: {error.msg} (column {error.colno})") from error
        given = [key for key in keys if isinstance(row, dict) and key in row]
        if len(given) != 1:
            what = f"has the keys {', '.join(row)}" if isinstance(row, dict) else "is not an object"
            raise UsageError(f"{where}: the row {what}; it needs exactly one of {', '.join(keys)}")
        rows.append((where, given[0], row if given[0] in WHOLE else row[given[0]]))
    if not rows:
        raise UsageError(f"{path}: no rows")
    return rows


def _lines(path: str) -> Iterable[str]:
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return text.split("\n")  # not splitlines: U+2028 may stand inside a JSON string


def token_rows(
    rows: list[tuple[str, str, Any]], tokenizer: Tokenizer, vocab_size: int, context: int, max_new_tokens: int = 0
) -> list[list[int]]:
    """The tokens of every row, each checked: what is wrong names its file and line."""
    encoded = []
    for where, key, value in rows:
        with at(where):
            tokens = encode_prompt(tokenizer, checked(key, value))
            check_row(tokens, vocab_size, context, f"'{key}'", max_new_tokens)
        encoded.append(tokens)
    return encoded


def checked(key: str, value: Any) -> Prompt:
    """The value, of the type that its key promises."""
    if key in ("prompt", "text"):
        if not isinstance(value, str):
            raise UsageError(f"'{key}' must be text, not {type(value).__name__}")
        return value
    if key == "tokens":
        if not isinstance(value, list) or not all(type(token) is int for token in value):
            raise UsageError("'tokens' must be a list of token ids")
        return value
    fine = isinstance(value, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)
    if not fine or not value:
        raise UsageError("'messages' must be a list of objects with 'role' and 'content', at least one")
    return value


def dump_row(row: Any) -> str:
    """One line of JSON."""
    return json.dumps(row, ensure_ascii=False)


def write_rows(path: str, rows: Iterable[Any]) -> None:
    """Write JSON lines beside, then rename; '-' is standard output."""
    if path == "-":
        for row in rows:
            print(dump_row(row))
        return
    beside = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.writelines(dump_row(row) + "\n" for row in rows)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written: {error.strerror}") from error


def check_writable(path: str | None) -> None:
    """Refuse an output that could not be written, before the work."""
    if path is None or path == "-":
        return
    folder = Path(path).parent
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"{path}: cannot be written (no such folder, no permission, or it is a folder)")


def as_row(result: Any, fields: tuple[str, ...]) -> dict[str, Any]:
    """Some fields of a result, in this order."""
    return {name: getattr(result, name) for name in fields}


@contextmanager
def rows_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over rows on standard error; plain silence where that is no terminal."""
    if not sys.stderr.isatty() or total < 2:
        yield lambda rows: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda rows: bar.update(task, advance=rows)
