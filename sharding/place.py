"""Where arrays live: shardings of a tree, constraints inside jit, host rows to global arrays."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from configs.errors import UsageError
from sharding.rules import Rules, check_divides, spec

Tree = Any
HOST = "pinned_host"  # the memory kind of a device's host


def constrain(x: jax.Array, rules: Rules, *logical: str | None) -> jax.Array:
    """Ask the partitioner for this layout inside jit; without a mesh in context it is the identity.

    An axis "stream" that does not divide is split as "seq" is: one token, say, is on every device of the tensor axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    if "stream" in logical and x.shape[logical.index("stream")] % split(rules, "stream").size:
        logical = tuple("seq" if name == "stream" else name for name in logical)
    return jax.lax.with_sharding_constraint(x, spec(rules, logical))


@dataclass(frozen=True)
class Split:
    """The mesh axes of more than one device that a logical axis is split over, and over how many devices that is."""

    axes: tuple[str, ...]
    size: int


ALONE = Split((), 1)


def split(rules: Rules, logical: str) -> Split:
    """Over what the mesh in context splits a logical axis."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = () if mesh.empty else tuple(axis for axis in rules.axes(logical) if mesh.shape[axis] > 1)
    return Split(axes, math.prod(mesh.shape[axis] for axis in axes))


def is_local() -> bool:
    """Whether what is traced sees a device's own parts: there is no mesh, or a shard_map over all of its axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or all(size == 1 or axis in mesh.manual_axes for axis, size in mesh.shape.items())


def per_device(fn: Callable[..., Any], in_specs: Any, out_specs: Any, typed: bool = False) -> Callable[..., Any]:
    """fn of each device's own parts, over all axes of the mesh in context (but those of a shard_map around it).

    typed: jax keeps account of what is alike on which devices, so that no gradient is summed over devices that have it
    already; kernels and loops need more for it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = set(mesh.axis_names) - set(mesh.manual_axes)
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=typed)


def weight_sharding(
    mesh: Mesh, rules: Rules, logical: Sequence[str | None], shape: Sequence[int], where: str
) -> NamedSharding:
    """The sharding of one weight, checked: every dimension divides, no mesh axis is used twice."""
    check_divides(mesh, rules, logical, shape, where)
    return NamedSharding(mesh, spec(rules, logical, where))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def state_shardings(abstract: Tree, params: Tree, mesh: Mesh) -> Tree:
    """Shardings of an optimizer state: a leaf shaped like a weight, under that weight's path, lies where that lies.

    abstract: eval_shape of the state; params: the weights, placed. Everything else is replicated.
    jax.jit(tx.init) without such out_shardings leaves the state on one device.
    """
    weights = jax.tree_util.tree_flatten_with_path(params)[0]

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for at, weight in weights:
            if path[-len(at) :] == at and leaf.shape == weight.shape:
                return weight.sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, abstract)


def on_host(tree: Tree) -> Tree:
    """Shardings whose arrays lie in the host's memory."""
    return jax.tree.map(lambda sharding: sharding.with_memory_kind(HOST), tree)


def fetch(tree: Tree, shardings: Tree) -> Tree:
    """The arrays of a tree, those whose shardings are the host's brought to the device; inside jit or outside."""
    move = lambda x, s: jax.device_put(x, s.with_memory_kind("device")) if s.memory_kind == HOST else x  # noqa: E731
    return jax.tree.map(move, tree, shardings)


def check_host_memory(device: Any, key: str) -> None:
    """Raise UsageError where a device cannot reach memory of its host."""
    if HOST not in (kinds := [memory.kind for memory in device.addressable_memories()]):
        raise UsageError(f"{key}: {device.device_kind} has no {HOST} memory; it has {', '.join(kinds)}")


def is_abstract(tree: Tree) -> bool:
    """Whether these are shapes that stand for arrays: nothing is computed with them (a plan's job)."""
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))


def born(make: Callable[..., Tree], shardings: Tree, *given: Tree) -> Tree:
    """What `make` makes of what is given, jitted, each leaf born where `shardings` says; of shapes, its shapes."""
    if not is_abstract(given):
        return jax.jit(make, out_shardings=shardings)(*given)
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(place, jax.eval_shape(make, *given), shardings)


def batch_shardings(batch: Mapping[str, Any], mesh: Mesh, rules: Rules) -> dict[str, NamedSharding]:
    """Where each column [B, T, ..] of a batch lies: split over batch (and seq) axes."""
    axes = {name: ("batch", "seq")[: x.ndim] + (None,) * (x.ndim - 2) for name, x in batch.items()}
    return {name: NamedSharding(mesh, spec(rules, logical)) for name, logical in axes.items()}


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, rules: Rules) -> dict[str, jax.Array]:
    """This process's rows of every column [b, T, ..] -> global arrays [B, T, ..] split over batch (and seq) axes."""
    shardings = batch_shardings(batch, mesh, rules)
    processes = jax.process_count()
    if processes == 1:  # one call for all columns is nearly twice as fast
        return jax.device_put(dict(batch), shardings)

    def put(name: str, column: np.ndarray) -> jax.Array:
        shape = (column.shape[0] * processes, *column.shape[1:])
        return jax.make_array_from_process_local_data(shardings[name], column, shape)

    return {name: put(name, column) for name, column in batch.items()}


def placer(sharding_of: Callable[[str, tuple[int, ...]], NamedSharding]) -> Callable[..., jax.Array]:
    """A function (path, shape, dtype, read) -> array that reads, for each device, only the slices it needs."""

    def place(path: str, shape: tuple[int, ...], dtype: Any, read: Callable[[Any], np.ndarray]) -> jax.Array:
        return jax.make_array_from_callback(shape, sharding_of(path, shape), read, dtype=dtype)

    return place
