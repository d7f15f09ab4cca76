"""Logits processors: tiny frozen dataclasses, applied one after the other, in transformers' order and semantics.

A processor's numbers are traced: another temperature is not another compile; which processors there are is static.
A number is a Python scalar, or an array [B] with one for each row. Each has a value at which it changes nothing (said
in each docstring as "off"), because in a batch some rows use a processor and others do not. Removed = set to -inf.

Ties: what ties with the last token kept stays too, wherever a threshold is searched for; transformers cuts through
ties in the order of its sort there (top_p, min_p's and typical_p's min_tokens_to_keep, top_h), and keeps them
elsewhere.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from decode.choose import largest
from decode.threshold import highest_enough, kth_largest

Number = Any  # a Python scalar, or an array [B]


@partial(jax.tree_util.register_dataclass, data_fields=("tokens", "prompt_length", "length"), meta_fields=())
@dataclass(frozen=True)
class Context:
    """What a processor may look at besides the logits: the rows so far."""

    tokens: Int[Array, "B S"]  # the prompt, then the new tokens, from slot 0; rubbish from `length` on
    prompt_length: Int[Array, "B"]
    length: Int[Array, "B"]  # prompt and new tokens; the logits are for the token at position `length`


Processor = Callable[[Float[Array, "B V"], Context], Float[Array, "B V"]]


def process(processors: tuple[Processor, ...], logits: Float[Array, "B V"], context: Context) -> Float[Array, "B V"]:
    """Apply all, the first one first, in float32 (float64 stays)."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    for processor in processors:
        logits = processor(logits, context)
    return logits


def column(number: Number, like: Shaped[Array, "..."]) -> Shaped[Array, "R 1"]:
    """The number, or each row's, beside the columns of `like` and in its dtype; R = 1 or B."""
    return jnp.reshape(jnp.asarray(number, like.dtype), (-1, 1))


def per_row(number: Number, rows: int, dtype: Any) -> Shaped[Array, "B"]:
    """The number of each row."""
    return jnp.broadcast_to(jnp.asarray(number, dtype), (rows,))


def register(*data_fields: str, meta_fields: tuple[str, ...] = ()) -> Callable[[type], Any]:
    """A frozen dataclass whose data_fields are traced.

    Not jax's register_dataclass: tree structures of two classes with as many fields are equal then (jax 0.10 to 0.12),
    and now and then, where hashes collide, jit runs what it compiled for the other class.
    """

    def decorate(kind: type) -> type:
        def static(node: Any) -> tuple[Any, ...]:
            return kind, *(getattr(node, name) for name in meta_fields)

        def flatten(node: Any) -> tuple[list[Any], tuple[Any, ...]]:
            return [getattr(node, name) for name in data_fields], static(node)

        def flatten_with_keys(node: Any) -> tuple[list[Any], tuple[Any, ...]]:
            return [(jax.tree_util.GetAttrKey(name), getattr(node, name)) for name in data_fields], static(node)

        def unflatten(metas: tuple[Any, ...], leaves: Iterable[Any]) -> Any:
            return kind(**dict(zip((*data_fields, *meta_fields), (*leaves, *metas[1:]), strict=True)))

        jax.tree_util.register_pytree_with_keys(kind, flatten_with_keys, unflatten, flatten)
        return kind

    return decorate


@register(meta_fields=("function",))
@dataclass(frozen=True)
class Custom:
    """A function of your own, traced once: (logits [B, V], context) -> logits."""

    function: Processor

    def __call__(self, logits: Float[Array, "B V"], context: Context) -> Float[Array, "B V"]:
        return self.function(logits, context)


@register("temperature")
@dataclass(frozen=True)
class Temperature:
    """Divide by the temperature (above 0; greedy search is not a processor). Off: 1."""

    temperature: Number = 1.0

    def __call__(self, logits: Float[Array, "B V"], context: Context | None = None) -> Float[Array, "B V"]:
        return logits / column(self.temperature, logits)


