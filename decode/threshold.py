"""The exact threshold behind top-k, top-p and typical sampling, without a sort."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

BLOCK = 128  # whose maxima bound the k-th largest from below
EARLY = 6
COARSE = 10  # passes before the values themselves are tried
TRY = 3  # then every third pass does


def kth_largest(x: Float[Array, "B V"], k: Int[Array, "B"]) -> Float[Array, "B"]:
    """The k-th largest of each row, equal ones counted; at most that where k >= V: then -inf."""
    top = x.max(-1)
    blocks = x.shape[1] // BLOCK
    low = jnp.full_like(top, -jnp.inf)
    if blocks:
        # as many values as there are blocks reach the least of their maxima
        least = x[:, : blocks * BLOCK].reshape(-1, blocks, BLOCK).max(-1).min(-1)
        low = jnp.where(k <= blocks, least, low)
    low = jnp.where(k <= 1, top, low)
    target = jnp.where(k < x.shape[1], k, 0).astype(x.dtype)
    return highest_enough(x, None, target, low, top)


def highest_enough(
    x: Float[Array, "B V"],
    weights: Float[Array, "B V"] | None,
    target: Float[Array, "B"],
    low: Float[Array, "B"],
    top: Float[Array, "B"],
) -> Float[Array, "B"]:
    """A threshold t, such that x >= t is the smallest such set whose weights (None = 1 each) add up to the target.

    low: enough is known to weigh x >= low; it is the result where nothing above is enough. top: the row's maximum.
    A target of 0 or less asks for all: -inf. Elements that weigh 0 may lie on either side.

    Exact: bisects between values, and over the bit patterns so that it always ends; after a few passes the largest
    value still below the bracket's end is tried, which mostly is the answer. About 15 passes over x, vectorised; on
    a CPU a sort of a large vocabulary (and, before jax 0.12, lax.top_k) costs 10 to 50 times as much.
    """
    ones = jnp.ones((), x.dtype)
    zero = ordered(jnp.zeros((), x.dtype))

    def total(keys: UInt[Array, "B"]) -> Float[Array, "B"]:
        # float sums: on a CPU they vectorise better than counts of booleans, and are exact up to 2**24
        kept = x >= unordered(keys, x.dtype)[:, None]
        return jnp.where(kept, ones if weights is None else weights, 0).sum(-1)

    def middle(low: UInt[Array, "B"], high: UInt[Array, "B"], early: Bool[Array, ""]) -> UInt[Array, "B"]:
        # halving bit patterns halves the logarithm; where the bracket spans zero, values come first
        value = ordered(unordered(low, x.dtype) / 2 + unordered(high, x.dtype) / 2)
        spans = early & (low < zero) & (zero < high) & (low < value) & (value < high)
        return jnp.where(spans, value, low + (high - low) // 2)

    def next_below(low: UInt[Array, "B"], high: UInt[Array, "B"]) -> UInt[Array, "B"]:
        below = jnp.where(x <= unordered(high - 1, x.dtype)[:, None], x, -jnp.inf).max(-1)
        return jnp.clip(ordered(below), low, high - 1)

    def narrow(state: tuple[Int[Array, ""], UInt[Array, "B"], UInt[Array, "B"]]) -> tuple:
        i, low, high = state
        tried = (i >= COARSE) & (i % TRY == 0)
        candidate = jax.lax.cond(tried, lambda: next_below(low, high), lambda: middle(low, high, i < EARLY))
        weight = total(candidate)
        enough = weight >= target
        found = enough & (tried | (weight == target))
        going = high - low > 1
        low = jnp.where(going & enough, candidate, low)
        high = jnp.where(going & found, candidate + 1, jnp.where(going & ~enough, candidate, high))
        return i + 1, low, high

    bottom = jnp.where(target > 0, ordered(low), ordered(jnp.full_like(low, -jnp.inf)))
    end = jnp.where(target > 0, jnp.maximum(ordered(top), bottom), bottom) + 1
    _, found, _ = jax.lax.while_loop(lambda s: (s[2] - s[1] > 1).any(), narrow, (jnp.int32(0), bottom, end))
    threshold = unordered(found, x.dtype)
    # a CPU takes subnormal numbers for 0 in comparisons, which so may end at one: other eyes would read it as more
    return jnp.where(threshold == 0, jnp.zeros_like(threshold), threshold)


def ordered(x: Float[Array, "..."]) -> UInt[Array, "..."]:
    """Unsigned integers in the order of the floats."""
    whole = jnp.uint64 if x.dtype == jnp.float64 else jnp.uint32
    bits = jax.lax.bitcast_convert_type(x, whole)
    sign = jnp.asarray(1 << (8 * x.dtype.itemsize - 1), whole)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def unordered(keys: UInt[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """The floats again."""
    sign = jnp.asarray(1 << (8 * keys.dtype.itemsize - 1), keys.dtype)
    return jax.lax.bitcast_convert_type(jnp.where(keys >= sign, keys & ~sign, ~keys), dtype)
