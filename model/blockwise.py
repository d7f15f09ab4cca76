"""Attention by blocks of queries and keys, forwards and backwards (arXiv 2205.14135, 2112.05682).

The scores of a block are made, used and forgotten: memory is linear in both lengths. Blocks that the mask forbids are
left out. Keys may lie on a ring of devices, and travel round it (arXiv 2310.01889).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name as keep
from jaxtyping import Array, Float

from model.mask import Columns, Mask, dense
from model.scores import heads_of, masked_scores, rows_of, sink_rows
from sharding.place import ALONE, Split, is_local
from sharding.platform import platform

BLOCKS = {"cpu": (256, 256)}  # queries and keys of a block at most: measured (tests/bench/attention.py);
LARGE = 1024, 512  # elsewhere
WHOLE = 256  # up to so many are one block
MOST = 2**28  # scores at once, if rows can be parted: a GiB in float32


@dataclass(frozen=True)
class How:
    """What is known before any number is: lengths of blocks, over which devices keys travel, whether blocks of which
    nothing may be seen are looked for."""

    queries: int
    keys: int
    ring: Split
    causal: bool
    softcap: float | None
    skips: bool


def blockwise(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    softcap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    ring: Split = ALONE,
) -> Float[Array, "B T N V"]:
    """softmax(q k^T / sqrt(H)) v under the mask, softcap and sinks as in attend.

    ring: all that is given is a device's own part of the rows, within a shard_map over the ring's axes.
    """
    T = q.shape[1]
    queries, keys = map(_length, (T, k.shape[1]), BLOCKS.get(platform(), LARGE))
    several = queries < T or keys < k.shape[1] or ring.size > 1
    how = How(queries, keys, ring, mask.causal, softcap, several and is_local())
    # what is added is of segment 0: seen by nobody
    to_queries, to_keys = partial(_padded, size=queries), partial(_padded, size=keys)
    at, of = jax.tree.map(to_queries, mask.queries), jax.tree.map(to_keys, mask.keys)
    given = to_queries(q), to_keys(k), to_keys(v), at, of

    def some(given: Any) -> Any:
        return _blockwise(*given, mask.window, sinks, how)

    if how.skips and (pieces := _pieces(q.shape[0], q.shape[2] * queries * keys)) > 1:
        apart = jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), given)
        out = jax.lax.map(some, apart)
        return out.reshape(-1, *out.shape[2:])[:, :T]
    return some(given)[:, :T]


def _pieces(rows: int, scores: int) -> int:
    """Into how many parts rows go, that blocks of so many scores each are not too much at once."""
    return next((n for n in range(1, rows) if rows % n == 0 and rows // n * scores <= MOST), max(rows, 1))


def _length(n: int, most: int) -> int:
    """Of a block of n queries or keys: two or more of like length, that a causal mask has some to forbid."""
    return n if n <= WHOLE else -(-n // max(2, -(-n // most)))


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def _blockwise(q: Any, k: Any, v: Any, at: Columns, of: Columns, window: Any, sinks: Any, how: How) -> Array:
    return _forward(q, k, v, at, of, window, sinks, how)[0]


def _forward(q: Any, k: Any, v: Any, at: Columns, of: Columns, window: Any, sinks: Any, how: How) -> Any:
    wide, K = jnp.promote_types(q.dtype, jnp.float32), k.shape[2]
    at, of, window = _behind(q, (at, of, window))
    rows, places, kv = _rows(q, K, how.queries), _cut(at, how.queries), _cut((k, v, of), how.keys)

    def see(states: Any, kv: Any, _: Any) -> Any:
        def some(_: None, part: Any) -> Any:
            def block(state: Any, piece: Any) -> Any:
                kb, vb, ids = piece
                allowed = _allowed(part[1], ids, window, how)

                def add(state: Any) -> Any:
                    top, total, out = state
                    scores = masked_scores(part[0], kb, allowed, how.softcap)
                    new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
                    shrink, probs = jnp.exp(top - new_top), jnp.exp(scores - new_top)
                    more = jnp.einsum("BKQS,BSKH->BKQH", probs.astype(v.dtype), vb, preferred_element_type=wide)
                    return new_top, total * shrink + probs.sum(-1, keepdims=True), out * shrink + more

                return _unless_forbidden(allowed, how, add, lambda state: state, state), None

            return None, jax.lax.scan(block, part[2], kv)[0]

        return jax.lax.scan(some, None, (rows, places, states))[1], None

    shape = (*rows.shape[:-1], 1)
    top, total = jnp.full(shape, jnp.finfo(wide).min, wide), jnp.zeros(shape, wide)
    if sinks is not None:  # the first key that all have seen
        top, total = jnp.broadcast_to(sink_rows(sinks, K, how.queries, wide)[None], shape), jnp.ones(shape, wide)
    start = (top, total, jnp.zeros((*rows.shape[:-1], v.shape[-1]), wide))
    (top, total, out), _ = _travel(see, start, kv, None, how.ring)
    total = jnp.where(total > 0, total, 1)  # of queries that see no key
    out = keep((out / total).astype(v.dtype), "attention")
    log_sum = keep(jnp.log(total) + top, "attention")
    return _heads(out, how.queries), (q, k, v, at, of, window, sinks, out, log_sum)


def _backward(how: How, kept: Any, g: Any) -> Any:
    """The probabilities are made again, from each row's log-sum."""
    q, k, v, at, of, window, sinks, out, log_sum = kept
    wide, K = log_sum.dtype, k.shape[2]
    at, of, window = _behind(g, (at, of, window))
    rows, gs, places = _rows(q, K, how.queries), _rows(g, K, how.queries), _cut(at, how.queries)
    share = (gs.astype(wide) * out.astype(wide)).sum(-1, keepdims=True)
    kv = _cut((k, v, of), how.keys)

    def see(dq: Any, kv: Any, dkv: Any) -> Any:
        def some(dkv: Any, part: Any) -> Any:
            r, g, s, z, ids, dq = part

            def block(dq: Any, piece: Any) -> Any:
                (kb, vb, of), dkv = piece
                allowed = _allowed(ids, of, window, how)

                def add(dq: Any, dkv: Any) -> Any:
                    scores = masked_scores(r, kb, allowed, how.softcap)
                    probs = jnp.exp(scores - z)
                    ds = probs * (jnp.einsum("BKQH,BSKH->BKQS", g, vb, preferred_element_type=wide) - s)
                    if how.softcap is not None:  # the slope of tanh; masked scores have no probability
                        ds = ds * (1 - jnp.square(jnp.maximum(scores, -how.softcap) / how.softcap))
                    ds = (ds * r.shape[-1] ** -0.5).astype(r.dtype)
                    dk = jnp.einsum("BKQS,BKQH->BSKH", ds, r, preferred_element_type=wide)
                    dv = jnp.einsum("BKQS,BKQH->BSKH", probs.astype(g.dtype), g, preferred_element_type=wide)
                    more = jnp.einsum("BKQS,BSKH->BKQH", ds, kb, preferred_element_type=wide)
                    return dq + more, (dkv[0] + dk, dkv[1] + dv)

                return _unless_forbidden(allowed, how, add, lambda *same: same, dq, dkv)

            return jax.lax.scan(block, dq, (kv, dkv))[::-1]

        return jax.lax.scan(some, dkv, (rows, gs, share, log_sum, places, dq))[::-1]

    zeros = lambda x: jnp.zeros(x.shape, wide)  # noqa: E731
    dq, dkv = _travel(see, zeros(rows), kv, (zeros(kv[0]), zeros(kv[1])), how.ring)
    dk, dv = jax.tree.map(_joined, dkv)
    dsinks = None
    if sinks is not None:
        lost = jnp.exp(sink_rows(sinks, K, how.queries, wide)[None] - log_sum) * share
        dsinks = -lost.reshape(*lost.shape[:2], q.shape[2], -1).sum((0, 1, 3)).astype(sinks.dtype)
    dq = _heads(dq, how.queries)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, None, dsinks


