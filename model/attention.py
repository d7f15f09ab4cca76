"""attend(q, k, v, mask, backend): one signature, several ways to compute it."""

import logging
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name as keep
from jaxtyping import Array, Bool, Float

from model.mask import Mask, dense
from sharding.platform import platform

log = logging.getLogger("purestep")

BACKENDS = ("auto", "reference", "xla", "chunked")  # those over a mesh, and splash: model/context.py
CHUNK = 512  # keys per block of the chunked backend,
WHOLE = 2048 * 2048  # which takes up to this many scores per head in one block


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    backend: str = "auto",
    softcap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
) -> Float[Array, "B T N V"]:
    """softmax(q k^T / sqrt(H)) v under the mask, with grouped heads; a query that sees no key gets finite rubbish.

    softcap c: the scores are c tanh(scores / c), as in Gemma 2. sinks: of each head the score of one more key, whose
    value is 0, as in gpt-oss.
    """
    plain = softcap is None and sinks is None
    if backend == "auto":
        backend = _choose(platform(), q.shape[1] * k.shape[1] > WHOLE or not plain)
    if backend == "reference":
        return _reference(q, k, v, mask, softcap, sinks)
    if backend == "xla":
        if not plain:
            raise ValueError("attention backend 'xla' has no soft cap of scores, no sinks; reference and chunked have")
        short = q.shape[-1] - v.shape[-1]  # it wants values as long as keys
        padded = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, short))) if short else v
        out = jax.nn.dot_product_attention(q, k, padded, mask=dense(mask)[:, None], implementation="xla")
        return out[..., : v.shape[-1]]
    if backend == "chunked":
        return _chunked(q, k, v, mask, softcap, sinks)
    raise ValueError(f"attention backend '{backend}' is unknown; allowed: {', '.join(BACKENDS)}")


@cache
def _choose(platform: str, long: bool) -> str:
    choice = "chunked" if long or platform == "cpu" else "xla"
    why = "long, capped or with sinks" if long else "short context"
    log.info("attention: auto chose '%s' (%s, %s)", choice, platform, why)
    return choice


def rows_of(x: Float[Array, "B T N H"], K: int) -> Float[Array, "B K GT H"]:
    """A kv head's queries (G of them x T) as rows of one matrix."""
    B, T, N, H = x.shape
    return x.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)


