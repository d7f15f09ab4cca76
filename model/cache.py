"""The KV cache: one buffer for K and one for V, stacked over layers; each row has its own length."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.architecture import Architecture
from model.mask import Mask


@partial(jax.tree_util.register_dataclass, data_fields=("k", "v", "length"), meta_fields=())
@dataclass(frozen=True)
class Cache:
    """k, v [L, B, S, K, H]; length [B] = how many slots of a row are filled = where its next token is written."""

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]
    length: Int[Array, "B"]


def init_cache(arch: Architecture, batch: int, slots: int, dtype: Any) -> Cache:
    """An empty cache; every buffer is its own (two names of one array cannot be donated)."""
    shape = (arch.num_layers, batch, slots, arch.num_kv_heads, arch.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))


def positions(cache: Cache, steps: int) -> Int[Array, "B T"]:
    """The positions of the next `steps` tokens of each row."""
    return cache.length[:, None] + jnp.arange(steps)[None]


def mask(cache: Cache, segments: Int[Array, "B T"]) -> Mask:
    """The mask of new tokens (segments: 1 real, 0 padding on the right) over what will be in the cache."""
    slots = cache.k.shape[2]
    slot = jnp.broadcast_to(jnp.arange(slots), (segments.shape[0], slots))
    filled = slot < advance(cache, segments).length[:, None]
    return Mask(positions(cache, segments.shape[1]), slot, segments, filled.astype(jnp.int32))


def write(
    buffer: Float[Array, "L B S K H"], layer: Int[Array, ""], new: Float[Array, "B T K H"], at: Int[Array, "B T"]
) -> Float[Array, "L B S K H"]:
    """Put the new rows at their own slots; what would fall beyond the last slot is dropped."""
    rows = jnp.arange(new.shape[0])[:, None]
    return buffer.at[layer, rows, at].set(new.astype(buffer.dtype), mode="drop")


def advance(cache: Cache, segments: Int[Array, "B T"]) -> Cache:
    """Count the real new tokens; padding written beyond them is overwritten by the next ones."""
    return Cache(cache.k, cache.v, cache.length + (segments > 0).sum(1).astype(jnp.int32))