_blockwise.defvjp(_forward, _backward)


def _behind(x: Array, tree: Any) -> Any:
    """The same, as if it came of x.

    Masks are alike for all layers: a scan over these would make those of all blocks before its first step, and keep
    them.
    """
    return jax.lax.optimization_barrier((tree, x[(0,) * x.ndim]))[0]


def _unless_forbidden(allowed: Array, how: How, add: Any, same: Any, *state: Any) -> Any:
    return jax.lax.cond(allowed.any(), add, same, *state) if how.skips else add(*state)


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


def _padded(x: Array, size: int) -> Array:
    """[B, T, ..] with zeros behind, a multiple of size."""
    more = -x.shape[1] % size
    return jnp.pad(x, ((0, 0), (0, more), *((0, 0),) * (x.ndim - 2))) if more else x


def _rows(x: Array, K: int, size: int) -> Array:
    """[B, T, N, H] -> [T / size, B, K, G size, H]: rows_of each block."""
    return jax.vmap(partial(rows_of, K=K))(_cut(x, size))


def _heads(rows: Array, size: int) -> Array:
    """The inverse of _rows."""
    return _joined(jax.vmap(partial(heads_of, T=size))(rows))


def _cut(tree: Any, size: int) -> Any:
    """[B, S, ..] -> [S / size, B, size, ..], all of a tree."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1), tree)


def _joined(x: Array) -> Array:
    """The inverse of _cut, of an array."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def _allowed(at: Columns, of: Columns, window: Any, how: How) -> Array:
    return dense(Mask(at[0], of[0], at[1], of[1], window, at[2], of[2], how.causal))
