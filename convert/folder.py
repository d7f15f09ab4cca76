"""Folders that appear whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.errors import RunError, UsageError

OURS = ("config.json", "adapter_config.json")  # what marks a folder that may be replaced


@contextmanager
def written_beside(destination: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `destination` and give it that name at the end; on any failure it is removed.

    An existing folder is refused, or with `overwrite` replaced if it is a model or adapter folder.
    """
    destination = Path(os.path.abspath(destination))
    check_free(destination, overwrite)
    part = destination.with_name(f".{destination.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        old = destination.with_name(f".{destination.name}.old-{os.getpid()}")
        if destination.exists():
            os.rename(destination, old)
        os.rename(part, destination)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise RunError(f"{destination}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_free(destination: Path, overwrite: bool = False) -> None:
    """Raise UsageError unless a folder may be written there: worth asking before the expensive part."""
    if destination.is_file():
        raise UsageError(f"{destination} is a file; a folder is to be written")
    if not destination.is_dir() or not any(destination.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{destination} exists and is not empty: give another folder or remove it")
    if not any((destination / name).is_file() for name in OURS):
        raise UsageError(f"{destination} exists and is no model folder: it is not overwritten")


@contextmanager
def file_beside(destination: Path, overwrite: bool, mark: bytes) -> Iterator[Path]:
    """As written_beside, for a file; one that is there is only replaced if it begins with `mark`."""
    destination = Path(os.path.abspath(destination))
    check_free_file(destination, overwrite, mark)
    part = destination.with_name(f".{destination.name}.partial-{os.getpid()}")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, destination)
    except OSError as error:
        raise RunError(f"{destination}: cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def check_free_file(destination: Path, overwrite: bool, mark: bytes) -> None:
    """Raise UsageError unless a file may be written there: worth asking before the expensive part."""
    if destination.is_dir():
        raise UsageError(f"{destination} is a folder; a file is to be written")
    if not destination.exists():
        return
    if not overwrite:
        raise UsageError(f"{destination} exists: give another name, remove it, or say --overwrite")
    with open(destination, "rb") as file:
        if file.read(len(mark)) != mark:
            raise UsageError(f"{destination} exists and is no {mark.decode()} file: it is not overwritten")


def check_apart(destination: Path, sources: Iterable[Path]) -> None:
    """Raise UsageError where writing `destination` could destroy what is read."""
    there = destination.expanduser().resolve()
    for source in sources:
        here = source.expanduser().resolve()
        if there == here:
            raise UsageError(f"{destination} is what is read: give another place to write to")
        if here in there.parents and here.is_dir():
            raise UsageError(f"{destination} lies inside {source}, which is read: give a place outside of it")
        if there in here.parents:
            raise UsageError(f"{destination} holds {source}, which is read: give another place to write to")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; UsageError names the file and line of a mistake."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8: {error}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path}: an object is expected, found {type(value).__name__}")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """A JSON file as transformers formats it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
