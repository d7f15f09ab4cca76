"""Who may attend to whom, as data: positions and segments, never a dense array until a backend wants one."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Bool, Int

Columns = tuple[Any, Any, Any]  # positions, segments, branches or None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("q_positions", "kv_positions", "q_segments", "kv_segments", "window", "q_branches", "kv_branches"),
    meta_fields=("causal", "windows"),
)
@dataclass(frozen=True)
class Mask:
    """Query t sees key s when both are of one segment (0 = padding, seen by nobody) and s is not later, nor too old.

    window: keys at most window - 1 positions back, or None; windows: the numbers it may be, if known. branches: several
    continuations of one beginning in a segment; a query sees the beginning (branch 0) and its own branch.
    """

    q_positions: Int[Array, "B T"]
    kv_positions: Int[Array, "B S"]
    q_segments: Int[Array, "B T"]
    kv_segments: Int[Array, "B S"]
    window: Any = None
    q_branches: Any = None  # Int[Array, "B T"]
    kv_branches: Any = None  # Int[Array, "B S"]
    causal: bool = True
    windows: tuple[int, ...] = ()

    @property
    def queries(self) -> Columns:
        """What queries have: positions, segments, branches."""
        return self.q_positions, self.q_segments, self.q_branches

    @property
    def keys(self) -> Columns:
        """What keys have: positions, segments, branches."""
        return self.kv_positions, self.kv_segments, self.kv_branches


def self_attention(
    positions: Int[Array, "B T"], segments: Int[Array, "B T"], window: Any = None, branches: Any = None
) -> Mask:
    """The causal mask of rows that attend to themselves (packed or not)."""
    return Mask(positions, positions, segments, segments, window, branches, branches)


def dense(mask: Mask) -> Bool[Array, "B T S"]:
    """The mask as booleans, True = may attend."""
    q, k = mask.q_positions[:, :, None], mask.kv_positions[:, None, :]
    allowed = (mask.q_segments[:, :, None] == mask.kv_segments[:, None, :]) & (mask.kv_segments[:, None, :] > 0)
    if mask.causal:
        allowed &= k <= q
    if mask.kv_branches is not None:
        q_branch, k_branch = mask.q_branches[:, :, None], mask.kv_branches[:, None, :]
        allowed &= (k_branch == 0) | (k_branch == q_branch)
    if mask.window is not None:
        allowed &= q - k < mask.window
    return allowed
