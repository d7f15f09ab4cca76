"""Tokens to the devices of their experts and back, all to all: as many rows as there are, and none dropped."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sharding.place import split
from sharding.platform import platform
from sharding.rules import Rules

PLATFORMS = ("gpu", "tpu")  # that have the collective


@dataclass(frozen=True)
class Apart:
    """How a mesh splits tokens and experts: the axes of the tokens [B, T], of experts, of their width and their ffn."""

    batch: tuple[str, ...]
    along: tuple[str, ...]
    expert: tuple[str, ...]
    embed: tuple[str, ...]
    mlp: tuple[str, ...]

    @property
    def shared(self) -> tuple[str, ...]:
        """Axes along which devices have other tokens, and other experts or parts of them."""
        return tuple(axis for axis in self.expert + self.mlp if axis in self.batch + self.along)

    @property
    def summed(self) -> tuple[str, ...]:
        """Axes along which devices have the same tokens, and other experts or parts of them."""
        return tuple(axis for axis in self.expert + self.mlp if axis not in self.batch + self.along)

    def sent(self, k: int) -> bool:
        """Whether tokens are sent to the devices of their k experts, on each device."""
        apart = len(self.expert) == 1 and self.expert[0] in self.batch
        return apart and platform() in PLATFORMS and jax.lax.axis_size(self.expert[0]) > k


def apart(rules: Rules, x: tuple[int, ...], experts: tuple[int, ...]) -> Apart | None:
    """How the mesh in context splits tokens [B, T, D] and experts [E, D, F]; None where not, or not evenly."""
    names = ("batch", "seq", "expert", "expert_embed", "mlp")
    cuts, stream = [split(rules, name) for name in names], split(rules, "stream")
    even = all(size % cut.size == 0 for size, cut in zip((*x[:2], *experts), cuts, strict=True))
    batch, along, expert, embed, mlp = (cut.axes for cut in cuts)
    if stream.axes == along + mlp and x[1] % stream.size == 0:  # as the stream between blocks is
        along = stream.axes
    used = {*batch, *along, *expert, *mlp}
    return Apart(batch, along, expert, embed, mlp) if used and even and {*embed} <= {*batch, *along} else None


def by_exchange(
    rows: Float[Array, "M D"],
    picked: Int[Array, "M k"],
    count: int,
    axis: str,
    of_mine: Callable[[Float[Array, "R D"], Int[Array, "R 1"], Bool[Array, "R 1"]], Float[Array, "R D"]],
) -> Float[Array, "M k D"]:
    """What the experts that each token picks make of it, where devices along `axis` have `count` experts each.

    of_mine: rows, the expert of each among this device's, and which rows there are -> what they make of them. A device
    has room for all that could come to it: a row for each token of all devices, or as many as experts of its own.
    """
    M, k = picked.shape
    devices, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    order = jnp.argsort(picked.reshape(-1), stable=True)
    asked = jnp.bincount(picked.reshape(-1), length=devices * count).astype(jnp.int32)
    of_all = jax.lax.all_gather(asked, axis).reshape(devices, devices, count)  # from whom, to whom, for which expert
    sizes, room = of_all.sum(-1), devices * M * min(k, count)
    came = _exchange(jnp.repeat(rows, k, axis=0)[order], sizes, room, axis)
    ends = jnp.cumsum(of_all[:, me].reshape(-1))  # rows come by sender, then by expert
    at = jnp.arange(room)
    expert = jnp.searchsorted(ends, at, side="right") % count
    made = of_mine(came, expert[:, None].astype(picked.dtype), (at < ends[-1])[:, None])
    back = _exchange(made, sizes.T, M * k, axis)
    return back[jnp.argsort(order)].reshape(M, k, -1)


def _exchange(rows: Float[Array, "N D"], sizes: Int[Array, "E E"], room: int, axis: str) -> Float[Array, "R D"]:
    """sizes[i, j] rows from device i to j: the rows lie by receiver before, by sender after, zeros behind them.

    Where there is no such collective, as on CPUs, each takes its own of everybody's rows.
    """
    me = jax.lax.axis_index(axis)
    before, after = jnp.cumsum(sizes, 1) - sizes, jnp.cumsum(sizes, 0) - sizes
    if platform() != "cpu":
        start = jnp.zeros((room, rows.shape[1]), rows.dtype)
        return jax.lax.ragged_all_to_all(rows, start, before[me], sizes[me], after[me], sizes[:, me], axis_name=axis)
    everybodys, at = jax.lax.all_gather(rows, axis), jnp.arange(room)
    ends = jnp.cumsum(sizes[:, me])
    sender = jnp.minimum(jnp.searchsorted(ends, at, side="right"), len(sizes) - 1)
    row = jnp.clip(before[sender, me] + at - after[sender, me], 0, len(rows) - 1)
    return jnp.where((at < ends[-1])[:, None], everybodys[sender, row], 0)
