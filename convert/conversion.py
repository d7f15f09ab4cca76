"""A MODEL to a Hugging Face folder, tensor by tensor, and the proof that what lies there is what was meant."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns the name bfloat16)
import numpy as np

from configs.errors import RunError, UsageError
from convert.folder import check_apart, check_free, read_json, write_json, written_beside
from convert.gguf import open_gguf
from convert.hf import open_folder, outgoing, write_configs, write_shards
from convert.load import TOKENIZERS, load_tokenizer, open_tensors
from convert.progress import bytes_bar
from convert.source import Source
from convert.tables import match
from convert.tensors import Outgoing, Tensor, cast, open_safetensors, values_of
from data.tokenizer import FILES, Tokenizer
from model.families import architecture_from_hf

DTYPES = ("float32", "bfloat16", "float16", "float64")
TERMS = ("LICENSE*", "NOTICE*", "USE_POLICY*")  # go wherever the weights go
CHUNK = 1 << 24  # bytes compared at a time


@dataclass(frozen=True)
class Written:
    """What a conversion has written."""

    path: Path
    tensors: int
    nbytes: int
    dtypes: tuple[str, ...]
    files: int
    verified: bool


def convert(
    source: Source,
    destination: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    verify: bool = False,
    overwrite: bool = False,
) -> Written:
    """Write the model as a Hugging Face folder, adapters merged; all or nothing.

    A folder's or GGUF file's tensors go one by one from the file to the file: without jax, and where neither dtype nor
    layout changes without passing through this process. Of a run or an adapter's base one leaf is in memory.
    verify: read back what was written, and compare every tensor bitwise with what was meant, before it gets its name.
    """
    check_dtype(dtype, DTYPES)
    check_apart(destination, places(source))
    check_free(destination, overwrite)
    tensors = tensors_of(source, dtype)
    with written_beside(destination, overwrite) as part:
        write_configs(part, tensors, source.arch, source.config, _generation_config(source))
        _write_tokenizer(source, part)
        write_shards(part, tensors, max_shard_bytes)
        if verify:
            verify_folder(part, tensors, source)
        files = len(list(part.glob("*.safetensors")))
    return written(destination, tensors, files, verify)


def written(path: Path, tensors: list[Outgoing], files: int, verified: bool) -> Written:
    """The summary of what was written."""
    dtypes = tuple(dict.fromkeys(t.dtype.name for t in tensors))
    return Written(path, len(tensors), sum(t.nbytes for t in tensors), dtypes, files, verified)


def check_dtype(dtype: str | None, allowed: tuple[str, ...]) -> None:
    """Raise UsageError for an unknown name."""
    if dtype is not None and dtype not in allowed:
        raise UsageError(f"dtype '{dtype}' is unknown; allowed: {', '.join(allowed)}")


def places(source: Source | None) -> Iterator[Path]:
    """Everything that may be read."""
    while source is not None:
        yield source.path
        source = source.base


def tensors_of(source: Source, dtype: str | None) -> list[Outgoing]:
    """The model under Hugging Face's names; nothing is read yet, but all that a header tells is checked."""
    if source.kind not in ("hf", "gguf"):
        from convert.held import hold

        return [checked(tensor, dtype) for tensor in outgoing(hold(source), source.arch, None)]
    tensors = open_tensors(source)
    arch = architecture_from_hf(source.config)
    leaves = match(tensors, arch, str(source.path)).values()
    names = {id(t): name for leaf in leaves for name, t in zip(leaf.row.names(arch), leaf.tensors, strict=True)}
    # in the order of the files, so that they are read from their beginning to their end
    return [checked(_passed(names[id(t)], t), dtype) for t in tensors.values() if id(t) in names]


def _passed(name: str, tensor: Tensor) -> Outgoing:
    assert tensor.dtype is not None  # such have been refused
    lies = (tensor.where, tensor.at) if tensor.at is not None else None
    return Outgoing(name, tensor.shape, tensor.dtype, tensor.read, lies)


