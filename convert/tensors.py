"""Tensors in files, read when asked: the safetensors format, memory-mapped in and streamed out."""

import errno
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from configs.errors import RunError, UsageError

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Known to the format, but not weights that can be trained: a quantised or packed checkpoint.
OTHER_DTYPES = {"I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4"}
HEADER_LIMIT = 100_000_000  # the format's own limit
CHUNK = 1 << 26  # bytes at a time, for the progress bar
CANNOT_COPY = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP)  # other disks, old kernels


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file: shape and dtype are known, `read` brings the values.

    mapped: `read` returns a view of the file's pages (copy before keeping it) instead of fresh memory.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any] | None  # None: a dtype that is not a weight's
    where: str  # file, for messages
    read: Callable[[], np.ndarray]
    mapped: bool = False
    stored: str = ""  # the file's own name of the dtype, for messages
    at: int | None = None  # where the values begin in the file, if they lie there as `read` returns them

    @property
    def nbytes(self) -> int:
        """Bytes of the values as `read` returns them."""
        return math.prod(self.shape) * (self.dtype.itemsize if self.dtype else 1)


def open_safetensors(path: Path) -> dict[str, Tensor]:
    """{name: Tensor} of a .safetensors file; raises UsageError where the file is truncated or corrupt."""
    header, start = read_header(path)
    pages = np.memmap(path, dtype=np.uint8, mode="r")
    end = start
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            stored, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
            low, high = (int(n) + start for n in entry["data_offsets"])
        except (TypeError, KeyError, ValueError) as error:
            raise UsageError(f"{path}: corrupt safetensors header, entry '{name}': {error!r}") from error
        end = max(end, high)
        dtype = DTYPES.get(stored)
        if dtype is None and stored not in OTHER_DTYPES:
            raise UsageError(f"{path}: tensor '{name}' has the unknown dtype {stored}")
        if low < start or high < low or (dtype is not None and high - low != math.prod(shape) * dtype.itemsize):
            raise UsageError(
                f"{path}: corrupt safetensors header: '{name}' {stored} {list(shape)} in {high - low} bytes"
            )
        tensors[name] = Tensor(shape, dtype, str(path), _reader(pages, low, high, dtype, shape), True, stored, low)
    if end != pages.size:
        what = (
            "truncated (an interrupted download or copy?)"
            if end > pages.size
            else "corrupt (bytes after the last tensor)"
        )
        raise UsageError(f"{path} is {what}: the header describes {end} bytes, the file has {pages.size}")
    return tensors


def _reader(
    pages: np.ndarray, low: int, high: int, dtype: np.dtype[Any] | None, shape: tuple[int, ...]
) -> Callable[[], np.ndarray]:
    return lambda: pages[low:high].view(dtype or np.uint8).reshape(shape if dtype else (-1,))


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a .safetensors file and where its values begin."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 2 <= length <= min(HEADER_LIMIT, size - 8):
                raise UsageError(f"{path} is not a safetensors file, or truncated: {size} bytes, header of {length}")
            header = json.loads(file.read(length))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path}: corrupt safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise UsageError(f"{path}: corrupt safetensors header: not an object")
    return header, 8 + length


@dataclass(frozen=True)
class Outgoing:
    """A tensor to be written: `make` is called when its turn comes and may be forgotten afterwards."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    make: Callable[[], np.ndarray]
    lies: tuple[str, int] | None = None  # a file and where in it these very bytes begin: they are copied

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: Path,
    tensors: Iterable[Outgoing],
    metadata: Mapping[str, str] | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Write a .safetensors file one tensor at a time: at most one of them is in memory. `advance` gets bytes done."""
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}  # transformers asks for "format"
    at = 0
    for t in tensors:
        header[t.name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # data starts on 8 bytes, as the format asks
    try:
        with open(path, "wb", buffering=0) as file:
            write_bytes(file, struct.pack("<Q", len(text)) + text)
            for t in tensors:
                if t.lies is None or not copy_bytes(file, t.lies, t.nbytes, advance):
                    write_bytes(file, values_of(t).data, advance)
            os.fsync(file.fileno())
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from error


def values_of(tensor: Outgoing) -> np.ndarray:
    """The bytes of a tensor as they are to be written."""
    values = np.asarray(tensor.make(), dtype=tensor.dtype, order="C")
    if values.shape != tensor.shape:
        raise ValueError(f"{tensor.name}: {values.shape} was made, {tensor.shape} was announced")
    return values.reshape(-1).view(np.uint8)


def write_bytes(file: IO[bytes], data: Any, advance: Callable[[int], None] = lambda n: None) -> None:
    """Write all of it to an unbuffered file."""
    view = memoryview(data)
    while len(view):
        done = file.write(view[:CHUNK])
        advance(done)
        view = view[done:]


def cast(values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """values.astype(dtype); bfloat16 to float32 by a shift of the bits, which takes a tenth of ml_dtypes' time."""
    if (values.dtype, dtype) != (DTYPES["BF16"], DTYPES["F32"]):
        return values.astype(dtype)
    wide = values.view(np.uint16).astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def copy_bytes(file: IO[bytes], lies: tuple[str, int], nbytes: int, advance: Callable[[int], None]) -> bool:
    """Copy bytes from file to file inside the kernel, which is as fast as `cp`; False where it cannot do that."""
    copy = getattr(os, "copy_file_range", None)  # Linux
    if copy is None:
        return False
    (path, start), done = lies, 0
    with open(path, "rb") as source:
        while done < nbytes:
            try:
                more = copy(source.fileno(), file.fileno(), min(CHUNK, nbytes - done), start + done)
            except OSError as error:
                if done or error.errno not in CANNOT_COPY:
                    raise
                return False
            if not more:
                raise RunError(f"{path} has become shorter while it was read")
            done += more
            advance(more)
    return True
