"""Device meshes: named axes, one of them may take whatever devices are left."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from configs.errors import UsageError

# From the outermost (slowest network) to the innermost (fastest): tensor parallelism talks most.
AXES = ("data", "stage", "fsdp", "context", "expert", "tensor")


def make_mesh(
    sizes: Mapping[str, int], devices: Sequence[Any] | None = None, dcn: Mapping[Any, int] | None = None
) -> Mesh:
    """A mesh of all axes; absent axes have size 1, one axis may be -1 = the devices that are left.

    dcn: how much of an axis lies across slices; where there are several and nothing is said, the outermost axes do.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = shape_of(sizes, len(devices))
    return Mesh(_grid(shape, devices, dcn or {}), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shape_of(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """The size of every axis of a mesh of so many devices."""
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise UsageError(f"mesh.{unknown[0]}: unknown axis; axes: {', '.join(AXES)}")
    shape = {axis: int(sizes.get(axis, 1)) for axis in AXES}
    free = [axis for axis, size in shape.items() if size == -1]
    fixed = math.prod(size for size in shape.values() if size != -1)
    if len(free) > 1:
        raise UsageError(f"mesh: only one axis may be -1, not {' and '.join(free)}")
    if any(size < 1 and size != -1 for size in shape.values()):
        raise UsageError(f"mesh: sizes are at least 1 (or one -1), given {dict(sizes)}")
    if free and count % fixed == 0:
        shape[free[0]] = count // fixed
    if math.prod(shape.values()) != count:
        given = ", ".join(f"{axis}={size}" for axis, size in shape.items() if size != 1) or "all axes 1"
        needed = f"a multiple of {fixed} devices" if free else f"{fixed} device{'s' * (fixed > 1)}"
        hint = "" if free else " (-1 on one axis takes the rest)"
        raise UsageError(f"mesh: {given} needs {needed}, there are {count}{hint}")
    return shape


def slices_of(devices: Sequence[Any]) -> list[list[Any]]:
    """The devices by slice (TPU) or by host: those with the faster network between them."""
    number = lambda d: getattr(d, "slice_index", None) if d.platform == "tpu" else d.process_index  # noqa: E731
    slices: dict[Any, list[Any]] = {}
    for device in devices:
        slices.setdefault(number(device), []).append(device)
    return [slices[key] for key in sorted(slices, key=lambda key: key or 0)]


def _grid(shape: Mapping[str, int], devices: Sequence[Any], dcn: Mapping[Any, int]) -> Any:
    """The devices in the mesh's shape: neighbours within a slice first."""
    slices = slices_of(devices)
    if not dcn and (len(slices) == 1 or devices[0].platform != "tpu"):
        return _within(devices, tuple(shape.values()))
    outer = _across(shape, len(slices), dcn)
    if len({len(some) for some in slices}) > 1:
        raise UsageError(f"mesh: slices of {', '.join(str(len(some)) for some in slices)} devices; all need as many")
    inner = tuple(shape[axis] // outer[axis] for axis in AXES)
    grid = np.stack([_within(some, inner) for some in slices]).reshape(*outer.values(), *inner)
    n = len(AXES)  # each axis: its part across slices, then its part within one
    return grid.transpose([i + j for i in range(n) for j in (0, n)]).reshape(tuple(shape.values()))


def _across(shape: Mapping[str, int], slices: int, dcn: Mapping[Any, int]) -> dict[str, int]:
    """How much of each axis lies across slices."""
    outer = {axis: int(dcn.get(axis, 1)) for axis in AXES}
    if not dcn:  # what talks least
        left = slices
        for axis in AXES:
            outer[axis] = math.gcd(shape[axis], left)
            left //= outer[axis]
    for axis, size in outer.items():
        if shape[axis] % size:
            raise UsageError(f"mesh.dcn.{axis} is {size}, which does not divide mesh.{axis}, {shape[axis]}")
    if slices == 1 and dcn:
        raise UsageError(
            f"mesh.dcn is {dict(dcn)}: there is but one slice (or host), so no axis lies across; leave it out"
        )
    if (covered := math.prod(outer.values())) != slices:
        said = f"mesh.dcn ({', '.join(f'{a}: {n}' for a, n in dcn.items())})" if dcn else "the mesh's axes"
        raise UsageError(
            f"{said}: {covered} slice{'s' * (covered > 1)} of the {slices} there are (TPU slices, or hosts); "
            f"the sizes in mesh.dcn multiply to {slices}, as {{data: {slices}}} with mesh.data a multiple of it"
        )
    return outer


def _within(devices: Sequence[Any], shape: tuple[int, ...]) -> Any:
    """The devices of one slice: on accelerators as their network lies."""
    if len(devices) == 1 or devices[0].platform == "cpu":
        return np.asarray(devices, dtype=object).reshape(shape)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
