"""Columns that are computed once: log-probs of every token under the model at the start, kept on disk."""

import hashlib
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt
from rich.console import Console
from rich.progress import track

from configs.cache import cache_folder
from configs.errors import UsageError
from convert.load import load_params, resolve
from data.examples import Examples
from data.loader import Loader
from model import lora
from model.architecture import Architecture
from sharding.place import place_batch, placer
from train.setup import Job

SECONDS = 60.0  # between two looks after what an interrupted run would lose


def score_reference(job: Job, params: Any, *several: Examples | None) -> None:
    """Give all examples the column ref_logprobs: found on disk by weights and data, else computed and written.

    The reference is objective.reference_model, or the policy as it starts: `params`.
    """
    if job.recipe.reference is None:
        return
    arch, name = job.arch, job.run.objective.reference_model
    if name is not None:
        source = resolve(name)
        arch = source.arch
        if arch.vocab_size != job.arch.vocab_size:
            raise UsageError(
                f"objective.reference_model={name} has {arch.vocab_size} tokens, model.source={job.run.model.source} "
                f"{job.arch.vocab_size}: their log-probs are of different tokens"
            )
        place = placer(lora.sharding_of(arch, job.mesh, job.rules))
        params = load_params(source, place, jnp.dtype(job.run.model.param_dtype))
    for examples in several:
        if examples is not None:
            path = cache_folder() / "reference" / f"{_name(job, arch, params, examples)}.npz"
            part = path.with_suffix(".part.npz")
            columns = _read(path)
            # hosts may have caches of their own: all of them compute, or none
            if not multihost_utils.process_allgather(np.asarray(columns is not None)).all():
                columns = _compute(job, arch, params, examples, part)
                _write(path, columns)
                part.unlink(missing_ok=True)
            assert columns is not None
            examples.attach("ref_logprobs", columns)


def _compute(job: Job, arch: Architecture, params: Any, examples: Examples, part: Path) -> dict[int, np.ndarray]:
    """The column of every example; now and then what is there is written to `part`, from where a later run goes on."""
    assert job.recipe.reference is not None
    run, P, lead = job.run, jax.process_count(), jax.process_index() == 0
    data, size = run.data.model_copy(update={"shuffle": False}), run.train.batch_size
    loader = Loader(examples, data, size, 0, jax.process_index(), P, epochs=1)
    rows = [row for row, _ in loader.walk()]
    score = jax.jit(partial(job.recipe.reference, arch=arch))
    found = (_read(part) if P == 1 else None) or {}  # several would have to agree on it
    due = time.monotonic() + SECONDS
    rows = [row for row in rows if not found.keys() >= {piece.number for piece in row}]
    for start in track(range(0, len(rows), size), "reference", console=Console(stderr=True), disable=not lead):
        some = rows[start : start + size]
        some += [[]] * (size - len(some))
        batch = place_batch(loader.stack(some), job.mesh, job.rules)
        made = np.asarray(multihost_utils.process_allgather(score(params, batch), tiled=True))
        # the global array has process after process, a process's rows are every P-th
        made = made.reshape(P, -1, made.shape[1]).swapaxes(0, 1).reshape(made.shape)
        for row, values in zip(some, made, strict=True):
            at = 0
            for index, _, length in row:
                found[index] = values[at : at + length].astype(np.float32)
                at += length
        if P == 1 and time.monotonic() > due:
            _write(part, found)
            due = time.monotonic() + SECONDS
    return found


def _name(job: Job, arch: Architecture, params: Any, examples: Examples) -> str:
    """A hash of the weights, of how they are computed with, and of all tokens."""
    digest = hashlib.sha256(repr((arch, job.compute.dtype)).encode())
    for value in jax.tree.leaves(jax.device_get(jax.jit(checksums)(params))):
        digest.update(np.asarray(value).tobytes())
    for index in range(len(examples)):
        example = examples[index]
        if example is not None:
            digest.update(np.int64(index).tobytes())
            for name in ("tokens", "targets", "branches"):
                digest.update(example[name].tobytes())
    return digest.hexdigest()[:32]


def checksums(params: Any) -> Any:
    """A number of 32 bits for each leaf that changes with any of its bits and with their order."""

    def one(x: Array) -> UInt[Array, ""]:
        width = jnp.dtype(x.dtype).itemsize
        bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[width])
        flat = bits.reshape(-1).astype(jnp.uint32)
        return (flat * (jnp.arange(flat.size, dtype=jnp.uint32) * jnp.uint32(2654435761) | 1)).sum(dtype=jnp.uint32)

    return jax.tree.map(one, params)


def _read(path: Path) -> dict[int, np.ndarray] | None:
    if not path.exists():
        return None
    kept = np.load(path)
    parts = np.split(kept["values"], np.cumsum(kept["lengths"])[:-1])
    return dict(zip(kept["indices"].tolist(), parts, strict=True))


def _write(path: Path, columns: dict[int, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{jax.process_index()}-{os.getpid()}.tmp.npz")
    indices = sorted(columns)
    np.savez(
        beside,
        indices=np.asarray(indices, np.int64),
        lengths=np.asarray([len(columns[index]) for index in indices], np.int64),
        values=np.concatenate([columns[index] for index in indices]),
    )
    beside.replace(path)
