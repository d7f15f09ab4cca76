"""Attention over a mesh: rows whose tokens lie on several devices (context parallelism), kernels that see one device.

ring: keys and values travel round the devices, and every device adds what its queries see of them (model/blockwise.py);
device i of c has the pieces i and 2c - 1 - i of 2c of a row, so that all have as much to do under a causal mask.
ulysses: tokens are exchanged for heads and back (arXiv 2309.14509), and every device has whole rows of its heads.
"""

import logging
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from configs.errors import UsageError
from model.architecture import Architecture
from model.attention import attend, choose
from model.blockwise import WHOLE, blockwise
from model.compute import Compute
from model.mask import Mask
from model.splash import BLOCKS, refusal, splash
from sharding.place import Split, is_local, per_device, split
from sharding.platform import platform
from sharding.rules import Rules

log = logging.getLogger("purestep")


def attend_over(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    compute: Compute,
    softcap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
) -> Float[Array, "B T N V"]:
    """attend, over the mesh in context: auto is ring where rows are split, else splash on TPUs where it can serve."""
    rules, backend = compute.rules, compute.attention
    context, heads = split(rules, "seq"), split(rules, "heads")
    if backend == "auto":
        backend = _choose(context.size, rings(compute, q.shape[1]), _splashes(q, k, mask, sinks))
    if backend == "auto":
        backend = choose(q.shape[1], k.shape[1], softcap is None and sinks is None)
    if backend not in OVER or (backend == "chunked" and not _apart(q, k, rules)):
        return attend(q, k, v, mask, backend, softcap, sinks)
    if heads.size > 1 and k.shape[2] != q.shape[2] and split(rules, "kv_heads") != heads:
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))  # kv heads whole: one for each q head
    _check(backend, q, k, mask, sinks, context, heads)
    columns, form = jax.tree.flatten(mask)

    def mine(q: Any, k: Any, v: Any, columns: Any, sinks: Any) -> Array:
        return OVER[backend](q, k, v, jax.tree.unflatten(form, columns), softcap, sinks, context)

    if jax.sharding.get_abstract_mesh().empty:
        return mine(q, k, v, columns, sinks)
    rows = split(rules, "batch").axes
    axes, ids = P(rows, context.axes, heads.axes, None), P(rows, context.axes)
    specs = [ids if jnp.ndim(column) else P() for column in columns]  # a window is a number
    return per_device(mine, (axes, axes, axes, specs, P(heads.axes)), axes)(q, k, v, columns, sinks)


def _apart(q: Array, k: Array, rules: Rules) -> bool:
    """Whether each device of the mesh in context has rows and heads of its own, and several blocks to look through."""
    parts = [split(rules, name).size for name in ("batch", "seq", "heads")]
    even = all(size % part == 0 for size, part in ((q.shape[0], parts[0]), (q.shape[2], parts[2])))
    return max(parts) > 1 and parts[1] == 1 and even and max(q.shape[1], k.shape[1]) > WHOLE and not is_local()


def rings(compute: Compute, length: int) -> bool:
    """Whether rows of this length go round a ring, if nobody says otherwise."""
    size = split(compute.rules, "seq").size
    return compute.attention in ("auto", "ring") and size > 1 and length % (2 * size) == 0


@cache
def _choose(context: int, rings: bool, splashes: bool) -> str:
    choice = "ring" if rings else "splash" if splashes and context == 1 else "auto"
    if choice != "auto":
        log.info("attention: auto chose '%s' (%s, mesh.context=%s)", choice, platform(), context)
    return choice


def _splashes(q: Array, k: Array, mask: Mask, sinks: Any) -> bool:
    return platform() == "tpu" and refusal(q, k, mask, sinks) is None


def _check(backend: str, q: Array, k: Array, mask: Mask, sinks: Any, context: Split, heads: Split) -> None:
    """Refuse what a backend that was asked for by name cannot do."""
    why = None
    if backend == "splash":
        why = refusal(q, k, mask, sinks)
        if context.size > 1:
            why = f"has whole rows only, and mesh.context is {context.size}: ring and ulysses serve it"
    elif q.shape[1] != k.shape[1] or q.shape[1] % (2 * context.size):
        why = f"wants rows of a multiple of 2 x mesh.context = {2 * context.size} tokens, not {q.shape[1]}"
    elif backend == "ulysses" and (q.shape[2] % (parts := heads.size * context.size) or k.shape[2] % parts):
        why = f"wants heads, and kv heads, that divide over mesh.tensor x mesh.context = {parts}; ring does not"
    if why:
        raise UsageError(f"model.attention: '{backend}' {why}")


