"""What differs from layer to layer, as inputs of the layer scan: windows, and with them the RoPE base."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from model.architecture import Architecture
from model.mask import Mask
from model.rope import rotation

EVERYTHING = 2**31 - 1  # the window of a layer that sees all keys


@partial(jax.tree_util.register_dataclass, data_fields=("index", "window", "rope"), meta_fields=())
@dataclass(frozen=True)
class Layer:
    """A layer's number, window and RoPE base; all layers' on a leading axis before the scan.

    window: None where no layer has one; rope: which of angles_of's, None where there is but one.
    """

    index: Any  # i32[L], in the scan i32[]
    window: Any = None
    rope: Any = None


def layers_of(arch: Architecture, some: range | None = None) -> Layer:
    """The scanned input of all layers, or of some that follow each other."""
    some = range(arch.num_layers) if some is None else some
    index = jnp.arange(some.start, some.stop)
    if not any(arch.windows):
        return Layer(index)
    windows = arch.windows[some.start : some.stop]
    window = jnp.asarray([window or EVERYTHING for window in windows], jnp.int32)
    rope = None if arch.local_rope is None else jnp.asarray([window > 0 for window in windows], jnp.int32)
    return Layer(index, window, rope)


def angles_of(arch: Architecture, positions: Int[Array, "B T"], dtype: Any) -> Any:
    """cos and sin of every position; with two RoPE bases a leading axis of 2: that of all keys, that of windows."""
    size = arch.head_dim if arch.latent is None else arch.latent.rope_dim
    angles = rotation(arch.rope, size, positions, dtype)
    if arch.local_rope is None or not any(arch.windows):
        return angles
    local = rotation(arch.local_rope, arch.head_dim, positions, dtype)
    return jax.tree.map(lambda *both: jnp.stack(both), angles, local)


def at_layer(layer: Layer, mask: Any, angles: Any) -> tuple[Any, Any]:
    """The mask (a Sight has its window already) and the angles of one layer."""
    if layer.rope is not None:
        angles = jax.tree.map(lambda both: both[layer.rope], angles)
    if isinstance(mask, Mask) and layer.window is not None:
        mask = replace(mask, window=layer.window)
    return mask, angles
