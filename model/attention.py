"""attend(q, k, v, mask, backend): one signature, several ways to compute it."""

import logging
from functools import cache

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from model.blockwise import WHOLE, blockwise
from model.mask import Mask, dense
from model.scores import heads_of, masked_scores, rows_of, sink_rows
from sharding.platform import platform

log = logging.getLogger("purestep")

BACKENDS = ("auto", "reference", "xla", "chunked")  # those over a mesh, and splash: model/context.py


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
        backend = choose(q.shape[1], k.shape[1], plain)
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
        return blockwise(q, k, v, mask, softcap, sinks)
    raise ValueError(f"attention backend '{backend}' is unknown; allowed: {', '.join(BACKENDS)}")


def choose(queries: int, keys: int, plain: bool) -> str:
    """What auto takes; plain: without a soft cap, without sinks."""
    return _chosen(platform(), max(queries, keys) > WHOLE or not plain)


@cache
def _chosen(platform: str, long: bool) -> str:
    choice = "chunked" if long or platform == "cpu" else "xla"
    why = f"beyond {WHOLE} tokens, capped or with sinks" if long else f"up to {WHOLE} tokens"
    log.info("attention: auto chose '%s' (%s, %s)", choice, platform, why)
    return choice


def _reference(q: Array, k: Array, v: Array, mask: Mask, softcap: float | None, sinks: Array | None) -> Array:
    """As the formula says, differentiated by jax: what the other backends are held against."""
    scores = masked_scores(rows_of(q, k.shape[2]), k, dense(mask), softcap)
    if sinks is not None:
        sink = sink_rows(sinks, k.shape[2], q.shape[1], scores.dtype)
        scores = jnp.concatenate([scores, jnp.broadcast_to(sink, (*scores.shape[:-1], 1))], axis=-1)
    probs = jax.nn.softmax(scores, axis=-1)[..., : k.shape[1]].astype(v.dtype)
    return heads_of(jnp.einsum("BKQS,BSKH->BKQH", probs, v), q.shape[1])