def check_rows(arch: Architecture, compute: Compute, length: int) -> None:
    """Refuse, before anything is compiled, rows that the mesh in context cannot split, or heads."""
    context, heads, backend = split(compute.rules, "seq"), split(compute.rules, "heads").size, compute.attention
    if length % (parts := 2 * context.size) and (context.size > 1 or backend in ("ring", "ulysses")):
        raise UsageError(f"data.max_length {length} is not a multiple of 2 x mesh.context = {parts}")
    if backend == "splash" and (context.size > 1 or length % BLOCKS[-1]):
        raise UsageError(
            f"model.attention: 'splash' wants whole rows of a multiple of {BLOCKS[-1]} tokens: data.max_length is "
            f"{length}, mesh.context {context.size}"
        )
    kinds = {"heads": arch.num_heads, "kv heads": arch.num_heads if arch.latent else arch.num_kv_heads}
    for kind, count in kinds.items():
        if backend == "ulysses" and count % (parts := heads * context.size):
            raise UsageError(
                f"model.attention: 'ulysses' splits heads over mesh.tensor x mesh.context = {parts}, and the model has "
                f"{count} {kind}: ring does not"
            )


def _splash(q: Any, k: Any, v: Any, mask: Mask, softcap: Any, sinks: Any, context: Split) -> Array:
    return splash(q, k, v, mask, softcap)


def _ulysses(q: Any, k: Any, v: Any, mask: Mask, softcap: Any, sinks: Any, context: Split) -> Array:
    swap = lambda x, a, b: jax.lax.all_to_all(x, context.axes, a, b, tiled=True) if context.size > 1 else x  # noqa: E731
    whole = lambda x: jax.lax.all_gather(x, context.axes, axis=1, tiled=True) if jnp.ndim(x) else x  # noqa: E731
    q, k, v = (swap(x, 2, 1) for x in (q, k, v))
    if context.size > 1:
        mask = jax.tree.map(whole, mask)
    if sinks is not None and context.size > 1:
        sinks = jax.lax.dynamic_slice_in_dim(sinks, jax.lax.axis_index(context.axes) * q.shape[2], q.shape[2])
    if _splashes(q, k, mask, sinks):
        return swap(splash(q, k, v, mask, softcap), 1, 2)
    return swap(attend(q, k, v, mask, "auto", softcap, sinks), 1, 2)


# within a shard_map
OVER = {"ring": blockwise, "chunked": blockwise, "ulysses": _ulysses, "splash": _splash}


def zigzag(compute: Compute, *columns: Any) -> tuple[Any, ...]:
    """Columns [B, T] in the order in which rings have them, where one is to come: to be undone by `straight`."""
    if not rings(compute, columns[0].shape[1]):
        return columns
    move = lambda x: None if x is None else _reorder(x, compute, ("batch", "seq"), _zigzag)  # noqa: E731
    return tuple(move(x) for x in columns)


def straight(compute: Compute, hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Hidden states in the order of the row again."""
    if not rings(compute, hidden.shape[1]):
        return hidden
    return _reorder(hidden, compute, ("batch", "seq", "width"), _straight)


def _reorder(x: Array, compute: Compute, logical: tuple[str, ...], how: Any) -> Array:
    axes = P(*(split(compute.rules, name).axes for name in logical))
    return per_device(partial(how, ring=split(compute.rules, "seq")), (axes,), axes, typed=True)(x)


def _homes(c: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """From where to where a device's two pieces go: of 2c pieces of a row, the even and the odd ones."""
    home = lambda p: p if p < c else 2 * c - 1 - p  # noqa: E731
    return [(i, home(2 * i)) for i in range(c)], [(i, home(2 * i + 1)) for i in range(c)]


def _zigzag(x: Array, ring: Split) -> Array:
    first, second = (
        jax.lax.ppermute(piece, ring.axes, moves)
        for piece, moves in zip(jnp.split(x, 2, axis=1), _homes(ring.size), strict=True)
    )
    return _crossed(first, second, ring)


def _straight(x: Array, ring: Split) -> Array:
    first, second = jnp.split(x, 2, axis=1)
    pieces = jnp.split(_crossed(first, second, ring), 2, axis=1)
    back = [[(there, here) for here, there in moves] for moves in _homes(ring.size)]
    moved = [jax.lax.ppermute(piece, ring.axes, moves) for piece, moves in zip(pieces, back, strict=True)]
    return jnp.concatenate(moved, axis=1)


def _crossed(first: Array, second: Array, ring: Split) -> Array:
    """Both behind each other, on odd devices the other way round."""
    odd = jax.lax.axis_index(ring.axes) % 2 == 1
    return jnp.where(odd, jnp.concatenate([second, first], 1), jnp.concatenate([first, second], 1))
