"""Attention of a few new tokens over a cache: one softmax over a row's prompt and its own tokens."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from model.cache import Buffer, Cache, unpack
from model.scores import capped, heads_of, rows_of, sink_rows


@partial(jax.tree_util.register_dataclass, data_fields=("at", "prompt", "own"), meta_fields=())
@dataclass(frozen=True)
class Sight:
    """What each new token sees: the slots of its prompt (None: there is no prompt part) and its row's own.

    at: the own slot that each new token is written to.
    """

    at: Int[Array, "B T"]
    prompt: Bool[Array, "B T S0"] | None
    own: Bool[Array, "B T S"]


def look(cache: Cache, steps: int, window: Any = None) -> Sight:
    """The sight of the next `steps` tokens of each row; window: keys at most window - 1 positions back, or None."""
    at = cache.length[:, None] + jnp.arange(steps)[None]
    slot = jnp.arange(cache.slots)[None, None]
    own = slot <= at[:, :, None]
    if window is not None:
        own &= at[:, :, None] - slot < window
    if cache.prompt_k is None:
        return Sight(at, None, own)
    slot = jnp.arange(cache.prompt_slots)[None, None]
    prompt = jnp.broadcast_to(slot < cache.prompt_length[:, None, None], (*at.shape, slot.shape[2]))
    if window is not None:
        prompt &= (cache.prompt_length[:, None] + at)[:, :, None] - slot < window
    return Sight(at, prompt, own)


def attend_cached(
    q: Float[Array, "B T N H"],
    own: tuple[Buffer, Buffer],
    prompt: tuple[Buffer, Buffer] | None,
    sight: Sight,
    softcap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
) -> Float[Array, "B T N V"]:
    """softmax(q k^T / sqrt(H)) v over one layer's keys [B, K, S, H] and, of the prompt, [P, K, S0, H].

    The n rows of a prompt ask it together: it is read once, whatever n.
    """
    B, T, _, H = q.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)
    k, v = (unpack(buffer, q.dtype) for buffer in own)
    rows = rows_of(q * jnp.asarray(H**-0.5, q.dtype), k.shape[1])  # [B, K, G * T, H]
    parts = [(rows, k, v, sight.own)]
    if prompt is not None and sight.prompt is not None:
        k, v = (unpack(buffer, q.dtype) for buffer in prompt)
        parts.append((_together(rows, k.shape[0]), k, v, sight.prompt))
    scores = []
    for asked, k, _, allowed in parts:
        score = jnp.einsum("BKQH,BKSH->BKQS", asked, k, preferred_element_type=wide)
        score = _apart(capped(score, softcap), B)
        grouped = score.reshape(B, score.shape[1], -1, T, score.shape[3])
        masked = jnp.where(allowed[:, None, None], grouped, jnp.finfo(wide).min)
        scores.append(masked.reshape(score.shape))
    top = jnp.max(jnp.stack([score.max(-1) for score in scores]), axis=0)[..., None]
    sink = None if sinks is None else sink_rows(sinks, rows.shape[1], T, wide)
    top = top if sink is None else jnp.maximum(top, sink)
    odds = [jnp.exp(score - top) for score in scores]
    total = jnp.sum(jnp.stack([o.sum(-1) for o in odds]), axis=0)[..., None]
    if sink is not None:
        total += jnp.exp(sink - top)
    out = jnp.zeros((*rows.shape[:-1], v.shape[-1]), wide)
    for (_, _, v, _), o in zip(parts, odds, strict=True):
        asked = _together(o.astype(v.dtype), v.shape[0])
        out += _apart(jnp.einsum("BKQS,BKSH->BKQH", asked, v, preferred_element_type=wide), B)
    return heads_of((out / total).astype(q.dtype), T)


def _together(x: Float[Array, "B K Q X"], P: int) -> Float[Array, "P K nQ X"]:
    """The rows of each prompt as more queries of one row."""
    B, K, Q, X = x.shape
    return x if P == B else x.reshape(P, B // P, K, Q, X).swapaxes(1, 2).reshape(P, K, -1, X)


def _apart(x: Float[Array, "P K nQ X"], B: int) -> Float[Array, "B K Q X"]:
    """The inverse of _together."""
    P, K, _, X = x.shape
    return x if P == B else x.reshape(P, K, B // P, -1, X).swapaxes(1, 2).reshape(B, K, -1, X)