def heads_of(rows: Float[Array, "B K GT H"], T: int) -> Float[Array, "B T N H"]:
    """The inverse of rows_of."""
    B, K, GT, H = rows.shape
    return rows.reshape(B, K, GT // T, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, -1, H)


def masked_scores(
    rows: Float[Array, "B K GT H"], k: Float[Array, "B S K H"], allowed: Bool[Array, "B T S"], softcap: float | None
) -> Float[Array, "B K GT S"]:
    """Masked, scaled and perhaps capped scores in float32 at least."""
    B, K, GT, H = rows.shape
    T, S = allowed.shape[1:]
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    scores = jnp.einsum("BKQH,BSKH->BKQS", rows * jnp.asarray(H**-0.5, rows.dtype), k, preferred_element_type=wide)
    scores = capped(scores, softcap)
    grouped = jnp.where(allowed[:, None, None], scores.reshape(B, K, GT // T, T, S), jnp.finfo(wide).min)
    return grouped.reshape(B, K, GT, S)


def capped(scores: Float[Array, "*B S"], cap: float | None) -> Float[Array, "*B S"]:
    """cap * tanh(scores / cap), or without a cap the scores."""
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def sink_rows(sinks: Array, K: int, T: int, dtype: Any) -> Float[Array, "1 K GT 1"]:
    """The sinks of the rows of rows_of."""
    return jnp.repeat(sinks.reshape(1, K, -1, 1), T, axis=2).astype(dtype)


def _reference(q: Array, k: Array, v: Array, mask: Mask, softcap: float | None, sinks: Array | None) -> Array:
    """As the formula says, differentiated by jax: what the other backends are held against."""
    scores = masked_scores(rows_of(q, k.shape[2]), k, dense(mask), softcap)
    if sinks is not None:
        sink = sink_rows(sinks, k.shape[2], q.shape[1], scores.dtype)
        scores = jnp.concatenate([scores, jnp.broadcast_to(sink, (*scores.shape[:-1], 1))], axis=-1)
    probs = jax.nn.softmax(scores, axis=-1)[..., : k.shape[1]].astype(v.dtype)
    return heads_of(jnp.einsum("BKQS,BSKH->BKQH", probs, v), q.shape[1])


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _weighted(rows: Array, k: Array, v: Array, allowed: Array, sink: Array | None, softcap: float | None) -> Array:
    """softmax(scores) v; the backward pass makes the probabilities again from each row's log-sum (arXiv 2205.14135)."""
    return _weighted_forward(rows, k, v, allowed, sink, softcap)[0]


def _weighted_forward(
    rows: Array, k: Array, v: Array, allowed: Array, sink: Array | None, softcap: float | None
) -> Any:
    scores = masked_scores(rows, k, allowed, softcap)
    top = scores.max(-1, keepdims=True)
    top = top if sink is None else jnp.maximum(top, sink)
    probs = jnp.exp(scores - top)
    total = probs.sum(-1, keepdims=True) + (0 if sink is None else jnp.exp(sink - top))
    out = jnp.einsum("BKQS,BSKH->BKQH", (probs / total).astype(v.dtype), v)
    out, log_sum = keep(out, "attention"), keep(jnp.log(total) + top, "attention")
    return out, (rows, k, v, allowed, sink, out, log_sum)


def _weighted_backward(softcap: float | None, kept: Any, g: Array) -> Any:
    rows, k, v, allowed, sink, out, log_sum = kept
    wide = log_sum.dtype
    scores = masked_scores(rows, k, allowed, softcap)
    probs = jnp.exp(scores - log_sum)
    share = (g.astype(wide) * out.astype(wide)).sum(-1, keepdims=True)
    dp = jnp.einsum("BKQH,BSKH->BKQS", g, v, preferred_element_type=wide)
    ds = probs * (dp - share) * rows.shape[-1] ** -0.5
    if softcap is not None:  # the slope of tanh; masked scores, far outside it, have no probability
        ds = ds * (1 - jnp.square(jnp.maximum(scores, -softcap) / softcap))
    ds = ds.astype(rows.dtype)
    dv = jnp.einsum("BKQS,BKQH->BSKH", probs.astype(v.dtype), g)
    dsink = None if sink is None else -(jnp.exp(sink - log_sum) * share).sum(0, keepdims=True)
    return jnp.einsum("BKQS,BSKH->BKQH", ds, k), jnp.einsum("BKQS,BKQH->BSKH", ds, rows), dv, None, dsink


_weighted.defvjp(_weighted_forward, _weighted_backward)


def _chunked(q: Array, k: Array, v: Array, mask: Mask, softcap: float | None, sinks: Array | None) -> Array:
    """One lean block, or online softmax over blocks of keys (arXiv 2112.05682): memory linear in S both ways."""
    S = k.shape[1]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    sink = None if sinks is None else sink_rows(sinks, k.shape[2], q.shape[1], wide)
    if q.shape[1] * S <= WHOLE:
        return heads_of(_weighted(rows_of(q, k.shape[2]), k, v, dense(mask), sink, softcap), q.shape[1])
    size = min(CHUNK, S)
    pad = -S % size
    if pad:  # padded keys are of segment 0: nobody sees them
        k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (k, v))
        mask = mask.padded(pad)
    B, T, N, _ = q.shape
    K = k.shape[2]
    grouped = rows_of(q, K)

    @jax.checkpoint
    def block(carry: tuple[Array, Array, Array], start: Array) -> tuple[tuple[Array, Array, Array], None]:
        top, total, out = carry
        kb, vb = (jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in (k, v))
        scores = masked_scores(grouped, kb, dense(mask.keys(start, size)), softcap)
        new_top = jnp.maximum(top, scores.max(-1))
        shrink = jnp.exp(top - new_top)
        probs = jnp.exp(scores - new_top[..., None])
        out = out * shrink[..., None] + jnp.einsum("BKQS,BSKH->BKQH", probs.astype(v.dtype), vb)
        return (new_top, total * shrink + probs.sum(-1), out), None

    rows = (B, K, N // K * T)
    top, total = jnp.full(rows, jnp.finfo(wide).min), jnp.zeros(rows, wide)
    if sink is not None:  # the first key that all have seen
        top, total = jnp.broadcast_to(sink[..., 0], rows), jnp.ones(rows, wide)
    start = (top, total, jnp.zeros((*rows, v.shape[-1]), wide))
    (_, total, out), _ = jax.lax.scan(block, start, jnp.arange(0, S + pad, size))
    return heads_of((out / total[..., None]).astype(v.dtype), T)
