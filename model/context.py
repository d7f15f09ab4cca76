"""Attention over a mesh: rows whose tokens lie on several devices (context parallelism), kernels that see one device.

ring: keys and values travel round the devices (arXiv 2310.01889), and every device adds what its queries see of them;
device i of c has the pieces i and 2c - 1 - i of 2c of a row, so that all have as much to do under a causal mask.
ulysses: tokens are exchanged for heads and back (arXiv 2309.14509), and every device has whole rows of its heads.
"""

import logging
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name as keep
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from configs.errors import UsageError
from model.architecture import Architecture
from model.attention import CHUNK, attend, heads_of, masked_scores, rows_of, sink_rows
from model.compute import Compute
from model.mask import Mask, dense
from model.splash import BLOCKS, refusal, splash
from sharding.place import Split, per_device, split
from sharding.platform import platform

log = logging.getLogger("purestep")

Columns = tuple[Any, Any, Any]  # positions, segments, branches or None: of the queries, or of the keys


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
    if backend not in ("ring", "ulysses", "splash"):
        return attend(q, k, v, mask, backend, softcap, sinks)
    if heads.size > 1 and k.shape[2] != q.shape[2] and split(rules, "kv_heads") != heads:
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))  # kv heads whole: one for each q head
    _check(backend, q, k, mask, sinks, context, heads)
    mine = {"ring": _ring, "ulysses": _ulysses, "splash": _splash}[backend]
    columns = (
        (mask.q_positions, mask.q_segments, mask.q_branches),
        (
            mask.kv_positions,
            mask.kv_segments,
            mask.kv_branches,
        ),
    )
    fn = partial(mine, mask=mask, softcap=softcap, context=context)
    if jax.sharding.get_abstract_mesh().empty:
        return fn(q, k, v, *columns, mask.window, sinks)
    rows, axes = split(rules, "batch").axes, P(split(rules, "batch").axes, context.axes, heads.axes, None)
    ids = P(rows, context.axes)
    return per_device(fn, (axes, axes, axes, ids, ids, P(), P(heads.axes)), axes)(q, k, v, *columns, mask.window, sinks)


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


def _splash(q: Any, k: Any, v: Any, at: Columns, of: Columns, window: Any, sinks: Any, *, mask: Mask, softcap: Any,
            context: Split) -> Array:  # fmt: skip
    return splash(q, k, v, _mask(mask, at, of, window), softcap)


def _mask(like: Mask, at: Columns, of: Columns, window: Any) -> Mask:
    return Mask(at[0], of[0], at[1], of[1], window, at[2], of[2], like.causal, like.windows)


def _ulysses(q: Any, k: Any, v: Any, at: Columns, of: Columns, window: Any, sinks: Any, *, mask: Mask, softcap: Any,
             context: Split) -> Array:  # fmt: skip
    swap = lambda x, a, b: jax.lax.all_to_all(x, context.axes, a, b, tiled=True) if context.size > 1 else x  # noqa: E731
    whole = lambda x: jax.lax.all_gather(x, context.axes, axis=1, tiled=True) if context.size > 1 else x  # noqa: E731
    q, k, v = (swap(x, 2, 1) for x in (q, k, v))
    at, of = jax.tree.map(whole, (at, of))
    if sinks is not None and context.size > 1:
        sinks = jax.lax.dynamic_slice_in_dim(sinks, jax.lax.axis_index(context.axes) * q.shape[2], q.shape[2])
    rows = _mask(mask, at, of, window)
    out = (
        splash(q, k, v, rows, softcap)
        if _splashes(q, k, rows, sinks)
        else attend(q, k, v, rows, "auto", softcap, sinks)
    )
    return swap(out, 1, 2)


def _ring(q: Any, k: Any, v: Any, at: Columns, of: Columns, window: Any, sinks: Any, *, mask: Mask, softcap: Any,
          context: Split) -> Array:  # fmt: skip
    return _round(q, k, v, at, of, window, sinks, softcap, context, mask.causal)


@partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def _round(
    q: Any, k: Any, v: Any, at: Columns, of: Columns, window: Any, sinks: Any, softcap: Any, ring: Split, causal: bool
) -> Array:
    """Attention of this device's queries to all devices' keys; the backward pass makes the probabilities again."""
    return _round_forward(q, k, v, at, of, window, sinks, softcap, ring, causal)[0]


def _round_forward(
    q: Any, k: Any, v: Any, at: Columns, of: Columns, window: Any, sinks: Any, softcap: Any, ring: Split, causal: bool
) -> Any:
    wide, K, size = jnp.promote_types(q.dtype, jnp.float32), k.shape[2], q.shape[1] // 2
    rows, places = _halves(q, K), _cut(at, size)

    def see(states: Any, kv: Any, _: Any) -> Any:
        def half(_: None, part: Any) -> Any:
            def block(state: Any, piece: Any) -> Any:
                kb, vb, ids = piece
                allowed = _allowed(part[1], ids, window, causal)

                def add(state: Any) -> Any:
                    top, total, out = state
                    scores = masked_scores(part[0], kb, allowed, softcap)
                    new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
                    shrink, probs = jnp.exp(top - new_top), jnp.exp(scores - new_top)
                    more = jnp.einsum("BKQS,BSKH->BKQH", probs.astype(v.dtype), vb, preferred_element_type=wide)
                    return new_top, total * shrink + probs.sum(-1, keepdims=True), out * shrink + more

                return jax.lax.cond(allowed.any(), add, lambda state: state, state), None

            return None, jax.lax.scan(block, part[2], _pieces(kv))[0]

        return jax.lax.scan(half, None, (rows, places, states))[1], None

    shape = (*rows.shape[:-1], 1)
    top, total = jnp.full(shape, jnp.finfo(wide).min, wide), jnp.zeros(shape, wide)
    if sinks is not None:  # the first key that all have seen
        top, total = jnp.broadcast_to(sink_rows(sinks, K, size, wide)[None], shape), jnp.ones(shape, wide)
    start = (top, total, jnp.zeros((*rows.shape[:-1], v.shape[-1]), wide))
    (top, total, out), _ = _travel(see, start, (k, v, of), None, ring)
    total = jnp.where(total > 0, total, 1)  # of queries that see no key
    out = keep((out / total).astype(v.dtype), "attention")
    log_sum = keep(jnp.log(total) + top, "attention")
    return _whole(out, size), (q, k, v, at, of, window, sinks, out, log_sum)


