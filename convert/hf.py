"""Hugging Face folders: read lazily by memory map, written one tensor at a time and only as a whole."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes  # noqa: F401  (numpy learns the name bfloat16)
import numpy as np

from configs.errors import RunError, UsageError
from convert.folder import read_json, write_json, written_beside
from convert.progress import bytes_bar
from convert.tables import Row, fused, listing, rows
from convert.tensors import Outgoing, Tensor, open_safetensors, write_safetensors
from model.architecture import Architecture
from model.families import architecture_from_hf, hf_config_from

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Keys of a source's config.json that are not true of what we write.
DROPPED = ("auto_map", "quantization_config", "torch_dtype", "transformers_version", "_name_or_path")


class Saves(Protocol):
    """A tokenizer, as far as writing a folder is concerned."""

    def save(self, folder: Path) -> None:
        """Write its files into a folder."""
        ...


def read_configs(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(config.json, generation_config.json or None)."""
    generation = folder / "generation_config.json"
    return read_json(folder / "config.json"), read_json(generation) if generation.is_file() else None


def open_folder(folder: Path) -> dict[str, Tensor]:
    """{name: Tensor} of a folder's safetensors, one file or several with an index; nothing is read yet."""
    index = folder / INDEX
    if not index.is_file():
        if (folder / ONE_FILE).is_file():
            return open_safetensors(folder / ONE_FILE)
        raise UsageError(_no_weights(folder))
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(shard, str) for shard in places.values()):
        raise UsageError(f"{index}: 'weight_map' (tensor -> file) is missing or malformed")
    shards = sorted(set(places.values()))
    if outside := [shard for shard in shards if Path(shard).name != shard]:
        raise UsageError(f"{index}: names files outside its folder: {listing(outside)}")
    if absent := [shard for shard in shards if not (folder / shard).is_file()]:
        raise UsageError(f"{index}: {len(absent)} of {len(shards)} files are missing: {listing(absent)}")
    files = {shard: open_safetensors(folder / shard) for shard in shards}
    if lost := [name for name, shard in places.items() if name not in files[shard]]:
        raise UsageError(f"{index}: tensors that are not in the file it names: {listing(lost)}")
    extra = [name for shard, tensors in files.items() for name in tensors if places.get(name) != shard]
    if extra:
        raise UsageError(f"{index}: tensors in the files that it does not list there: {listing(extra)}")
    return {name: files[shard][name] for name, shard in places.items()}


def _no_weights(folder: Path) -> str:
    found = sorted(path.name for path in folder.iterdir())
    if pickles := [name for name in found if name.endswith(PICKLES)]:
        return (
            f"{folder} has its weights only as pickle ({listing(pickles)}), which can run code when read and is never "
            "loaded: use a safetensors copy"
        )
    return f"{folder} has neither {ONE_FILE} nor {INDEX}; it has: {listing(found) or 'nothing'}"