@register("k", "min_tokens_to_keep")
@dataclass(frozen=True)
class TopK:
    """Keep the k largest, and what ties with the last of them (arXiv 1805.04833). Off: 0."""

    k: Number = 0
    min_tokens_to_keep: Number = 1

    def __call__(self, logits: Float[Array, "B V"], context: Context | None = None) -> Float[Array, "B V"]:
        k = per_row(self.k, logits.shape[0], jnp.int32)
        k = jnp.where(k > 0, jnp.maximum(k, self.min_tokens_to_keep), logits.shape[1])
        return keep_from(logits, logits, kth_largest(logits, k))


@register("p", "min_tokens_to_keep")
@dataclass(frozen=True)
class TopP:
    """Keep the smallest set of the likeliest tokens that reaches probability p, and ties (arXiv 1904.09751). Off: 1."""

    p: Number = 1.0
    min_tokens_to_keep: Number = 1

    def __call__(self, logits: Float[Array, "B V"], context: Context | None = None) -> Float[Array, "B V"]:
        p = per_row(self.p, logits.shape[0], logits.dtype)
        weights = unnormalised(logits)
        # all tokens that are e times less likely than this weigh less than 1 - p together
        low = (1 - p) / logits.shape[1] / math.e
        target = jnp.where(p < 1, above_zero(p) * weights.sum(-1), 0)
        threshold = highest_enough(weights, weights, target, low, jnp.ones_like(p))
        return keep_from(logits, weights, jnp.minimum(threshold, fewest(weights, self.min_tokens_to_keep)))


@register("p", "min_tokens_to_keep")
@dataclass(frozen=True)
class MinP:
    """Keep what is at least p times as likely as the likeliest token (arXiv 2407.01082). Off: 0."""

    p: Number = 0.0
    min_tokens_to_keep: Number = 1

    def __call__(self, logits: Float[Array, "B V"], context: Context | None = None) -> Float[Array, "B V"]:
        kept = unnormalised(logits) >= column(self.p, logits)
        return jnp.where(kept | among_fewest(logits, self.min_tokens_to_keep), logits, -jnp.inf)


@register("p", "min_tokens_to_keep")
@dataclass(frozen=True)
class Typical:
    """Keep the tokens whose surprise is nearest to the entropy, until they reach probability p (arXiv 2202.00666).

    min_tokens_to_keep counts the most typical ones. Off: 1.
    """

    p: Number = 1.0
    min_tokens_to_keep: Number = 1

    def __call__(self, logits: Float[Array, "B V"], context: Context | None = None) -> Float[Array, "B V"]:
        p = per_row(self.p, logits.shape[0], logits.dtype)
        logp = jax.nn.log_softmax(logits, axis=-1)
        probs = jnp.exp(logp)
        typical = -jnp.abs(logp + entropy(logp)[:, None])
        threshold = highest_enough(
            typical, probs, jnp.where(p < 1, above_zero(p), 0), jnp.full_like(p, -jnp.inf), typical.max(-1)
        )
        return keep_from(logits, typical, jnp.minimum(threshold, fewest(typical, self.min_tokens_to_keep)))


@register("epsilon", "min_tokens_to_keep")
@dataclass(frozen=True)
class EpsilonCutoff:
    """Keep probabilities of at least epsilon (arXiv 2210.15191). Off: 0."""

    epsilon: Number = 0.0
    min_tokens_to_keep: Number = 1

    def __call__(self, logits: Float[Array, "B V"], context: Context | None = None) -> Float[Array, "B V"]:
        kept = jax.nn.softmax(logits, axis=-1) >= column(self.epsilon, logits)
        return jnp.where(kept | among_fewest(logits, self.min_tokens_to_keep), logits, -jnp.inf)


