"""attend(q, k, v, mask, backend): one signature, several ways to compute it."""

import logging
from functools import cache

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from model.mask import Mask, dense

log = logging.getLogger("purestep")

BACKENDS = ("auto", "reference", "xla", "chunked")
CHUNK = 512  # keys per block of the chunked backend
CHUNKED_FROM = 2048 * 2048  # auto: beyond this many scores per head the quadratic backends waste memory


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    backend: str = "auto",
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v under the mask, with grouped heads; a query that sees no key gets finite rubbish."""
    if backend == "auto":
        backend = _choose(jax.default_backend(), q.shape[1] * k.shape[1] >= CHUNKED_FROM)
    if backend == "reference":
        return _reference(q, k, v, mask)
    if backend == "xla":
        return jax.nn.dot_product_attention(q, k, v, mask=dense(mask)[:, None], implementation="xla")
    if backend == "chunked":
        return _chunked(q, k, v, mask)
    raise ValueError(f"attention backend '{backend}' is unknown; allowed: {', '.join(BACKENDS)}")


@cache
def _choose(platform: str, long: bool) -> str:
    choice = "chunked" if long else "reference" if platform == "cpu" else "xla"
    log.info("attention: auto chose '%s' (%s, %s context)", choice, platform, "long" if long else "short")
    return choice


def _scores(q: Array, k: Array, mask: Mask) -> Float[Array, "B K GT S"]:
    """Masked, scaled scores in float32 at least; a kv head's queries (G of them x T) are rows of one matrix product."""
    B, T, N, H = q.shape
    K = k.shape[2]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    rows = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    scores = jnp.einsum("BKQH,BSKH->BKQS", rows * jnp.asarray(H**-0.5, q.dtype), k, preferred_element_type=wide)
    allowed = jnp.tile(dense(mask), (1, N // K, 1))[:, None]
    return jnp.where(allowed, scores, jnp.finfo(wide).min)


def _heads(rows: Float[Array, "B K GT H"], T: int) -> Float[Array, "B T N H"]:
    B, K, GT, H = rows.shape
    return rows.reshape(B, K, GT // T, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, -1, H)


def _reference(q: Array, k: Array, v: Array, mask: Mask) -> Array:
    probs = jax.nn.softmax(_scores(q, k, mask), axis=-1).astype(v.dtype)
    return _heads(jnp.einsum("BKQS,BSKH->BKQH", probs, v), q.shape[1])


def _chunked(q: Array, k: Array, v: Array, mask: Mask) -> Array:
    """Online softmax over blocks of keys (arXiv 2112.05682): memory linear in S, forward and backward."""
    S = k.shape[1]
    size = min(CHUNK, S)
    pad = -S % size
    if pad:  # padded keys are of segment 0: nobody sees them
        k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (k, v))
        mask = Mask(
            mask.q_positions,
            jnp.pad(mask.kv_positions, ((0, 0), (0, pad))),
            mask.q_segments,
            jnp.pad(mask.kv_segments, ((0, 0), (0, pad))),
            mask.window,
            mask.causal,
        )
    wide = jnp.promote_types(q.dtype, jnp.float32)
    B, T, N, H = q.shape
    K = k.shape[2]

    @jax.checkpoint
    def block(carry: tuple[Array, Array, Array], start: Array) -> tuple[tuple[Array, Array, Array], None]:
        top, total, out = carry
        kb, vb = (jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in (k, v))
        scores = _scores(q, kb, mask.keys(start, size))
        new_top = jnp.maximum(top, scores.max(-1))
        shrink = jnp.exp(top - new_top)
        probs = jnp.exp(scores - new_top[..., None])
        out = out * shrink[..., None] + jnp.einsum("BKQS,BSKH->BKQH", probs.astype(v.dtype), vb)
        return (new_top, total * shrink + probs.sum(-1), out), None

    rows = (B, K, N // K * T)
    start = (jnp.full(rows, jnp.finfo(wide).min), jnp.zeros(rows, wide), jnp.zeros((*rows, H), wide))
    (_, total, out), _ = jax.lax.scan(block, start, jnp.arange(0, S + pad, size))
    return _heads((out / total[..., None]).astype(v.dtype), T)
