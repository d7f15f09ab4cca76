"""Files of rows by number: JSON lines, JSON, Parquet, Arrow, plain text. Each opens lazily and knows its places."""

import json
import os
import threading
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from configs.errors import UsageError

GROUPS_BYTES = 1 << 30  # of decoded Parquet row groups in memory, all files together
Held = TypeVar("Held")


class File(Protocol):
    """Rows of one file, or of several that are read as one."""

    path: Path

    @property
    def marked(self) -> Sequence[Path]:
        """The files on disk by which a change of the data is noticed."""
        ...

    def __len__(self) -> int: ...
    def read(self, index: int) -> Any: ...
    def where(self, index: int) -> str: ...


class OneFile:
    """What the files that lie in one file share."""

    path: Path

    @property
    def marked(self) -> tuple[Path, ...]:
        return (self.path,)

    def where(self, index: int) -> str:
        return f"{self.path}: row {index + 1}"


class Lazy(Generic[Held]):
    """A handle opened when first used, held by one thread at a time; a copy in another process opens its own."""

    def __init__(self, opened: Callable[[], Held]):
        self._open, self._lock, self._handle = opened, threading.Lock(), None

    def __enter__(self) -> Held:
        self._lock.acquire()
        try:
            if self._handle is None:
                self._handle = self._open()
        except BaseException:
            self._lock.release()
            raise
        return self._handle

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> Any:
        return Lazy, (self._open,)


class JsonLines(OneFile):
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
        return parse_json(os.pread(self._handle, end - begin, begin), "the line")

    def where(self, index: int) -> str:
        return f"{self.path}:{self._lines[index]}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            os.close(self._handle)  # type: ignore[arg-type]


def parse_json(raw: bytes, what: str) -> Any:
    """The value of JSON text in UTF-8; ValueError says what is wrong and at which place of `what`."""
    try:
        return json.loads(raw.decode("utf-8").removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} (column {error.colno})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid UTF-8: {error.reason} (byte {error.start} of {what})") from error


class JsonArray(OneFile):
    """A .json file that holds one list of objects; held in memory."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._rows = json.loads(path.read_text(encoding="utf-8-sig"))
        except json.JSONDecodeError as error:
            hint = " (one object a line? then name it .jsonl)" if error.msg == "Extra data" else ""
            raise UsageError(f"{path}:{error.lineno}: not valid JSON: {error.msg}{hint}") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: not valid UTF-8: {error.reason} (byte {error.start})") from error
        if not isinstance(self._rows, list):
            raise UsageError(f"{path}: a .json data file must hold a list of objects; for one object a line use .jsonl")

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Any:
        return self._rows[index]

    def where(self, index: int) -> str:
        return f"{self.path}: item {index + 1}"


class Groups:
    """Decoded row groups of all Parquet files: those used last, up to GROUPS_BYTES, and always the newest."""

    def __init__(self) -> None:
        self._tables: OrderedDict[tuple[str, int, int], Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, int, int], read: Callable[[], Any]) -> Any:
        """The group of that path, time and number, read where it is not held."""
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
        table = read()
        with self._lock:
            self._tables[key] = table
            while len(self._tables) > 1 and sum(one.nbytes for one in self._tables.values()) > GROUPS_BYTES:
                self._tables.popitem(last=False)
        return table


GROUPS = Groups()


class Parquet(OneFile):
    """A Parquet file, a row group at a time."""

    def __init__(self, path: Path):
        self.path = path
        self._file = Lazy(partial(_open_parquet, path))
        with self._file as file:
            groups = range(file.num_row_groups)
            self._starts = [0, *accumulate(file.metadata.row_group(i).num_rows for i in groups)]
        self._time = path.stat().st_mtime_ns

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, index: int) -> Any:
        group = bisect_right(self._starts, index) - 1
        table = GROUPS.get((str(self.path.absolute()), self._time, group), partial(self._read, group))
        # columns are shared by all rows: what a row does not have is null
        return _without_nulls(table.slice(index - self._starts[group], 1).to_pylist()[0])

    def _read(self, group: int) -> Any:
        with self._file as file:
            try:
                return file.read_row_group(group)
            except (OSError, ValueError) as error:  # not one bad row: skipping it would lose them all unseen
                raise UsageError(f"{self.path} is not a readable Parquet file: row group {group}: {error}") from error


def _open_parquet(path: Path) -> Any:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a readable Parquet file: {error}") from error


class Arrow(OneFile):
    """An .arrow file, as Hugging Face's datasets library saves and caches them: mapped, not read."""

    def __init__(self, path: Path):
        self.path = path
        self._table = Lazy(partial(_map_arrow, path))
        with self._table as table:
            self._length = table.num_rows

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> Any:
        with self._table as table:
            return _without_nulls(table.slice(index, 1).to_pylist()[0])


def _map_arrow(path: Path) -> Any:
    import pyarrow

    try:
        mapped = pyarrow.memory_map(str(path))
        with path.open("rb") as file:
            is_file = file.read(6) == b"ARROW1"  # otherwise a stream
        return (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(mapped).read_all()
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a readable Arrow file: {error}") from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


class Texts:
    """Plain text files, each one document."""

    def __init__(self, path: Path, paths: Sequence[Path]):
        self.path, self.marked = path, tuple(paths)

    def __len__(self) -> int:
        return len(self.marked)

    def read(self, index: int) -> Any:
        raw = self.marked[index].read_bytes()
        try:
            return {"text": raw.decode("utf-8").removeprefix("\ufeff")}
        except UnicodeDecodeError as error:
            raise ValueError(f"not text in UTF-8: {error.reason} (byte {error.start})") from error

    def where(self, index: int) -> str:
        return str(self.marked[index])
