"""The KV cache of B rows: prompts, kept once for the n rows that share one, and each row's own tokens after it."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.architecture import Architecture

BLOCK = 32  # slots that reorder moves at a time
Buffer = Any  # Float[Array, "L B K S H"], an Int8 of that shape, or a tuple of L of one of them without the L: apart


@partial(jax.tree_util.register_dataclass, data_fields=("codes", "scale"), meta_fields=())
@dataclass(frozen=True)
class Int8:
    """codes * scale; one scale for the H numbers of a head at a position: an error of 1/254 of the largest at most."""

    codes: Int[Array, "*B H"]
    scale: Float[Array, "*B one"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("k", "v", "length", "prompt_k", "prompt_v", "prompt_length"),
    meta_fields=(),
)
@dataclass(frozen=True)
class Cache:
    """k, v [L, B, K, S, H]: a row's own tokens, `length` of them, each written at its own slot. With latent attention
    (model/mla.py) k holds the latents [L, B, 1, S, R] and v the rotated keys [L, B, 1, S, P].

    prompt_k, prompt_v [L, P, K, S0, H] or None: rows p * n .. p * n + n - 1 (n = B / P) come after prompt p, of which
    row b sees the first prompt_length[b] tokens. A row's positions count from the start of its prompt.
    """

    k: Buffer
    v: Buffer
    length: Int[Array, "B"]
    prompt_k: Buffer
    prompt_v: Buffer
    prompt_length: Int[Array, "B"]

    @property
    def slots(self) -> int:
        """How many tokens of its own a row can hold."""
        return jax.tree.leaves(self.k)[0].shape[-2]

    @property
    def prompt_slots(self) -> int:
        """How many tokens a prompt can have."""
        return 0 if self.prompt_k is None else jax.tree.leaves(self.prompt_k)[0].shape[-2]

    @property
    def positions(self) -> Int[Array, "B"]:
        """The position of each row's next token."""
        return self.prompt_length + self.length


def blank(arch: Architecture, rows: int, slots: int, dtype: Any, apart: bool = False) -> tuple[Buffer, Buffer]:
    """Empty buffers of k and v; every array is its own (two names of one cannot be donated). dtype int8: quantised."""

    def make(size: int, *stack: int) -> Buffer:
        heads = arch.num_kv_heads if arch.latent is None else 1
        shape = (*stack, rows, heads, slots, size)
        if jnp.dtype(dtype) == jnp.int8:
            return Int8(jnp.zeros(shape, jnp.int8), jnp.zeros((*shape[:-1], 1), jnp.float32))
        return jnp.zeros(shape, dtype)

    def stacked(size: int) -> Buffer:
        return tuple(make(size) for _ in range(arch.num_layers)) if apart else make(size, arch.num_layers)

    m = arch.latent
    return (stacked(arch.head_dim), stacked(arch.head_dim)) if m is None else (stacked(m.rank), stacked(m.rope_dim))


def init_cache(
    arch: Architecture, rows: int, slots: int, dtype: Any, prompts: int = 0, prompt_slots: int = 0, apart: bool = False
) -> Cache:
    """An empty cache; prompts 0: the rows start from nothing."""
    shared = blank(arch, prompts, prompt_slots, dtype, apart) if prompts else (None, None)
    lengths = (jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.int32))
    return Cache(*blank(arch, rows, slots, dtype, apart), lengths[0], *shared, lengths[1])


def pack(x: Any, dtype: Any) -> Buffer:
    """Keys or values as a buffer of this dtype keeps them."""
    if isinstance(x, tuple):
        return tuple(pack(layer, dtype) for layer in x)
    if jnp.dtype(dtype) != jnp.int8:
        return x.astype(dtype)
    scale = jnp.abs(x).max(-1, keepdims=True).astype(jnp.float32) / 127
    codes = jnp.round(x / jnp.maximum(scale, jnp.finfo(jnp.float32).tiny).astype(x.dtype))
    return Int8(codes.astype(jnp.int8), scale)


def dtype_of(buffer: Buffer) -> Any:
    """The dtype that a buffer keeps."""
    return jax.tree.leaves(buffer)[0].dtype


def unpack(buffer: Buffer, dtype: Any) -> Float[Array, "*B H"]:
    """The numbers that a buffer's layer stands for."""
    if isinstance(buffer, Int8):
        return buffer.codes.astype(dtype) * buffer.scale.astype(dtype)
    return buffer.astype(dtype)


def layer_of(buffer: Buffer, layer: Any) -> Buffer:
    """One layer's [B, K, S, H]; of layers apart, layer is a number of Python's."""
    if isinstance(buffer, tuple):
        return buffer[layer]
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), buffer)


def write(buffer: Buffer, layer: Any, new: Float[Array, "B T K H"], at: Int[Array, "B T"]) -> Buffer:
    """Put the new rows at their own slots; what would fall beyond the last slot is dropped."""
    rows, new = jnp.arange(at.shape[0])[:, None], pack(new, dtype_of(buffer))
    if isinstance(buffer, tuple):
        put = jax.tree.map(lambda whole, part: whole.at[rows, :, at].set(part, mode="drop"), buffer[layer], new)
        return (*buffer[:layer], put, *buffer[layer + 1 :])
    return jax.tree.map(lambda whole, part: whole.at[layer, rows, :, at].set(part, mode="drop"), buffer, new)


def advance(cache: Cache, segments: Int[Array, "B T"]) -> Cache:
    """Count the real new tokens; padding written beyond them is overwritten by the next ones."""
    return replace(cache, length=cache.length + (segments > 0).sum(1).astype(jnp.int32))


def reorder(cache: Cache, parents: Int[Array, "B"]) -> Cache:
    """Row b goes on from what row parents[b] holds (of the same prompt).

    Block by block of slots, so that slots nobody has filled are not copied.
    """
    block = math.gcd(BLOCK, cache.slots)  # whole blocks: one that overlaps another would be moved twice
    filled = cache.length.max()

    def body(i: Int[Array, ""], buffers: Any) -> Any:
        start = i * block

        def move(x: Array) -> Array:
            part = jax.lax.dynamic_slice_in_dim(x, start, block, axis=x.ndim - 2)
            return jax.lax.dynamic_update_slice_in_dim(x, jnp.take(part, parents, axis=-4), start, axis=x.ndim - 2)

        return jax.tree.map(move, buffers)

    k, v = jax.lax.fori_loop(0, -(-filled // block), body, (cache.k, cache.v))
    return replace(cache, k=k, v=v, length=cache.length[parents])
