"""Sources of data (files, folders, globs, named corpora) as one sequence of rows, each knowing its file and line."""

import difflib
import glob
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

from configs.errors import UsageError
from data import array_record, corpora, manifest, unpack
from data.environments import PREFIX, Environment
from data.files import Arrow, File, JsonArray, JsonLines, Parquet, Texts
from data.formats import check_kind, kind_of

Row = dict[str, Any]
# one document a file
TEXTS = (
    *(".txt", ".md", ".rst", ".tex", ".org", ".html", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java"),
    *(".kt", ".scala", ".go", ".rs", ".js", ".jsx", ".ts", ".tsx", ".css", ".rb", ".php", ".pl", ".lua", ".swift"),
    *(".jl", ".r", ".hs", ".ml", ".lisp", ".el", ".sh", ".sql", ".toml", ".yaml", ".yml", ".ini", ".cfg"),
)
# what describes other data
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", manifest.MANIFEST)


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
            named = UsageError if isinstance(error, UsageError) else ValueError
            raise named(f"{file.where(local)}: {error}") from error
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
    elif corpora.is_stdlib(given):
        yield corpora.open_stdlib(given)
    else:
        if given.startswith(corpora.HUB):
            given = corpora.fetch_dataset(given, (*FILES, *TEXTS))
        # many small texts are one file of many rows
        for is_text, paths in groupby(_expand(given), lambda path: path.suffix in TEXTS):
            if is_text:
                yield Texts(Path(given), list(paths))
            else:
                yield from map(_open, paths)


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
        yield from _in_folder(path)
    elif path.is_file():
        yield path
    elif glob.has_magic(given):
        matches = sorted(Path(item) for item in glob.glob(str(path), recursive=True) if Path(item).is_file())
        if not matches:
            raise UsageError(f"no file matches '{given}'{_nearest(path)}")
        yield from matches
    else:
        raise UsageError(f"data file '{given}' does not exist{_nearest(path)}")


def _in_folder(folder: Path) -> list[Path]:
    """The data files in a folder and in those below it; where there are none, the texts."""
    if (shards := manifest.shards_of(folder)) is not None:
        return shards
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _saved(folder)
    splits = [item.parent for item in sorted(folder.glob("*/state.json"))]
    if (folder / "dataset_dict.json").is_file() and len(splits) > 1:
        raise UsageError(f"'{folder}' holds several splits, choose one: {', '.join(map(str, splits))}")
    found = [
        item
        for item in sorted(folder.rglob("*"))
        # what datasets keeps of its map() and filter() would be the same rows again
        if item.is_file() and not (item.suffix == ".arrow" and item.name.startswith("cache-"))
        if item.name not in DESCRIPTIONS and not any(part[0] == "." for part in item.relative_to(folder).parts)
    ]
    data = [item for item in found if _kind(item) in FILES]
    texts = [item for item in found if _kind(item) in TEXTS]
    if not data and not texts:
        raise UsageError(f"data folder '{folder}' holds no {', '.join(FILES)} file and no text")
    return data or texts


def _saved(folder: Path) -> list[Path]:
    """The files of a dataset that save_to_disk wrote, in its order."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        paths = [folder / one["filename"] for one in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / 'state.json'} is not what save_to_disk of datasets writes: {error}") from error
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None:
        raise UsageError(f"'{folder}': {missing.name}, which state.json names, does not exist")
    return paths


def _kind(path: Path) -> str:
    """The ending that says what is in a file, without that of its compression."""
    return Path(path.stem).suffix if path.suffix in unpack.PARTS else path.suffix


def _nearest(path: Path) -> str:
    """What the user may have meant: a file of similar name beside it, or the last folder that exists."""
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    names = sorted(item.name for item in folder.iterdir() if item.is_dir() or _kind(item) in (*FILES, *TEXTS))
    close = difflib.get_close_matches(path.name, names, 1, 0.5)
    if close and folder == path.parent:
        return f"; did you mean '{folder / close[0]}'?"
    if folder != path.parent:
        return f": there is no folder '{path.parent}' (the nearest that exists is '{folder.absolute()}')"
    return f"; '{folder.absolute()}' holds {', '.join(names[:5]) if names else 'no data files'}"


def _open(path: Path) -> File:
    kind = _kind(path)
    if kind in TEXTS and path.suffix in unpack.PARTS:
        return unpack.Unpacked(path, lambda unpacked: Texts(unpacked, [unpacked]))
    if kind not in FILES:
        raise UsageError(
            f"data file '{path}' has the ending '{path.suffix}', allowed: {', '.join(FILES)}, also with "
            f"{' or '.join(unpack.PARTS)} behind it, and text: {' '.join(TEXTS)}"
        )
    return FILES[kind](path) if path.suffix == kind else unpack.Unpacked(path, FILES[kind])


def _open_json(path: Path) -> File:
    with path.open("rb") as file:  # many JSONL files are called .json
        first = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    return JsonLines(path) if first == b"{" else JsonArray(path)


FILES: dict[str, Callable[[Path], File]] = {
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".json": _open_json,
    ".parquet": Parquet,
    ".arrow": Arrow,
    **dict.fromkeys(array_record.SUFFIXES, manifest.open_shard),
}
