"""ArrayRecord files: rows as JSON or as token ids, read at random."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UsageError
from data.files import Lazy, OneFile, parse_json

SUFFIXES = (".array_record", ".arrayrecord")
# what a record of token ids begins with (no JSON text does), then the ids, little-endian
WIDTHS = {b"\x00tok2": np.dtype("<u2"), b"\x00tok4": np.dtype("<u4")}
MAGIC = 5


def encode_tokens(tokens: Sequence[int] | np.ndarray) -> bytes:
    """A record of token ids, two bytes each where they fit."""
    ids = np.asarray(tokens, np.int64)
    if ids.size and not 0 <= ids.min() <= ids.max() < 2**32:
        raise ValueError(f"token ids lie between 0 and 2^32 - 1, got {ids.min()} to {ids.max()}")
    magic, width = list(WIDTHS.items())[int(ids.max(initial=0) >= 2**16)]
    return magic + ids.astype(width).tobytes()


def decode_record(record: bytes) -> Any:
    """The row of a record: {"tokens": ids}, or what its JSON says."""
    width = WIDTHS.get(record[:MAGIC])
    if width is None:
        return parse_json(record, "the record")
    if (len(record) - MAGIC) % width.itemsize:
        raise ValueError(f"a record of {len(record)} bytes is not whole token ids of {width.itemsize} bytes each")
    return {"tokens": np.frombuffer(record, width, offset=MAGIC).astype(np.int32)}


class ArrayRecords(OneFile):
    """The rows of an ArrayRecord file."""

    def __init__(self, path: Path):
        self.path = path
        self._reader = Lazy(partial(_open, path))
        with self._reader as reader:
            self._length = reader.num_records()

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> Any:
        with self._reader as reader:
            try:
                (record,) = reader.read([index])
            except RuntimeError as error:
                raise ValueError(f"the record cannot be read: {error}") from error
        return decode_record(record)


def _open(path: Path) -> Any:
    reader = import_array_record().ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
    if not reader.ok():
        raise UsageError(f"{path} is not a readable ArrayRecord file (cut off, perhaps: copy or build it again)")
    return reader


def import_array_record() -> Any:
    """The library's module of readers and writers."""
    try:
        from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        raise UsageError(
            f"ArrayRecord files need the package array-record ({error}): it has wheels for Linux and for macOS on "
            "Apple silicon; elsewhere, keep the data as JSON lines or Parquet"
        ) from error
    return array_record_module
