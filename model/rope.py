"""Rotary position embedding: frequencies and rotation, half-split as in Hugging Face's Llama."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from model.architecture import Rope


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Angle per position of each pair, f64[H/2], radians (transformers modeling_rope_utils.py for the scaled kinds)."""
    freq = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
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
    return freq


def rotation(
    rope: Rope, head_dim: int, positions: Int[Array, "B T"], dtype: Any
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """cos and sin of every position's angles, computed in float32 at least."""
    wide = jnp.promote_types(dtype, jnp.float32)
    angles = positions[..., None].astype(wide) * jnp.asarray(frequencies(rope, head_dim), wide)[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T N H"]:
    """Rotate the pairs (x[i], x[i + H/2])."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None].astype(x.dtype), sin[:, :, None].astype(x.dtype)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
