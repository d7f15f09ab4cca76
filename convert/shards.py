"""Checkpoint folders, readable by anything that reads safetensors and JSON; written by train/checkpoint.py.

process_<k>.safetensors   what process k saved: an array under its path, a piece of one under path@<where it begins>
index.json                {path: {"dtype", "shape"}} of the whole arrays
meta.json                 data position, config, versions
manifest.json             {"files": {name: {"size", "crc32"}}, ...}, written last
"""

import itertools
import json
import math
import os
import struct
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import ml_dtypes
import numpy as np

from configs.errors import UsageError
from convert.tensors import DTYPES, read_header, write_bytes

INDEX, META, MANIFEST, PART = "index.json", "meta.json", "manifest.json", "process_{}.safetensors"
INTEGERS = {"BOOL": np.bool_, "I8": np.int8, "U8": np.uint8, "I16": np.int16, "U16": np.uint16, "I32": np.int32,
            "U32": np.uint32, "I64": np.int64, "U64": np.uint64}  # fmt: skip
EIGHT_BITS = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
NAMES = {np.dtype(dtype): name for name, dtype in {**DTYPES, **INTEGERS, **EIGHT_BITS}.items()}
PIECE = 1 << 24  # bytes that are hashed, and flushed, at a time
BYTES = "U8"  # other dtypes (int4, ..): as bytes, with a last dimension of the item's size


@dataclass(frozen=True)
class Shard:
    """A piece of an array: where it begins along each dimension, and its values."""

    path: str
    start: tuple[int, ...]
    values: np.ndarray
    whole: bool = True

    @property
    def name(self) -> str:
        """Its name in the file."""
        return self.path if self.whole else f"{self.path}@{','.join(map(str, self.start))}"


def write_part(path: Path, shards: Sequence[Shard]) -> dict[str, Any]:
    """Write one process's file and flush it to the disk; its size and hash, which a thread beside it makes."""
    header: dict[str, Any] = {"__metadata__": {"format": "purestep"}}
    at = 0
    for shard in shards:
        stored, shape = NAMES.get(shard.values.dtype), list(shard.values.shape)
        if stored is None:
            stored, shape = BYTES, [*shape, shard.values.dtype.itemsize]
        header[shard.name] = {"dtype": stored, "shape": shape, "data_offsets": [at, at + shard.values.nbytes]}
        at += shard.values.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    code = zlib.crc32(head)

    def digest() -> None:
        nonlocal code
        for piece in _pieces(shards):
            code = zlib.crc32(piece, code)

    written: SimpleQueue[bool] = SimpleQueue()  # whether more is to come

    def flush() -> None:  # while the next piece is copied to the kernel
        while written.get():
            getattr(os, "fdatasync", os.fsync)(file.fileno())

    with open(path, "wb", buffering=0) as file:
        with suppress(OSError, AttributeError):  # a file system or a system that cannot: only slower
            os.posix_fallocate(file.fileno(), 0, len(head) + at)
        beside = [threading.Thread(target=work, daemon=True) for work in (digest, flush)]
        for thread in beside:
            thread.start()
        try:
            write_bytes(file, head)
            for piece in _pieces(shards):
                write_bytes(file, piece)
                written.put(True)
        finally:
            written.put(False)
            for thread in beside:
                thread.join()
        os.fsync(file.fileno())
    return {"size": len(head) + at, "crc32": f"{code:08x}"}


def _pieces(shards: Iterable[Shard]) -> Iterator[memoryview]:
    for shard in shards:
        flat = np.ascontiguousarray(shard.values).reshape(-1).view(np.uint8)
        yield from (flat[i : i + PIECE].data for i in range(0, len(flat), PIECE))


def write_text(path: Path, value: Any) -> dict[str, Any]:
    """Write JSON to the disk; its size and hash."""
    data = (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"size": len(data), "crc32": f"{zlib.crc32(data):08x}"}