def write_folder(
    destination: Path,
    params: Any,
    arch: Architecture,
    *,
    config: dict[str, Any] | None = None,
    generation_config: dict[str, Any] | None = None,
    tokenizer: Saves | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Write a folder that transformers loads; `destination` is untouched unless everything succeeded.

    params: our tree of plain arrays (merge adapters first). config: the source's own config.json, kept where it still
    fits `arch`. dtype: of the written weights, default as they are. On several processes all must call; one writes.
    """
    tensors = list(outgoing(params, arch, dtype))
    if not is_first_process():
        for tensor in tensors:
            tensor.make()  # takes part in gathering
        return
    with written_beside(destination, overwrite) as part:
        write_configs(part, tensors, arch, config, generation_config)
        if tokenizer is not None:
            tokenizer.save(part)
        write_shards(part, tensors, max_shard_bytes)


def is_first_process() -> bool:
    """Whether this is the process that writes, of several that compute."""
    import jax

    return jax.process_index() == 0


def outgoing(params: Any, arch: Architecture, dtype: str | None) -> Iterator[Outgoing]:
    """Their tensors, in the table's order; each is fetched from the devices and transposed when it is written."""
    from model.tree import flatten

    flat, table = flatten(params), rows(arch)
    missing, surplus = [r.ours for r in table if r.ours not in flat], set(flat) - {r.ours for r in table}
    if missing or surplus:
        raise ValueError(
            f"params do not fit the architecture (adapters must be merged or written as adapters): missing "
            f"{listing(missing) or 'none'}; surplus {listing(sorted(surplus)) or 'none'}"
        )
    for row in table:
        leaf = flat[row.ours]
        if leaf.shape != row.shape(arch):
            raise ValueError(f"params: {row.ours} is {tuple(leaf.shape)}, the architecture says {row.shape(arch)}")
    for sharing in fused(arch).values():
        leaves = [(row, flat[row.ours]) for row in sharing]
        kind = np.dtype(dtype or leaves[0][1].dtype)
        for number, name in enumerate(sharing[0].names(arch)):
            yield Outgoing(name, sharing[0].their_shape(arch), kind, _maker(leaves, arch, number, kind))


def _maker(leaves: list[tuple[Row, Any]], arch: Architecture, number: int, dtype: np.dtype) -> Any:
    """Tensor `number` of those of some rows that share theirs; mostly it is one row's own."""

    def make() -> np.ndarray:
        parts = []
        for row, leaf in leaves:
            at = np.unravel_index(number, row.shape(arch)[: row.lead])
            parts.append((row, on_host(leaf[tuple(map(int, at))] if at else leaf).astype(dtype, copy=False)))
        row, values = parts[0]
        if row.share is None:
            return row.to_theirs(values, arch)
        whole = np.empty(row.their_shape(arch), dtype)
        for row, values in parts:
            row.put(whole, values, arch)
        return whole

    return make


def on_host(array: Any) -> np.ndarray:
    """The whole array as numpy, gathered from every process where it is spread over several."""
    jax = sys.modules.get("jax")  # where it has not been imported, no array is its
    if jax is not None and isinstance(array, jax.Array) and not array.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def write_configs(
    folder: Path,
    tensors: list[Outgoing],
    arch: Architecture,
    config: dict[str, Any] | None,
    generation_config: dict[str, Any] | None,
) -> None:
    """config.json, as the source's own as far as it fits, and generation_config.json."""
    dtypes = {tensor.dtype.name for tensor in tensors}
    write_json(folder / "config.json", _config(arch, config, dtypes.pop() if len(dtypes) == 1 else "float32"))
    if generation_config is not None:
        write_json(folder / "generation_config.json", generation_config)


def _config(arch: Architecture, config: dict[str, Any] | None, dtype: str) -> dict[str, Any]:
    if config is None:
        config = hf_config_from(arch)
    elif architecture_from_hf(config) != arch:
        config = {**config, **hf_config_from(arch)}
    if config.get("num_nextn_predict_layers"):  # whose layers are not read
        config = {**config, "num_nextn_predict_layers": 0}
    return {key: value for key, value in config.items() if key not in DROPPED} | {"dtype": dtype}


def write_shards(folder: Path, tensors: list[Outgoing], limit: int) -> None:
    """One file, or several of at most `limit` bytes (a tensor is never cut) and their index."""
    shards: list[list[Outgoing]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > limit:
            shards.append([])
        shards[-1].append(tensor)
    total = sum(t.nbytes for t in tensors)
    check_space(folder, total)
    with bytes_bar(f"writing {folder.name.split('.partial')[0].lstrip('.')}", total) as advance:
        if len(shards) == 1:
            write_safetensors(folder / ONE_FILE, tensors, advance=advance)
            return
        weight_map = {}
        for i, shard in enumerate(shards):
            name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            write_safetensors(folder / name, shard, advance=advance)
            weight_map |= {t.name: name for t in shard}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def check_space(folder: Path, needed: int) -> None:
    """Raise RunError unless so many bytes fit on the disk of an existing folder: worth asking before writing them."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"{folder.parent}: {needed / 1e9:.2f} GB are to be written, the disk has {free / 1e9:.2f} GB free"
        )