def _round_backward(softcap: Any, ring: Split, causal: bool, kept: Any, g: Any) -> Any:
    q, k, v, at, of, window, sinks, out, log_sum = kept
    wide, K, size = log_sum.dtype, k.shape[2], q.shape[1] // 2
    rows, gs, places = _halves(q, K), _halves(g, K), _cut(at, size)
    share = (gs.astype(wide) * out.astype(wide)).sum(-1, keepdims=True)

    def see(dq: Any, kv: Any, dkv: Any) -> Any:
        def half(dkv: Any, part: Any) -> Any:
            r, g, s, z, ids, dq = part

            def block(dq: Any, piece: Any) -> Any:
                (kb, vb, of), dkv = piece
                allowed = _allowed(ids, of, window, causal)

                def add(dq: Any, dkv: Any) -> Any:
                    scores = masked_scores(r, kb, allowed, softcap)
                    probs = jnp.exp(scores - z)
                    ds = probs * (jnp.einsum("BKQH,BSKH->BKQS", g, vb, preferred_element_type=wide) - s)
                    if softcap is not None:  # the slope of tanh; masked scores have no probability
                        ds = ds * (1 - jnp.square(jnp.maximum(scores, -softcap) / softcap))
                    ds = (ds * r.shape[-1] ** -0.5).astype(r.dtype)
                    dk = jnp.einsum("BKQS,BKQH->BSKH", ds, r, preferred_element_type=wide)
                    dv = jnp.einsum("BKQS,BKQH->BSKH", probs.astype(g.dtype), g, preferred_element_type=wide)
                    more = jnp.einsum("BKQS,BSKH->BKQH", ds, kb, preferred_element_type=wide)
                    return dq + more, (dkv[0] + dk, dkv[1] + dv)

                return jax.lax.cond(allowed.any(), add, lambda *same: same, dq, dkv)

            dq, pieces = jax.lax.scan(block, dq, (_pieces(kv), _pieces(dkv)))
            return jax.tree.map(_joined, pieces), dq

        return jax.lax.scan(half, dkv, (rows, gs, share, log_sum, places, dq))[::-1]

    zeros = lambda x: jnp.zeros(x.shape, wide)  # noqa: E731
    dq, (dk, dv) = _travel(see, zeros(rows), (k, v, of), (zeros(k), zeros(v)), ring)
    dsinks = None
    if sinks is not None:
        lost = jnp.exp(sink_rows(sinks, K, size, wide)[None] - log_sum) * share
        dsinks = -lost.reshape(2, q.shape[0], q.shape[2], size).sum((0, 1, 3)).astype(sinks.dtype)
    return _whole(dq, size).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, None, dsinks


_round.defvjp(_round_forward, _round_backward)


def _travel(see: Any, carry: Any, kv: Any, more: Any, ring: Split) -> tuple[Any, Any]:
    """see(carry, kv, more) -> (carry, more) at every device in turn: kv is sent on while it is worked with, more behind
    it; more comes home."""
    send = partial(jax.tree.map, lambda x: _send(x, ring))

    def turn(state: Any, _: None) -> Any:
        carry, kv, more = state
        coming = send(kv)
        carry, more = see(carry, kv, more)
        return (carry, coming, send(more)), None

    if ring.size > 1:
        (carry, kv, more), _ = jax.lax.scan(turn, (carry, kv, more), None, length=ring.size - 1)
    carry, more = see(carry, kv, more)
    return carry, send(more)


def _send(x: Array, ring: Split) -> Array:
    if ring.size == 1:
        return x
    return jax.lax.ppermute(x, ring.axes, [(i, (i + 1) % ring.size) for i in range(ring.size)])


def _halves(x: Array, K: int) -> Array:
    """[B, T, N, H] -> [2, B, K, GT/2, H]: the two pieces of a row."""
    return jnp.stack([rows_of(half, K) for half in jnp.split(x, 2, axis=1)])


def _whole(halves: Array, size: int) -> Array:
    """The inverse of _halves."""
    return jnp.concatenate([heads_of(half, size) for half in halves], axis=1)


def _cut(tree: Any, size: int) -> Any:
    """[B, S, ..] -> [S/size, B, size, ..], all of a tree."""
    return jax.tree.map(lambda x: jnp.stack(jnp.split(x, x.shape[1] // size, axis=1)), tree)


def _pieces(kv: Any) -> Any:
    """[B, S, ..] -> [n, B, S/n, ..], of CHUNK keys where that divides a device's piece of a row."""
    size = jax.tree.leaves(kv)[0].shape[1] // 2
    size = CHUNK if size % CHUNK == 0 else size
    return _cut(kv, size)


def _joined(x: Array) -> Array:
    """The inverse of _pieces, of an array."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def _allowed(at: Columns, of: Columns, window: Any, causal: bool) -> Array:
    return dense(Mask(at[0], of[0], at[1], of[1], window, at[2], of[2], causal))


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
