"""GGUF files, in and out: the header, and tensors under their own names.

The `gguf` package dequantises. Its reader is not used for the header: it makes several numpy arrays per string, which
costs seconds for a vocabulary (transformers' own route also imports torch).
"""

import math
import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from configs.errors import UsageError
from convert.tensors import Tensor, copy_bytes, write_bytes

# What a metadata value's type number means: struct letters; 7 bool, 8 string and 9 array are read apart.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
ALIGNMENT = 32


@dataclass(frozen=True)
class GGUF:
    """A parsed header: metadata values and where each tensor lies."""

    path: Path
    metadata: dict[str, Any]
    entries: dict[str, tuple[tuple[int, ...], int, int]]  # name -> shape (rows first), type, offset in the file
    size: int

    @cached_property
    def pages(self) -> np.ndarray:
        """The file, memory-mapped."""
        return np.memmap(self.path, dtype=np.uint8, mode="r")


def open_gguf(path: Path) -> GGUF:
    """Parse the header; raises UsageError for what is not GGUF 2 or 3, little-endian, and complete."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, data)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except (struct.error, UnicodeDecodeError, OverflowError, MemoryError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} is a truncated or corrupt GGUF file: {error}") from error


def _parse(path: Path, data: mmap.mmap) -> GGUF:
    if data[:4] != b"GGUF":
        raise UsageError(f"{path} is not a GGUF file: it starts with {data[:4]!r}")
    version, tensor_count, key_count = struct.unpack_from("<IQQ", data, 4)
    if version not in (2, 3):
        raise UsageError(f"{path}: GGUF version {version} is not supported (2 and 3, little-endian, are)")
    at = 24

    def scalar(kind: int) -> Any:
        nonlocal at
        if kind == STRING:
            (length,) = struct.unpack_from("<Q", data, at)
            at += 8 + length
            if at > len(data):
                raise ValueError("a string runs past the end")
            return data[at - length : at].decode("utf-8")
        if kind not in SCALARS:
            raise ValueError(f"value type {kind} is unknown")
        (value,) = struct.unpack_from("<" + SCALARS[kind], data, at)
        at += struct.calcsize(SCALARS[kind])
        return value

    def value(kind: int) -> Any:
        nonlocal at
        if kind != ARRAY:
            return scalar(kind)
        inner, count = struct.unpack_from("<IQ", data, at)
        at += 12
        if inner in SCALARS:
            items = list(struct.unpack_from(f"<{count}{SCALARS[inner]}", data, at)) if count <= len(data) else None
            if items is None:
                raise ValueError(f"an array of {count} items")
            at += count * struct.calcsize(SCALARS[inner])
            return items
        return [value(inner) for _ in range(count)]

    metadata = {}
    for _ in range(key_count):
        key = scalar(STRING)
        metadata[key] = value(scalar(4))
    found = []
    for _ in range(tensor_count):
        name = scalar(STRING)
        shape = tuple(scalar(10) for _ in range(scalar(4)))
        found.append((name, shape[::-1], scalar(4), scalar(10)))  # GGUF writes the fastest axis first
    step = metadata.get("general.alignment", 32)
    start = -(-at // step) * step
    return GGUF(path, metadata, {n: (shape, kind, start + offset) for n, shape, kind, offset in found}, len(data))


def raw_tensor(file: GGUF, name: str) -> Tensor:
    """A tensor under its own name, dequantised to float32 (float types stay as they are)."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    shape, number, low = file.entries[name]
    try:
        kind = GGMLQuantizationType(number)
    except ValueError as error:
        raise UsageError(
            f"{file.path}: tensor {name} has the unknown type {number}: update the gguf package"
        ) from error
    block, block_bytes = GGML_QUANT_SIZES[kind]
    nbytes = math.prod(shape) // block * block_bytes
    if not shape or shape[-1] % block or low + nbytes > file.size:
        raise UsageError(
            f"{file.path} is truncated or corrupt: {name} {list(shape)} {kind.name} ends at byte {low + nbytes}, "
            f"the file has {file.size}"
        )
    plain = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}.get(kind.name)
    data = file.pages[low : low + nbytes]
    if plain is not None:
        read_plain = lambda: data.view(plain).reshape(shape)  # noqa: E731
        return Tensor(shape, np.dtype(plain), str(file.path), read_plain, True, kind.name, low)

    def read() -> np.ndarray:
        try:
            return dequantize(data.reshape(*shape[:-1], -1), kind).reshape(shape)
        except NotImplementedError as error:
            raise UsageError(
                f"{file.path}: {name} is quantised as {kind.name}, which the gguf package cannot read"
            ) from error

    return Tensor(shape, np.dtype(np.float32), str(file.path), read, False, kind.name)


@dataclass(frozen=True)
class Stored:
    """A tensor to be written; `make` gives its bytes when its turn comes."""

    name: str
    shape: tuple[int, ...]  # rows first
    kind: str  # F32, F16, BF16, Q8_0
    nbytes: int
    make: Callable[[], np.ndarray]
    lies: tuple[str, int] | None = None  # a file and where in it these very bytes begin


def write_gguf(
    path: Path,
    metadata: dict[str, Any],
    tensors: list[Stored],
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Write a GGUF 3 file, one tensor in memory at a time."""
    from gguf.constants import GGMLQuantizationType

    head, offset = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))], 0
    for key, value in metadata.items():
        kind, data = _encode(value)
        head += [_string(key), struct.pack("<I", kind), data]
    for t in tensors:
        dims, number = t.shape[::-1], GGMLQuantizationType[t.kind].value
        head += [_string(t.name), struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, number, offset)]
        offset += t.nbytes + -t.nbytes % ALIGNMENT
    text = b"".join(head)
    with open(path, "wb", buffering=0) as file:
        write_bytes(file, text + bytes(-len(text) % ALIGNMENT))
        for t in tensors:
            if t.lies is None or not copy_bytes(file, t.lies, t.nbytes, advance):
                data = t.make()
                if data.nbytes != t.nbytes:
                    raise ValueError(f"{t.name}: {data.nbytes} bytes were made, {t.nbytes} were announced")
                write_bytes(file, data.reshape(-1).view(np.uint8).data, advance)
            write_bytes(file, bytes(-t.nbytes % ALIGNMENT))
        os.fsync(file.fileno())


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _encode(value: Any) -> tuple[int, bytes]:
    """(type number, bytes) of a metadata value: whole numbers have 32 bits, without a sign outside of arrays."""
    if isinstance(value, list):
        if not value or isinstance(value[0], str):
            return ARRAY, struct.pack("<IQ", STRING, len(value)) + b"".join(map(_string, value))
        kind = 6 if isinstance(value[0], float) else 5
        return ARRAY, struct.pack(f"<IQ{len(value)}{SCALARS[kind]}", kind, len(value), *value)
    if isinstance(value, str):
        return STRING, _string(value)
    kind = 7 if isinstance(value, bool) else 6 if isinstance(value, float) else 4
    return kind, struct.pack("<" + SCALARS[kind], value)