def index_of(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """index.json of arrays by path."""
    return {path: {"dtype": np.dtype(x.dtype).name, "shape": list(x.shape)} for path, x in arrays.items()}


def write_checkpoint(folder: Path, arrays: Mapping[str, Any], meta: Mapping[str, Any] | None = None) -> None:
    """A whole checkpoint by one process, at once; the folder gets its name when it is complete."""
    part = folder.with_name(f"{folder.name}.partial")
    part.mkdir(parents=True)
    shards = [Shard(path, (0,) * np.ndim(x), np.asarray(x)) for path, x in arrays.items()]
    files = {
        PART.format(0): write_part(part / PART.format(0), shards),
        INDEX: write_text(part / INDEX, index_of(arrays)),
        META: write_text(part / META, meta or {}),
    }
    write_text(part / MANIFEST, {"files": files})
    part.rename(folder)


def complete_steps(root: Path) -> list[int]:
    """The steps of the checkpoints in a folder that were written to their end, oldest first."""
    if not root.is_dir():
        return []
    return sorted(int(path.name) for path in root.iterdir() if is_complete(path))


def is_complete(folder: Path) -> bool:
    """Whether a folder is a checkpoint that was written to its end: its name is the step, its manifest is there."""
    return folder.name.isdigit() and (folder / MANIFEST).is_file()


def read_json(path: Path) -> Any:
    """A JSON file of a checkpoint; raises UsageError where it is none."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error


def damage(folder: Path, share: tuple[int, int] = (0, 1), hashes: bool = True) -> str | None:
    """What differs from the manifest, or None. share (k, n): only every n-th file from the k-th on."""
    try:
        files = read_json(folder / MANIFEST)["files"]
        expected = {name: (int(told["size"]), str(told["crc32"])) for name, told in files.items()}
    except (UsageError, KeyError, TypeError, ValueError) as error:
        return f"{folder / MANIFEST}: {error}"
    for name in itertools.islice(expected, share[0], None, share[1]):
        size, code = expected[name]
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if (found := path.stat().st_size) != size:
            return f"{path} has {found} bytes, the manifest says {size}"
        if hashes and (digest := _digest(path)) != code:
            return f"{path} has changed: its crc32 is {digest}, the manifest says {code}"
    return None


def _digest(path: Path) -> str:
    code, block = 0, bytearray(1 << 22)
    with open(path, "rb", buffering=0) as file:
        while n := file.readinto(block):
            code = zlib.crc32(memoryview(block)[:n], code)
    return f"{code:08x}"


@dataclass(frozen=True)
class Piece:
    """Where a piece of an array lies."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: Path
    at: int


@dataclass(frozen=True)
class Stored:
    """An array of a checkpoint, in pieces."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    pieces: tuple[Piece, ...]

    def holds(self, index: tuple[slice, ...]) -> bool:
        """Whether what lies under an index of slices is in these files."""
        low, high = self._box(index)
        found = sum(_volume(begin, end) for _, begin, end in self._overlaps(low, high))
        return found == _volume(low, high)

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The values, or those under an index of slices, in fresh memory; raises UsageError where some are absent."""
        low, high = self._box((slice(None),) * len(self.shape) if index is None else index)
        out = np.empty([b - a for a, b in zip(low, high, strict=True)], self.dtype)
        found = 0
        for piece, begin, end in self._overlaps(low, high):
            nbytes = math.prod(piece.shape) * self.dtype.itemsize
            values = np.memmap(piece.file, np.uint8, "r", piece.at, nbytes).view(self.dtype).reshape(piece.shape)
            out[_slices(begin, end, low)] = values[_slices(begin, end, piece.start)]
            found += _volume(begin, end)
        if found < out.size:
            raise UsageError(f"{self.path}: {out.size - found} of {out.size} values asked for are in none of the files")
        return out

    def _box(self, index: tuple[slice, ...]) -> tuple[list[int], list[int]]:
        ends = [n if s.stop is None else s.stop for s, n in zip(index, self.shape, strict=True)]
        return [s.start or 0 for s in index], ends

    def _overlaps(self, low: Sequence[int], high: Sequence[int]) -> Iterator[tuple[Piece, list[int], list[int]]]:
        for piece in self.pieces:
            begin = [max(a, s) for a, s in zip(low, piece.start, strict=True)]
            end = [min(b, s + n) for b, s, n in zip(high, piece.start, piece.shape, strict=True)]
            if all(b < e for b, e in zip(begin, end, strict=True)):
                yield piece, begin, end


def _volume(begin: Sequence[int], end: Sequence[int]) -> int:
    return math.prod(b - a for a, b in zip(begin, end, strict=True))


def _slices(begin: Sequence[int], end: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(b - o, e - o) for b, e, o in zip(begin, end, origin, strict=True))


def open_checkpoint(folder: Path) -> dict[str, Stored]:
    """{path: Stored} of a checkpoint, each read from disk when asked."""
    index = read_json(folder / INDEX)
    pieces: dict[str, dict[tuple[int, ...], Piece]] = {path: {} for path in index}
    for file in sorted(folder.glob(PART.format("*"))):
        header, begin = read_header(file)
        try:
            for name in header.keys() - {"__metadata__"}:
                path, _, start = name.partition("@")
                rank, shape, at = len(index[path]["shape"]), header[name]["shape"], header[name]["data_offsets"][0]
                where = tuple(map(int, start.split(","))) if start else (0,) * rank
                # the same piece may be in several files (of a tier of one process each): one is enough
                pieces[path].setdefault(where, Piece(where, tuple(shape[:rank]), file, begin + at))
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{file} is corrupt, or does not belong to {INDEX}: {error!r}") from error
    return {
        path: Stored(path, tuple(told["shape"]), dtype_of(told["dtype"]), tuple(pieces[path].values()))
        for path, told in index.items()
    }


def dtype_of(name: str) -> np.dtype[Any]:
    """The dtype of a name, numpy's or ml_dtypes' (which numpy knows once ml_dtypes is imported)."""
    return np.dtype(getattr(ml_dtypes, name, name))
