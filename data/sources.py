"""Rows of JSONL, JSON and Parquet files by number: opened lazily, read at random, each knowing its file and line."""

import difflib
import glob
import json
import os
import threading
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from configs.errors import UsageError
from data.environments import PREFIX, Environment
from data.formats import check_kind, kind_of

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
Row = dict[str, Any]


class File(Protocol):
    """Rows of one file."""

    path: Path

    def __len__(self) -> int: ...
    def read(self, index: int) -> Any: ...
    def where(self, index: int) -> str: ...


class JsonLines:
    """One JSON object a line. Keeps 24 bytes a row in memory: where it begins and ends, and its line number."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._handle: int | None = None
        self._begins, self._ends, self._lines = self._scan()

    def _scan(self) -> tuple["array[int]", "array[int]", "array[int]"]:
        begins, ends, lines, at = array("q"), array("q"), array("q"), 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    begins.append(at)
                    ends.append(at + len(line))
                    lines.append(number)
                at += len(line)
        return begins, ends, lines

    def __len__(self) -> int:
        return len(self._begins)

    def read(self, index: int) -> Any:
        begin, end = self._begins[index], self._ends[index]
        with self._lock:
            if self._handle is None:
                self._handle = os.open(self.path, os.O_RDONLY)
        raw = os.pread(self._handle, end - begin, begin)
        try:
            return json.loads(raw.decode("utf-8-sig" if begin == 0 else "utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"not valid JSON: {error.msg} (column {error.colno})") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"not valid UTF-8: {error.reason} (byte {error.start} of the line)") from error

    def where(self, index: int) -> str:
        return f"{self.path}:{self._lines[index]}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            os.close(self._handle)  # type: ignore[arg-type]


class JsonArray:
    """A .json file that holds one list of objects; held in memory."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._rows = json.loads(path.read_text(encoding="utf-8-sig"))
        except json.JSONDecodeError as error:
            hint = " (one object a line? then name it .jsonl)" if error.msg == "Extra data" else ""
            raise UsageError(f"{path}:{error.lineno}: not valid JSON: {error.msg}{hint}") from error
        if not isinstance(self._rows, list):
            raise UsageError(f"{path}: a .json data file must hold a list of objects; for one object a line use .jsonl")

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Any:
        return self._rows[index]

    def where(self, index: int) -> str:
        return f"{self.path}: item {index + 1}"


class Parquet:
    """A Parquet file; decoded on first use and held as Arrow columns in memory."""

    def __init__(self, path: Path):
        import pyarrow.parquet

        self.path = path
        self._table: Any = None
        try:
            self._length = pyarrow.parquet.read_metadata(path).num_rows
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} is not a readable Parquet file: {error}") from error

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> Any:
        import pyarrow.parquet

        if self._table is None:
            self._table = pyarrow.parquet.read_table(self.path)
        row = self._table.slice(index, 1).to_pylist()[0]
        # columns are shared by all rows: what a row does not have is null
        return _without_nulls(row)

    def where(self, index: int) -> str:
        return f"{self.path}: row {index + 1}"


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


class Records(Sequence[Row]):
    """The rows of several files, one after the other. Indexing raises ValueError with file and line."""

    def __init__(self, files: Sequence[File]):
        self.files = list(files)
        self._starts = [0, *accumulate(len(file) for file in files)]

    def __len__(self) -> int:
        return self._starts[-1]

    def _find(self, index: int) -> tuple[File, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._starts, index) - 1
        return self.files[number], index - self._starts[number]

    def __getitem__(self, index: Any) -> Any:
        file, local = self._find(index)
        try:
            row = file.read(local)
        except ValueError as error:
            raise ValueError(f"{file.where(local)}: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file.where(local)}: a row must be a JSON object, got {type(row).__name__}")
        return row

    def where(self, index: int) -> str:
        """File and line of a row, for messages."""
        file, local = self._find(index)
        return file.where(local)


def open_source(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], format: str | None = "auto"
) -> Records:
    """Files, folders and globs as one sequence of rows. The first row of each file is checked against `format`; None:
    any keys will do."""
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    files = [file for one in given for file in _files(os.fspath(one))]
    for file in files:
        if len(file) and format is not None:
            _check_first(file, format)
    records = Records(files)
    if not len(records):
        raise UsageError(f"no rows in {', '.join(str(file.path) for file in files)}: the data is empty")
    return records


def _files(given: str) -> Iterator[File]:
    if given.startswith(PREFIX):
        yield Environment(given)
    else:
        yield from map(_open, _expand(given))


def _check_first(file: File, format: str) -> None:
    try:
        row = file.read(0)
    except ValueError:
        return  # one malformed row is the business of data.on_bad_row; a file of another kind is not
    try:
        if isinstance(row, dict):
            check_kind(row, kind_of(row) if format == "auto" else format)
    except ValueError as error:
        raise UsageError(f"{file.where(0)}: {error}") from error


def _expand(given: str) -> Iterator[Path]:
    path = Path(given).expanduser()
    if path.is_dir():
        found = sorted(item for item in path.rglob("*") if item.suffix in SUFFIXES and item.is_file())
        if not found:
            raise UsageError(f"data folder '{given}' holds no {', '.join(SUFFIXES)} file")
        yield from found
    elif path.is_file():
        yield path
    elif glob.has_magic(given):
        matches = sorted(Path(item) for item in glob.glob(str(path), recursive=True) if Path(item).is_file())
        if not matches:
            raise UsageError(f"no file matches '{given}'{_nearest(path)}")
        yield from matches
    else:
        raise UsageError(f"data file '{given}' does not exist{_nearest(path)}")


def _nearest(path: Path) -> str:
    """What the user may have meant: a file of similar name beside it, or the last folder that exists."""
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    names = sorted(item.name for item in folder.iterdir() if item.is_dir() or item.suffix in SUFFIXES)
    close = difflib.get_close_matches(path.name, names, 1, 0.5)
    if close and folder == path.parent:
        return f"; did you mean '{folder / close[0]}'?"
    if folder != path.parent:
        return f": there is no folder '{path.parent}' (the nearest that exists is '{folder.absolute()}')"
    return f"; '{folder.absolute()}' holds {', '.join(names[:5]) if names else 'no data files'}"


def _open(path: Path) -> File:
    kinds: dict[str, Any] = {".jsonl": JsonLines, ".ndjson": JsonLines, ".json": JsonArray, ".parquet": Parquet}
    if path.suffix not in kinds:
        raise UsageError(f"data file '{path}' has the ending '{path.suffix}', allowed: {', '.join(SUFFIXES)}")
    if path.suffix == ".json":
        with path.open("rb") as file:  # many JSONL files are called .json
            first = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        return JsonLines(path) if first == b"{" else JsonArray(path)
    return kinds[path.suffix](path)
