"""A MODEL to a GGUF file that llama.cpp runs: weights, metadata and tokenizer, by the tables that GGUF is read by."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from configs.errors import RunError, UsageError
from convert.conversion import CHUNK, Written, check_dtype, checked, places, tensors_of
from convert.folder import check_apart, check_free_file, file_beside
from convert.gguf import GGUF, Stored, open_gguf, write_gguf
from convert.gguf_families import (
    ROPE_FACTORS,
    Family,
    config_of,
    family_of,
    gguf_name,
    llama3_divisors,
    metadata_of,
    turn,
)
from convert.gguf_vocabulary import vocabulary_of
from convert.hf import check_space
from convert.progress import bytes_bar
from convert.source import Source
from convert.tensors import Outgoing
from model.architecture import Architecture
from model.families import architecture_from_hf

# Our names of the types; GGUF's own, and the number of general.file_type that says what most tensors are.
DTYPES = {"float32": ("F32", 0), "float16": ("F16", 1), "bfloat16": ("BF16", 32), "q8_0": ("Q8_0", 7)}
NUMPY = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
BLOCK, BLOCK_BYTES = 32, 34  # of Q8_0
MARK = b"GGUF"


def convert_to_gguf(
    source: Source, destination: Path, *, dtype: str | None = None, verify: bool = False, overwrite: bool = False
) -> Written:
    """Write the model as one GGUF file, adapters merged; all or nothing.

    Norms and biases are float32, as llama.cpp wants them; dtype is of the matrices (default: as stored, float64 as
    float32). UsageError for what GGUF cannot say of this model: the header is read back, and must mean the same.
    """
    check_dtype(dtype, tuple(DTYPES))
    check_apart(destination, places(source))
    check_free_file(destination, overwrite, MARK)
    if source.arch.num_labels:
        raise UsageError(f"MODEL '{source.name}' is a reward model: a score head has no place in GGUF")
    name, family = family_of(source.config.get("model_type"))
    stored = [_stored(tensor, source.arch, family, dtype) for tensor in tensors_of(source, None)]
    if source.arch.rope.kind == "llama3":
        stored.append(_rope_factors(source.arch))
    metadata = {
        "general.architecture": name,
        "general.type": "model",
        "general.name": Path(source.name).name,
        "general.file_type": _file_type(stored),
        "general.quantization_version": 2,
        **metadata_of(source.arch, name, family),
        **vocabulary_of(source),
    }
    _check_meaning(destination, metadata, stored, source.arch)
    total = sum(t.nbytes for t in stored)
    with file_beside(destination, overwrite, MARK) as part:
        check_space(part.parent, total)
        with bytes_bar(f"writing {destination.name}", total) as advance:
            write_gguf(part, metadata, stored, advance)
        if verify:
            _verify(part, metadata, stored)
    kinds = tuple(dict.fromkeys(t.kind for t in stored))
    return Written(destination, len(stored), total, kinds, 1, verify)


def _stored(tensor: Outgoing, arch: Architecture, family: Family, dtype: str | None) -> Stored:
    """A tensor as llama.cpp has it: its name, its order of q's and k's rows, its type."""
    name = gguf_name(tensor.name, family)
    part = name.split(".")[-2]
    kind = _kind(tensor, dtype)
    heads = {"attn_q": arch.num_heads, "attn_k": arch.num_kv_heads}.get(part) if family.turned else None
    offset = np.float32(family.norm_offset) if part.endswith("norm") else np.float32(0)
    cast = checked(tensor, NUMPY.get(kind, NUMPY["F32"]))  # norms and what is quantised, from float32

    def make() -> np.ndarray:
        values = cast.make() + offset if offset else cast.make()
        values = values if heads is None else turn(values, heads)
        return np.ascontiguousarray(values) if kind in NUMPY else _quantise(values)

    same = NUMPY.get(kind) == tensor.dtype and heads is None and not offset
    nbytes = math.prod(tensor.shape) * NUMPY[kind].itemsize if kind in NUMPY else _quantised_bytes(tensor.shape)
    return Stored(name, tensor.shape, kind, nbytes, make, tensor.lies if same else None)


def _kind(tensor: Outgoing, dtype: str | None) -> str:
    """GGUF's type: vectors are float32; rows that Q8_0's blocks do not divide are float16, as llama.cpp has it."""
    if len(tensor.shape) < 2:
        return "F32"
    if dtype == "q8_0":
        return "Q8_0" if tensor.shape[-1] % BLOCK == 0 else "F16"
    return DTYPES[dtype or ("float32" if tensor.dtype == np.float64 else tensor.dtype.name)][0]


def _file_type(stored: list[Stored]) -> int:
    """The type of most bytes of the matrices."""
    sizes = {kind: sum(t.nbytes for t in stored if t.kind == kind and len(t.shape) > 1) for kind, _ in DTYPES.values()}
    most = max(sizes, key=lambda kind: sizes[kind])
    return dict(DTYPES.values())[most]


def _quantised_bytes(shape: tuple[int, ...]) -> int:
    return math.prod(shape) // BLOCK * BLOCK_BYTES


def _quantise(values: np.ndarray) -> np.ndarray:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    return quantize(values, GGMLQuantizationType.Q8_0)


def _rope_factors(arch: Architecture) -> Stored:
    rope = arch.rope
    scaling = {
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_position,
    }
    values = llama3_divisors(scaling, arch.head_dim, rope.theta).astype(np.float32)
    return Stored(ROPE_FACTORS, values.shape, "F32", values.nbytes, lambda: values)


def _check_meaning(path: Path, metadata: dict[str, Any], stored: list[Stored], arch: Architecture) -> None:
    """Raise UsageError where such a file would be read as another model."""
    entries = {t.name: (t.shape, 0, 0) for t in stored if t.name != ROPE_FACTORS}
    read = architecture_from_hf(config_of(GGUF(path, metadata, entries, 0)))
    if arch.rope.kind == "llama3":  # said by a tensor
        read = dataclasses.replace(read, rope=arch.rope)
    fields = [
        f.name for f in dataclasses.fields(arch) if f.name not in ("init_std", "family")
    ]  # nothing is computed of
    if lost := [name for name in fields if getattr(read, name) != getattr(arch, name)]:
        said = ", ".join(f"{name} ({getattr(arch, name)} would be read as {getattr(read, name)})" for name in lost)
        raise UsageError(f"GGUF cannot express this model's {said}")


def _verify(part: Path, metadata: dict[str, Any], stored: list[Stored]) -> None:
    """Raise RunError unless the file holds exactly this metadata and these tensors, bit for bit."""
    file = open_gguf(part)
    if wrong := sorted(
        key for key in {*metadata, *file.metadata} if not _same(metadata.get(key), file.metadata.get(key))
    ):
        raise RunError(f"verify: metadata was not written as meant: {', '.join(wrong)}")
    if differing := {t.name for t in stored} ^ set(file.entries):
        raise RunError(f"verify: tensors that are on one side only: {', '.join(sorted(differing))}")
    with bytes_bar("verifying", sum(t.nbytes for t in stored)) as advance:
        for tensor in stored:
            shape, _, low = file.entries[tensor.name]
            meant = tensor.make().reshape(-1).view(np.uint8)
            there = file.pages[low : low + tensor.nbytes]
            chunks = range(0, max(meant.size, there.size), CHUNK)
            if shape != tensor.shape or not all(
                np.array_equal(meant[a : a + CHUNK], there[a : a + CHUNK]) for a in chunks
            ):
                raise RunError(f"verify: {tensor.name} was not written as meant: a bad disk?")
            advance(tensor.nbytes)


def _same(meant: Any, there: Any) -> bool:
    if isinstance(meant, float):
        return np.float32(meant) == np.float32(there)
    if isinstance(meant, list) and meant and isinstance(meant[0], float):
        return np.array_equal(np.asarray(meant, np.float32), np.asarray(there, np.float32))
    return meant == there