@register("epsilon", "min_tokens_to_keep")
@dataclass(frozen=True)
class EtaCutoff:
    """Keep probabilities of at least min(epsilon, sqrt(epsilon) exp(-entropy)) (arXiv 2210.15191). Off: 0."""

    epsilon: Number = 0.0
    min_tokens_to_keep: Number = 1

    def __call__(self, logits: Float[Array, "B V"], context: Context | None = None) -> Float[Array, "B V"]:
        epsilon = column(self.epsilon, logits)
        logp = jax.nn.log_softmax(logits, axis=-1)
        eta = jnp.minimum(epsilon, jnp.sqrt(epsilon) * jnp.exp(-entropy(logp)[:, None]))
        kept = jnp.exp(logp) >= eta
        return jnp.where(kept | among_fewest(logits, self.min_tokens_to_keep), logits, -jnp.inf)


@register("n")
@dataclass(frozen=True)
class TopNSigma:
    """Keep logits within n standard deviations (population's, of the finite logits) of the largest. Off: 0.

    arXiv 2411.07641. What it keeps does not depend on a temperature before it.
    """

    n: Number = 0.0

    def __call__(self, logits: Float[Array, "B V"], context: Context | None = None) -> Float[Array, "B V"]:
        finite = jnp.isfinite(logits)
        count = jnp.maximum(finite.sum(-1, keepdims=True), 1).astype(logits.dtype)
        mean = jnp.where(finite, logits, 0).sum(-1, keepdims=True) / count
        variance = jnp.where(finite, (logits - mean) ** 2, 0).sum(-1, keepdims=True) / count
        n = column(self.n, logits)
        kept = logits >= logits.max(-1, keepdims=True) - n * jnp.sqrt(variance)
        return jnp.where(kept | (n <= 0), logits, -jnp.inf)


@register("h")
@dataclass(frozen=True)
class TopH:
    """Keep the likeliest tokens whose entropy terms add up to h times the entropy (arXiv 2509.02510). Off: 0.

    As in transformers, probabilities are taken among the 100 largest logits and nothing else is ever kept.
    """

    h: Number = 0.0

    def __call__(self, logits: Float[Array, "B V"], context: Context | None = None) -> Float[Array, "B V"]:
        h = column(self.h, logits)
        values = largest(logits, min(100, logits.shape[1]))[0]
        logp = jax.nn.log_softmax(values, axis=-1)
        terms = jnp.where(logp > -jnp.inf, -jnp.exp(logp) * logp, 0)
        kept = jnp.cumsum(terms, axis=-1) <= h * terms.sum(-1, keepdims=True)
        threshold = jnp.where(kept, values, values[:, :1]).min(-1)
        return keep_from(logits, logits, jnp.where(h[:, 0] > 0, threshold, -jnp.inf))


def keep_from(logits: Float[Array, "B V"], x: Float[Array, "B V"], threshold: Float[Array, "B"]) -> Float[Array, "B V"]:
    """Remove the tokens whose x lies below the threshold."""
    return jnp.where(x < threshold[:, None], -jnp.inf, logits)


def above_zero(p: Float[Array, "B"]) -> Float[Array, "B"]:
    """With 0 made the least positive number: a target of 0 would ask for all tokens, a p of 0 asks for one."""
    return jnp.maximum(p, jnp.finfo(p.dtype).tiny)


def fewest(x: Float[Array, "B V"], min_tokens_to_keep: Number) -> Float[Array, "B"]:
    """The value that so many of each row reach; for 1 it costs nothing beyond the maximum."""
    k = per_row(min_tokens_to_keep, x.shape[0], jnp.int32)
    return jax.lax.cond((k > 1).any(), lambda: kth_largest(x, jnp.maximum(k, 1)), lambda: x.max(-1))


def among_fewest(x: Float[Array, "B V"], min_tokens_to_keep: Number) -> Shaped[Array, "B V"]:
    """Which are the largest so many of each row."""
    return x >= fewest(x, min_tokens_to_keep)[:, None]


def unnormalised(logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Probabilities relative to the likeliest token's."""
    top = logits.max(-1, keepdims=True)
    return jnp.exp(logits - jnp.where(top > -jnp.inf, top, 0))


def entropy(logp: Float[Array, "B V"]) -> Float[Array, "B"]:
    """Of each row, in nats."""
    return -jnp.where(logp > -jnp.inf, jnp.exp(logp) * logp, 0).sum(-1)