def checked(tensor: Outgoing, dtype: Any) -> Outgoing:
    """The tensor in another dtype, cast when it is made; a value that this cannot hold is an error then."""
    kind = np.dtype(dtype or tensor.dtype)
    if kind == tensor.dtype:
        return tensor

    def make() -> np.ndarray:
        values = tensor.make()
        with np.errstate(over="ignore"):
            made = cast(values, kind)
        if not np.can_cast(values.dtype, kind):
            lost = np.isinf(made)
            if lost.any() and (lost := lost & np.isfinite(values)).any():
                worst = float(np.abs(values[lost]).max())
                raise RunError(
                    f"{tensor.name}: {int(lost.sum())} values, the largest {worst:.6g}, are beyond {kind.name}: "
                    "choose another dtype"
                )
        return made

    return replace(tensor, dtype=kind, make=make, lies=None)


def _generation_config(source: Source) -> dict[str, Any] | None:
    return None if source.arch.num_labels else source.generation_config


def _write_tokenizer(source: Source, folder: Path) -> None:
    """The tokenizer and the terms of use; files that need no change are copied without loading them."""
    for pattern in TERMS if source.path.is_dir() else ():
        for file in source.path.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    if source.kind != "hf":
        if (tokenizer := tokenizer_of(source)) is not None:
            tokenizer.save(folder)
        return
    for name in FILES:
        if (source.path / name).is_file():
            shutil.copyfile(source.path / name, folder / name)
    path = folder / "tokenizer_config.json"
    if path.is_file() and (config := read_json(path)).get("tokenizer_class") == "TokenizersBackend":
        write_json(path, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})  # which transformers 4 knows, too


def tokenizer_of(source: Source) -> Tokenizer | None:
    """The model's tokenizer, if it has one."""
    return None if tokenizer_home(source) is None else load_tokenizer(source)


def tokenizer_home(source: Source) -> Source | None:
    """Whose tokenizer a model has: its own or, of what it started from, the nearest that has one."""
    if source.tokenizer is not None or any((source.path / name).is_file() for name in TOKENIZERS):
        return source
    if source.kind == "gguf":
        return source if "tokenizer.ggml.tokens" in open_gguf(source.path).metadata else None
    return None if source.base is None else tokenizer_home(source.base)


def verify_folder(folder: Path, meant: list[Outgoing], source: Source) -> None:
    """Raise RunError unless the folder says the same architecture and holds exactly these tensors, bit for bit."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if architecture_from_hf(config) != source.arch:
        raise RunError("verify: the config.json that was written means another architecture")
    verify_tensors(open_folder(folder), meant)


def verify_tensors(found: dict[str, Tensor], meant: list[Outgoing]) -> None:
    """Raise RunError unless there are exactly these tensors, bit for bit."""
    if differing := {t.name for t in meant} ^ set(found):
        raise RunError(f"verify: tensors that are on one side only: {', '.join(sorted(differing))}")
    with bytes_bar("verifying", sum(t.nbytes for t in meant)) as advance:
        for tensor in meant:
            there = found[tensor.name]
            if (there.shape, there.dtype) != (tensor.shape, tensor.dtype):
                raise RunError(f"verify: {tensor.name} is {there.stored} {list(there.shape)}")
            left, right = there.read().reshape(-1).view(np.uint8), values_of(tensor)
            for at in range(0, left.size, CHUNK):
                if not np.array_equal(left[at : at + CHUNK], right[at : at + CHUNK]):
                    raise RunError(f"verify: {tensor.name} was not written as meant (near byte {at}): a bad disk?")
            advance(tensor.nbytes)


def convert_adapter(
    source: Source, destination: Path, *, dtype: str | None = None, verify: bool = False, overwrite: bool = False
) -> Written:
    """Write a run's or folder's adapters as a PEFT folder."""
    from convert import adapter, run
    from convert.held import hold_adapter

    check_dtype(dtype, DTYPES)
    check_apart(destination, places(source))
    check_free(destination, overwrite)
    pairs = hold_adapter(source)
    assert source.base is not None
    if source.kind == "adapter":
        said = adapter.read_adapter_config(source.path)
        alpha, rslora = said.lora_alpha, said.use_rslora
    else:
        tune = run.read_run_config(source.path).get("tune") or {}
        alpha, rslora = tune.get("lora_alpha", 32.0), tune.get("use_rslora", False)
    tensors = [checked(tensor, dtype) for tensor in adapter.outgoing(pairs, source.arch, None)]
    config = adapter.config_of(pairs, source.arch, source.base.name, alpha, rslora)
    with written_beside(destination, overwrite) as part:
        adapter.write_files(part, tensors, config, tokenizer_of(source))
        if verify:
            verify_tensors(open_safetensors(part / adapter.WEIGHTS), tensors)
    return written(destination, tensors, 1, verify)
