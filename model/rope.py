"""Rotary position embedding: frequencies and rotation, of halves as in Hugging Face's Llama or of neighbours."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from model.architecture import Rope


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Angle per position of each pair, f64[half], radians (transformers modeling_rope_utils.py for the scaled kinds).

    Of the kinds that depend on the length of a sequence, what is not yet scaled.
    """
    size = int(head_dim * rope.fraction)
    freq = 1.0 / rope.theta ** (np.arange(0, size, 2, dtype=np.float64) / size)
    if rope.kind == "linear":
        return freq / rope.factor
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / freq
        low = rope.original_max_position / rope.low_freq_factor
        high = rope.original_max_position / rope.high_freq_factor
        ramp = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        smooth = (1 - ramp) * freq / rope.factor + ramp * freq
        return np.where(wavelength > low, freq / rope.factor, np.where(wavelength < high, freq, smooth))
    if rope.kind == "yarn":
        return _yarn(rope, freq)
    return freq


def _yarn(rope: Rope, freq: np.ndarray) -> np.ndarray:
    """Slow pairs are stretched, fast ones are not, between them a ramp (YaRN, arXiv 2309.00071, section 3.2)."""

    def pair_that_turns(times: float) -> float:
        return len(freq) * math.log(rope.original_max_position / (times * 2 * math.pi)) / math.log(rope.theta)

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * len(freq) - 1)
    slow = np.clip((np.arange(len(freq)) - low) / ((high - low) or 0.001), 0, 1)
    return freq * (slow / rope.factor + 1 - slow)


def rotation(
    rope: Rope, head_dim: int, positions: Int[Array, "B T"], dtype: Any, lengths: Int[Array, "B T"] | None = None
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """cos and sin of every position's angles, computed in float32 at least; lengths: of each token's sequence."""
    wide = jnp.promote_types(dtype, jnp.float32)
    freq = jnp.asarray(frequencies(rope, head_dim), wide)[None, None]
    if rope.by_length:
        assert lengths is not None
        freq = freq * _scaling(rope, lengths[..., None].astype(wide), freq.shape[-1])
    angles = positions[..., None].astype(wide) * freq
    if rope.attention_factor != 1:
        return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor
    return jnp.cos(angles), jnp.sin(angles)


def _scaling(rope: Rope, length: Float[Array, "B T 1"], half: int) -> Float[Array, "B T half"]:
    """What multiplies the frequencies in a sequence of this length, up to now.

    longrope (arXiv 2402.13753) has one set of divisors for short sequences and one for long ones, "dynamic" raises the
    base with the length. transformers goes by the longest row of a batch; here every sequence goes by its own length.
    """
    if rope.kind == "longrope":
        short, long = (1 / jnp.asarray(f, length.dtype)[None, None] for f in (rope.short_factors, rope.long_factors))
        return jnp.where(length > rope.original_max_position, long, short)
    beyond = jnp.maximum(length, rope.original_max_position) / rope.original_max_position
    stretch = rope.factor * beyond - (rope.factor - 1)
    return stretch ** (-jnp.arange(half, dtype=length.dtype) / (half - 1))[None, None]


def rotate(
    x: Float[Array, "B T N H"],
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
    interleaved: bool = False,
) -> Float[Array, "B T N H"]:
    """Rotate the pairs (x[i], x[i + half]), or (x[2i], x[2i + 1]), of the first 2 * half numbers of every head."""
    half, cos, sin = cos.shape[-1], cos[:, :, None].astype(x.dtype), sin[:, :, None].astype(x.dtype)
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        pairs = turned.reshape(*turned.shape[:-1], half, 2)
        first, second = pairs[..., 0], pairs[..., 1]
    else:
        first, second = turned[..., :half], turned[..., half:]
    both = first * cos - second * sin, second * cos + first * sin
    turned = jnp.stack(both, axis=-1).reshape(turned.shape) if interleaved else jnp.concatenate(both, axis=-1)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
