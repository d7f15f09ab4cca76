"""Scores of grouped heads, as rows of one matrix for each kv head."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


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
