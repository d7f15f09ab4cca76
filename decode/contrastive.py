"""Contrastive search (arXiv 2202.06417), wholly inside jit: likely tokens whose meaning is not yet in the text.

Of the top_k likeliest tokens v the one with the largest (1 - alpha) p(v) - alpha max_j cos(h_v, h_j): h_v the final
hidden state after reading v, j every position before it, the prompt's included.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from decode.choose import first_largest, largest
from decode.logits import Context, process
from decode.rows import NEVER
from decode.rule import Rule
from model import cache as kv
from model.architecture import Architecture
from model.cache import Cache
from model.compute import Compute
from model.head import head_of, logits
from model.transformer import extend, read


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("cache", "context", "known", "hidden", "logprobs", "done", "failed", "step"),
    meta_fields=(),
)
@dataclass(frozen=True)
class ContrastState:
    """P prompts under way; the cache has top_k rows for each, all of the same past."""

    cache: Cache
    context: Context
    known: Float[Array, "P S D"]  # unit hidden states of what was read, zero beyond
    hidden: Float[Array, "P D"]  # of the last token
    logprobs: Float[Array, "P N"]
    done: Bool[Array, "P"]
    failed: Int[Array, "P"]
    step: Int[Array, ""]


@partial(jax.jit, static_argnames=("arch", "compute", "top_k", "slots", "dtype"))
def search_contrastive(
    arch: Architecture,
    compute: Compute,
    params: Any,
    tokens: Int[Array, "P T"],
    segments: Int[Array, "P T"],
    rule: Rule,
    alpha: Float[Array, ""],
    top_k: int,
    slots: int,
    dtype: Any,
) -> tuple[Int[Array, "P S"], Int[Array, "P"], Float[Array, "P N"], Int[Array, "P"]]:
    """(tokens of whole rows, new tokens in each, raw log-probs of those, the step of a failure or -1)."""
    (P, T), size = tokens.shape, tokens.shape[1] + slots + 1
    hidden, k, v = read(arch, compute, params, tokens, segments)
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    lengths = segments.sum(1).astype(jnp.int32)
    own_k, own_v = kv.blank(arch, P * top_k, slots, dtype, compute.apart)
    own_length, prompt_k, prompt_v = jnp.zeros(P * top_k, jnp.int32), kv.pack(k, dtype), kv.pack(v, dtype)
    cache = Cache(own_k, own_v, own_length, prompt_k, prompt_v, jnp.repeat(lengths, top_k))
    known = jnp.where(segments[..., None] > 0, _unit(hidden.astype(wide)), 0)
    state = ContrastState(
        cache,
        Context(jnp.pad(tokens, ((0, 0), (0, size - T))), lengths, lengths),
        jnp.pad(known, ((0, 0), (0, size - T), (0, 0))),
        jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0],
        jnp.zeros((P, slots), wide),
        jnp.zeros(P, bool),
        jnp.full(P, NEVER),
        jnp.zeros((), jnp.int32),
    )

    def body(state: ContrastState) -> ContrastState:
        return _step(arch, compute, params, state, rule, alpha, top_k)

    state = jax.lax.while_loop(lambda s: ~s.done.all(), body, state)
    return state.context.tokens, state.context.length - state.context.prompt_length, state.logprobs, state.failed


def _step(
    arch: Architecture,
    compute: Compute,
    params: Any,
    state: ContrastState,
    rule: Rule,
    alpha: Float[Array, ""],
    top_k: int,
) -> ContrastState:
    """Read the likeliest tokens, each in a row of its own; all rows of a prompt go on from the chosen one."""
    context, P = state.context, state.done.shape[0]
    raw = logits(state.hidden[:, None], head_of(arch, params))[:, 0]
    logp = jax.nn.log_softmax(process(rule.processors, raw, context), axis=-1)
    likely, ids = largest(logp, top_k)
    fine = jnp.isfinite(likely[:, 0])
    read_, cache = extend(arch, compute, params, ids.reshape(-1, 1), jnp.ones((P * top_k, 1), jnp.int32), state.cache)
    states = read_.reshape(P, top_k, -1)
    units = _unit(states.astype(state.known.dtype))
    seen = jnp.arange(state.known.shape[1])[None, None] < context.length[:, None, None]
    alike = jnp.where(seen, jnp.einsum("PKD,PSD->PKS", units, state.known), -jnp.inf).max(-1)
    score = (1 - alpha) * jnp.exp(likely) - alpha * alike
    best = first_largest(jnp.where(jnp.isfinite(likely), score, -jnp.inf))
    pick = lambda x: jnp.take_along_axis(x, best.reshape(P, *(1,) * (x.ndim - 1)), axis=1)[:, 0]  # noqa: E731
    token, row = pick(ids), jnp.arange(P)
    made = context.length - context.prompt_length
    at = jnp.where(state.done, context.tokens.shape[1], context.length)
    told = jnp.where(state.done, state.logprobs.shape[1], made)
    chosen = jnp.take_along_axis(raw, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(raw, axis=-1)
    ended = (token[:, None] == rule.stop_ids).any(1) | (made + 1 >= rule.limit) | ~fine
    cache = kv.reorder(cache, jnp.repeat(row * top_k + best, top_k))
    # a finished prompt's rows stand still
    length = jnp.where(jnp.repeat(state.done, top_k), state.cache.length, cache.length)
    return ContrastState(
        replace(cache, length=length),
        replace(
            context, tokens=context.tokens.at[row, at].set(token, mode="drop"), length=context.length + ~state.done
        ),
        state.known.at[row, at].set(pick(units), mode="drop"),
        pick(states),
        state.logprobs.at[row, told].set(chosen.astype(state.logprobs.dtype), mode="drop"),
        state.done | ended,
        jnp.where(fine | state.done, state.failed, made),
        state.step + 1,
    )


def _unit(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """x / |x|."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), jnp.finfo(x.dtype).tiny)
