"""Logits processors: tiny frozen dataclasses, applied one after the other, in transformers' order and semantics.

Their numbers are traced, so another temperature is not another compile; which processors there are is static.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt

Processor = Callable[[Float[Array, "B V"]], Float[Array, "B V"]]


@partial(jax.tree_util.register_dataclass, data_fields=("temperature",), meta_fields=())
@dataclass(frozen=True)
class Temperature:
    """Divide by the temperature (above 0; greedy search is not a processor)."""

    temperature: Any

    def __call__(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        return logits / jnp.asarray(self.temperature, logits.dtype)


@partial(jax.tree_util.register_dataclass, data_fields=("k",), meta_fields=())
@dataclass(frozen=True)
class TopK:
    """Keep the k largest; whoever ties with the last of them stays too (arXiv 1805.04833)."""

    k: Any

    def __call__(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        return _keep_from(logits, lambda kept: kept.sum(-1) >= self.k)


@partial(jax.tree_util.register_dataclass, data_fields=("p",), meta_fields=())
@dataclass(frozen=True)
class TopP:
    """Keep the smallest set of the likeliest tokens that reaches probability p; ties stay too (arXiv 1904.09751)."""

    p: Any

    def __call__(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        probs = jax.nn.softmax(logits, axis=-1)
        return _keep_from(logits, lambda kept: jnp.where(kept, probs, 0).sum(-1) >= self.p)


def warpers(temperature: float, top_k: int, top_p: float) -> tuple[Processor, ...]:
    """The processors that these parameters ask for (top_k 0 and top_p 1 = off), in transformers' order."""
    chosen: list[Processor] = []
    if temperature != 1.0:
        chosen.append(Temperature(temperature))
    if top_k > 0:
        chosen.append(TopK(top_k))
    if top_p < 1.0:
        chosen.append(TopP(top_p))
    return tuple(chosen)


def process(processors: tuple[Processor, ...], logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Apply all, the first one first."""
    for processor in processors:
        logits = processor(logits)
    return logits


def _keep_from(
    logits: Float[Array, "B V"], enough: Callable[[Bool[Array, "B V"]], Bool[Array, "B"]]
) -> Float[Array, "B V"]:
    """Remove (set to -inf) what lies below the highest threshold at which `enough` is still kept.

    Exact in 32 halvings over the bit patterns of float32, instead of a sort: on a CPU a sort of a large vocabulary
    (and, before jax 0.12, lax.top_k) costs 10 to 50 times as much.
    """
    single = logits.astype(jnp.float32)
    keys = _ordered(single)

    def halve(i: Int[Array, ""], low: UInt[Array, "B"]) -> UInt[Array, "B"]:
        candidate = low | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(enough(keys >= candidate[:, None]), candidate, low)

    threshold = jax.lax.fori_loop(0, 32, halve, jnp.zeros(logits.shape[0], jnp.uint32))
    # 0 comes back as NaN, below which there is nothing: all is kept
    return jnp.where(single < _unordered(threshold)[:, None], -jnp.inf, logits)


SIGN = 1 << 31


def _ordered(x: Float[Array, "..."]) -> UInt[Array, "..."]:
    """Unsigned integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >= jnp.uint32(SIGN), ~bits, bits | jnp.uint32(SIGN))


def _unordered(keys: UInt[Array, "..."]) -> Float[Array, "..."]:
    bits = jnp.where(keys >= jnp.uint32(SIGN), keys & jnp.uint32(SIGN - 1), ~keys)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def first_largest(x: Shaped[Array, "B V"]) -> Int[Array, "B"]:
    """argmax of each row, the first of equals; two passes that vectorise, where jnp.argmax on a CPU does not."""
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    best = jnp.where(x == x.max(-1, keepdims=True), index, x.shape[1] - 1)
    return best.min(-1)
