"""GGUF files: the header, and tensors under their own names.

The `gguf` package dequantises. Its reader is not used for the header: it makes several numpy arrays per string, which
costs seconds for a vocabulary (transformers' own route also imports torch).
"""

import math
import mmap
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from configs.errors import UsageError
from convert.tensors import Tensor

# What a metadata value's type number means: struct letters; 7 bool, 8 string and 9 array are read apart.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


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
