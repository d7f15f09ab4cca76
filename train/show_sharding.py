"""purestep train RECIPE --show-sharding: what of each weight, and of its optimizer state, lies on a device."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from configs.schema import Run
from model.lora import adapter_axes
from model.transformer import Declared, declare
from model.tree import flatten
from sharding.rules import STACKED
from train.mesh_choice import tell
from train.planner.abstract import shape_of_source
from train.setup import Job, abstract_params, job_of, lay_out, with_head
from train.state import State

GIANT = 0.01  # of all weights' bytes: that it lies whole on every device is then told


@dataclass(frozen=True)
class Row:
    """A weight: its logical axes and what splits each, its bytes on a device and its optimizer state's."""

    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    split: tuple[str, ...]  # mesh axes of more than one device, "" where a dimension is whole
    dtype: str
    whole: int  # bytes of all of it
    bytes: int
    state: int

    @property
    def replicated(self) -> bool:
        """Whether every device has all of it."""
        return not any(self.split)


def show_sharding(run: Run) -> None:
    """Print the table; nothing is read but the model's config, and nothing allocated."""
    source = with_head(run, shape_of_source(run)[0])
    mesh, rules, compute = lay_out(run, source)
    tell(run, source.arch, compute, mesh)
    with jax.set_mesh(mesh):
        params = abstract_params(source.arch, mesh, rules, jnp.dtype(run.model.param_dtype))
        job, state = job_of(run, source, mesh, rules, compute, run.train.steps or 1, params)
    if jax.process_index() == 0:
        show(list(rows_of(job, state)), job, Console(width=None if Console().is_terminal else 200, highlight=False))


def rows_of(job: Job, state: State) -> Iterator[Row]:
    """The weights, frozen ones and adapters too."""
    declared, moments = declare(job.arch), _moments(state)
    for path, x in flatten(job.params(state)).items():
        spec = (*x.sharding.spec, *[None] * (x.ndim - len(x.sharding.spec)))
        named = [() if axes is None else (axes,) if isinstance(axes, str) else axes for axes in spec]
        split = tuple(" x ".join(a for a in axes if job.mesh.shape[a] > 1) for axes in named)
        part = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        whole = x.size * x.dtype.itemsize
        yield Row(path, x.shape, _axes(path, declared), split, str(x.dtype), whole, part, moments.get(path, 0))


def _axes(path: str, declared: dict[str, Declared]) -> tuple[str, ...]:
    if path in declared:
        return declared[path].axes
    owner, _, part = path.rpartition("/")
    axes = declared[owner].axes
    return {"a": adapter_axes(axes)[0], "b": adapter_axes(axes)[1]}.get(part, axes)


def _moments(state: State) -> dict[str, int]:
    """{path: bytes on a device} of what the optimizer keeps for each weight that learns."""
    names = {at: path for path, (at, _) in zip(flatten(state.params), _leaves(state.params), strict=True)}
    found: dict[str, int] = {}
    for at, x in _leaves(state.opt):
        ends = [names[at[i:]] for i in range(len(at)) if at[i:] in names]
        if ends and x.shape:
            size = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            found[ends[0]] = found.get(ends[0], 0) + size
    return found


def _leaves(tree: Any) -> list[Any]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def giants(rows: list[Row], devices: int) -> list[Row]:
    """Weights that are no small part of the model and lie whole on every one of several devices."""
    total = sum(row.whole for row in rows)
    return [row for row in rows if devices > 1 and row.replicated and row.whole > GIANT * total]


def show(rows: list[Row], job: Job, console: Console) -> None:
    """Print the table, its totals and the giants."""
    sizes = {axis: size for axis, size in job.mesh.shape.items() if size > 1}
    console.print(
        f"mesh: {', '.join(f'{axis} {size}' for axis, size in sizes.items()) or '1 device'}; MiB are of one device"
    )
    big = giants(rows, job.mesh.size)
    table = Table("weight", "shape", "logical axes", "split over", "dtype", "MiB", "state MiB", "", box=None)
    for row in rows:
        over = ", ".join(f"{axis}: {mesh}" for axis, mesh in zip(row.axes, row.split, strict=True) if mesh) or "-"
        mark = "WHOLE on every device" if row in big else ""
        cells = (row.path, " x ".join(map(str, row.shape)), " ".join(row.axes), over, row.dtype)
        table.add_row(*cells, f"{row.bytes / 2**20:,.2f}", f"{row.state / 2**20:,.2f}", mark)
    console.print(table)
    whole, part, state = (sum(getattr(row, name) for row in rows) for name in ("whole", "bytes", "state"))
    console.print(
        f"{len(rows)} weights of {whole / 2**20:,.1f} MiB: {part / 2**20:,.1f} MiB on each of {job.mesh.size} devices, "
        f"and {state / 2**20:,.1f} MiB of optimizer state"
    )
    for row in big:
        axes = ", ".join(f"mesh.rules.{axis}" for axis in row.axes if axis not in (*STACKED, "norm"))
        console.print(
            f"{row.path}: {row.whole / whole:.1%} of the model lies whole on all {job.mesh.size} devices; "
            f"{' x '.join(sizes)} could split it ({axes})"
        )
