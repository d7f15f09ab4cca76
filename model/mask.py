"""Who may attend to whom, as data: positions and segments, never a dense array until a backend wants one."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Bool, Int


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("q_positions", "kv_positions", "q_segments", "kv_segments", "window"),
    meta_fields=("causal",),
)
@dataclass(frozen=True)
class Mask:
    """Query t sees key s when both are of one segment (0 = padding, seen by nobody) and s is not later, nor too old.

    window: keys at most window - 1 positions back, or None.
    """

    q_positions: Int[Array, "B T"]
    kv_positions: Int[Array, "B S"]
    q_segments: Int[Array, "B T"]
    kv_segments: Int[Array, "B S"]
    window: Any = None
    causal: bool = True

    def keys(self, start: Any, size: int) -> "Mask":
        """The same mask for the keys start .. start + size only."""
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=1)
        return Mask(
            self.q_positions, cut(self.kv_positions), self.q_segments, cut(self.kv_segments), self.window, self.causal
        )


def self_attention(positions: Int[Array, "B T"], segments: Int[Array, "B T"], window: Any = None) -> Mask:
    """The causal mask of rows that attend to themselves (packed or not)."""
    return Mask(positions, positions, segments, segments, window)


def dense(mask: Mask) -> Bool[Array, "B T S"]:
    """The mask as booleans, True = may attend."""
    q, k = mask.q_positions[:, :, None], mask.kv_positions[:, None, :]
    allowed = (mask.q_segments[:, :, None] == mask.kv_segments[:, None, :]) & (mask.kv_segments[:, None, :] > 0)
    if mask.causal:
        allowed &= k <= q
    if mask.window is not None:
        allowed &= q - k < mask.window
    return allowed
