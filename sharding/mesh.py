"""Device meshes: named axes, one of them may take whatever devices are left."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from configs.errors import UsageError

# From the outermost (slowest network) to the innermost (fastest): tensor parallelism talks most.
AXES = ("data", "stage", "fsdp", "context", "expert", "tensor")


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all axes; absent axes have size 1, one axis may be -1 = the devices that are left."""
    devices = list(jax.devices() if devices is None else devices)
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
    if free and len(devices) % fixed == 0:
        shape[free[0]] = len(devices) // fixed
    if math.prod(shape.values()) != len(devices):
        given = ", ".join(f"{axis}={size}" for axis, size in shape.items() if size != 1) or "all axes 1"
        needed = f"a multiple of {fixed} devices" if free else f"{fixed} device{'s' * (fixed > 1)}"
        hint = "" if free else " (-1 on one axis takes the rest)"
        raise UsageError(f"mesh: {given} needs {needed}, there are {len(devices)}{hint}")
    if len(devices) > 1 and devices[0].platform != "cpu":  # follow the physical network
        grid = jax.make_mesh(tuple(shape.values()), AXES, devices=devices).devices
    else:
        grid = np.asarray(devices, dtype=object).reshape(tuple(shape.values()))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
