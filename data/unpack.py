"""Compressed sources (.gz, .zst): unpacked once into the cache, so that their rows can be read at random."""

import gzip
import hashlib
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from configs.cache import cache_folder
from configs.errors import RunError, UsageError
from data.files import File

CHUNK = 1 << 20
WINDOW = 1 << 31  # zstd --long=31


class Unpacked:
    """The rows of a compressed file, under its own name."""

    def __init__(self, path: Path, open_file: Callable[[Path], File]):
        self.path, self.marked = path, (path,)
        try:
            self._rows = open_file(unpack(path))
        except UsageError as error:
            raise UsageError(self._named(str(error))) from error

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Any:
        return self._rows.read(index)

    def where(self, index: int) -> str:
        return self._named(self._rows.where(index))

    def _named(self, text: str) -> str:
        return text.replace(str(_target(self.path)), str(self.path))


def unpack(path: Path) -> Path:
    """The unpacked copy of a .gz or .zst file in the cache, made where it is not there; another size or time of the
    original makes another copy."""
    target = _target(path)
    if target.is_file():
        return target
    print(f"unpacking {path} to {target}, once", file=sys.stderr, flush=True)
    beside = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as source, tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as out:
            beside = Path(out.name)
            for part in PARTS[path.suffix](path, source):
                out.write(part)
            out.flush()
            os.fsync(out.fileno())
        beside.replace(target)
    except OSError as error:
        raise RunError(f"{path} cannot be unpacked to {target.parent}: {error.strerror or error}") from error
    finally:
        if beside is not None:
            beside.unlink(missing_ok=True)
    return target


def _target(path: Path) -> Path:
    stat = path.stat()
    key = f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns}"
    return cache_folder() / "unpacked" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}-{path.stem}"


def _gunzip(path: Path, source: IO[bytes]) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=source) as archive:
            while chunk := archive.read(CHUNK):
                yield chunk
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise _broken(path, error) from error


def _unzstd(path: Path, source: IO[bytes]) -> Iterator[bytes]:
    """Frame by frame: the library's own streams take a cut-off file for a whole one."""
    import zstandard

    frame = None
    try:
        while chunk := source.read(CHUNK):
            while chunk:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj()
                yield frame.decompress(chunk)
                chunk = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise _broken(path, error) from error
    if frame is not None:
        raise _broken(path, "it ends within a frame")


def _broken(path: Path, why: object) -> UsageError:
    return UsageError(f"{path} is not a readable {path.suffix} archive: {why} (cut off, perhaps: fetch it again)")


PARTS: dict[str, Callable[[Path, IO[bytes]], Iterator[bytes]]] = {".gz": _gunzip, ".zst": _unzstd}
