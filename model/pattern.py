"""What differs from layer to layer, as inputs of the layer scan: windows, and rotations."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from model.architecture import Architecture, Rope
from model.mask import Mask
from model.rope import rotation

EVERYTHING = 2**31 - 1  # the window of a layer that sees all keys


@partial(jax.tree_util.register_dataclass, data_fields=("index", "window", "rope"), meta_fields=("windows",))
@dataclass(frozen=True)
class Layer:
    """A layer's number, window and rotation; all layers' on a leading axis before the scan.

    window: None where no layer has one; rope: which of angles_of's, None where there is but one.
    """

    index: Any  # i32[L], in the scan i32[]
    window: Any = None
    rope: Any = None
    windows: tuple[int, ...] = ()  # that any layer has


def ropes_of(arch: Architecture) -> tuple[Rope | None, ...]:
    """Each layer's rotation."""
    windows, rotated = arch.windows or (0,) * arch.num_layers, arch.rotated or (True,) * arch.num_layers
    if arch.learned_positions:
        rotated = (False,) * arch.num_layers
    local = arch.local_rope or arch.rope
    return tuple((local if w else arch.rope) if r else None for w, r in zip(windows, rotated, strict=True))


def layers_of(arch: Architecture, some: range | None = None) -> Layer:
    """The scanned input of all layers, or of some that follow each other."""
    window, rope, windows = None, None, ()
    if any(arch.windows):
        each = [window or EVERYTHING for window in arch.windows]
        window, windows = jnp.asarray(each, jnp.int32), tuple(sorted(set(each)))
    if len(kinds := list(dict.fromkeys(ropes_of(arch)))) > 1:
        rope = jnp.asarray([kinds.index(kind) for kind in ropes_of(arch)], jnp.int32)
    all_ = Layer(jnp.arange(arch.num_layers), window, rope, windows)
    return all_ if some is None else jax.tree.map(lambda x: x[some.start : some.stop], all_)


def angles_of(arch: Architecture, positions: Int[Array, "B T"], dtype: Any, segments: Any = None) -> Any:
    """cos and sin of every position, None without RoPE; where layers differ, with a leading axis of their kinds.

    segments: tells sequences in a row apart, for the kinds of RoPE that ask how long they are; None: one a row.
    """
    kinds, lengths = list(dict.fromkeys(ropes_of(arch))), None
    if any(kind is not None and kind.by_length for kind in kinds):
        lengths = _lengths(positions, jnp.ones_like(positions) if segments is None else segments)
    size = arch.head_dim if arch.latent is None else arch.latent.rope_dim
    turns = [None if kind is None else rotation(kind, size, positions, dtype, lengths) for kind in kinds]
    some = next((turn for turn in turns if turn is not None), None)
    if some is None:
        return None
    still = jnp.ones_like(some[0]), jnp.zeros_like(some[1])
    turns = [still if turn is None else turn for turn in turns]
    return some if len(turns) == 1 else jax.tree.map(lambda *kinds: jnp.stack(kinds), *turns)


def _lengths(positions: Int[Array, "B T"], segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The length of each token's sequence, up to where the row has it."""
    row = jnp.arange(positions.shape[0])[:, None]
    ends = jnp.zeros((positions.shape[0], positions.shape[1] + 1), positions.dtype).at[row, segments].max(positions + 1)
    return ends[row, segments]


def at_layer(layer: Layer, mask: Any, angles: Any) -> tuple[Any, Any]:
    """The mask (a Sight has its window already) and the angles of one layer."""
    if layer.rope is not None:
        angles = jax.tree.map(lambda both: both[layer.rope], angles)
    if isinstance(mask, Mask) and layer.window is not None:
        mask = replace(mask, window=layer.window, windows=layer.windows)
    return mask, angles
