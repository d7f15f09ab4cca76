"""Pipeline parallelism: the stack of layers is cut over the mesh axis `stage`, and micro-batches flow through it.

One round of stages is GPipe's fill and drain (arXiv 1811.06965). With R rounds each stage has R shorter pieces of the
stack and every micro-batch comes by R times (the interleaved schedule of arXiv 2104.04473, section 2.2). They enter in
groups of S: what leaves the last stage is due at the first one in the very next tick, so nothing is ever stored.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from model.architecture import Architecture
from model.block import Block
from model.compute import REMAT, Compute
from model.mask import Mask
from model.pattern import angles_of, layers_of
from sharding.place import constrain

AXIS = "stage"


@dataclass(frozen=True)
class Schedule:
    """S stages, M micro-batches (a multiple of S), R rounds."""

    stages: int
    microbatches: int
    rounds: int = 1

    @property
    def ticks(self) -> int:
        """Steps of the whole pipeline, each of 1 / (S R) of the layers for one micro-batch."""
        return self.microbatches * self.rounds + self.stages - 1

    @property
    def bubble(self) -> float:
        """The share of the time in which a stage has nothing to do."""
        return (self.stages - 1) / self.ticks


def schedule_of(stages: int, rows: int, microbatches: int | None = None, rounds: int = 1) -> Schedule | None:
    """The schedule of a batch of rows (those of one device of the other axes that split it, times S); None: no
    multiple of S divides them. Without a wish: 2 S micro-batches where that divides, else S."""
    for wished in (microbatches,) if microbatches else (2 * stages, stages):
        if wished % stages == 0 and rows % wished == 0:
            return Schedule(stages, wished, rounds)
    return None


def planned(arch: Architecture, compute: Compute, rows: int) -> Schedule | None:
    """The schedule of such a batch on the mesh in context; None: the layers run one after the other.

    That is also how the cache is filled and read, whose steps have no micro-batches: right, but each layer's weights
    are fetched from the stage that has them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    stages = 1 if mesh.empty else mesh.shape.get(AXIS, 1)
    if stages == 1 or arch.num_layers % (stages * compute.pipeline_repeats) or len(arch.groups) > 1:
        return None
    others = math.prod(mesh.shape[axis] for axis in compute.rules.axes("batch") if axis != AXIS)
    return None if rows % others else schedule_of(
        stages, rows // others, compute.pipeline_microbatches, compute.pipeline_repeats
    )


def pipeline(
    arch: Architecture,
    compute: Compute,
    schedule: Schedule,
    weights: Any,
    x: Float[Array, "B T D"],
    mask: Mask,
    routed: bool = False,
) -> tuple[Float[Array, "B T D"], Any]:
    """The residual stream behind all layers; routed: and what their routers saw, by layer.

    Manual over `stage` alone: within a stage the other axes are the partitioner's, or other shard_maps'. Outside, the
    batch is split over `stage` as well (sharding/rules.py), so that embedding and head are nobody's work twice.
    """
    axes, sizes = compute.rules.axes("batch"), jax.sharding.get_abstract_mesh().shape
    lead = math.prod(sizes[axis] for axis in axes[: axes.index(AXIS)]) if AXIS in axes else 1
    split = lambda v: v.reshape(lead, schedule.stages, -1, *v.shape[1:])  # noqa: E731
    inner = replace(compute, rules=compute.rules.without(AXIS))
    run = jax.shard_map(
        partial(_stage, arch, inner, schedule, routed),
        in_specs=(P(AXIS), P(None, AXIS), P(None, AXIS)),
        out_specs=(P(None, AXIS), P(AXIS)),
        axis_names={AXIS},
        check_vma=False,
    )
    out, seen = run(weights, split(x), jax.tree.map(split, mask))
    # [S, R, L/SR, ..] -> [L, ..]
    by_layer = jax.tree.map(lambda v: v.swapaxes(0, 1).reshape(arch.num_layers, *v.shape[3:]), seen)
    return out.reshape(x.shape), by_layer


def _stage(
    arch: Architecture, compute: Compute, schedule: Schedule, routed: bool, weights: Any, x: Array, mask: Mask
) -> tuple[Array, Any]:
    """What one stage does: its layers [L/S, ..], its share of the batch [lead, 1, n, ..] in and out."""
    S, M, R = schedule.stages, schedule.microbatches, schedule.rounds
    own, shape, k = jax.lax.axis_index(AXIS), x.shape, M // S
    n = shape[2] // k

    def microbatches(v: Array) -> Array:  # [lead, 1, n k, ..] -> all of them, [M, lead n, ..]
        parts = jnp.moveaxis(v.reshape(shape[0], n, k, *v.shape[3:]), 2, 0)
        return jax.lax.all_gather(parts.reshape(k, shape[0] * n, *v.shape[3:]), AXIS, tiled=True)

    queue, masks = microbatches(x), jax.tree.map(microbatches, mask)
    pieces = jax.tree.map(partial(_by_round, schedule), weights)
    which = jax.tree.map(lambda v: v.reshape(R * S, -1), layers_of(arch))

    def tick(received: Array, t: Array) -> Any:
        at = jnp.clip(t - own, 0, M * R - 1)
        r, m = at // S % R, at // (S * R) * S + at % S
        entering = jnp.where((own == 0) & (r == 0), queue[m], received)
        mine, layer = jax.tree.map(lambda v: v[r], pieces), jax.tree.map(lambda v: v[r * S + own], which)
        y, seen = _layers(arch, compute, routed, mine, layer, entering, jax.tree.map(lambda v: v[m], masks))
        real = (t >= own) & (t - own < M * R)  # else the stage waits: what it computes is nobody's
        mark = (jnp.arange(R) == r) & real
        seen = jax.tree.map(lambda v: jnp.einsum("R,...->R...", mark.astype(v.dtype), v), seen)
        return jax.lax.ppermute(y, AXIS, [(i, (i + 1) % S) for i in range(S)]), (y, seen)

    _, (ys, seen) = jax.lax.scan(tick, jnp.zeros_like(queue[0]), jnp.arange(schedule.ticks))
    m = jnp.arange(M)
    leaves = (m // S * R + R - 1) * S + m % S + S - 1  # the tick in which a micro-batch leaves the last stage
    done = jnp.where(own == S - 1, ys[leaves], 0)
    done = jax.lax.psum_scatter(done, AXIS, scatter_dimension=0, tiled=True)
    done = jnp.moveaxis(done.reshape(k, shape[0], n, *shape[3:]), 0, 2)
    return done.reshape(shape), jax.tree.map(lambda v: v.sum(0)[None], seen)


def _layers(arch: Architecture, compute: Compute, routed: bool, weights: Any, layer: Any, x: Array, mask: Mask) -> Any:
    """Some layers, one after the other, and what their routers saw."""
    block = Block(arch, compute, parent=None)
    angles = angles_of(arch, mask.q_positions, compute.dtype, mask.q_segments)

    def one(x: Array, own: Any) -> Any:
        made: Any = block.apply({"params": own[0]}, (x, None), own[1], mask, angles, mutable=["router"] * routed)
        ((x, _), _), told = made
        return x, told["router"]["mlp"]["seen"][0] if routed else ()

    if compute.remat != "none":
        one = jax.checkpoint(one, policy=REMAT[compute.remat], prevent_cse=False)
    x = constrain(x, compute.rules, "batch", "seq", "width")
    return jax.lax.scan(one, x, (weights, layer), unroll=compute.unroll)


def _by_round(schedule: Schedule, w: Array) -> Array:
    """This stage's layers [L/S, ..], which follow each other, for those it computes: [R, L/SR, ..].

    Layer l is computed in round l // (L/R) by stage l // (L/SR) % S. With one round that is where it lies; with more
    the weights move once a step, and their gradients back: an all-to-all of a stage's weights (up to 2 x where S does
    not divide R), small beside the micro-batches' work.
    """
    S, R = schedule.stages, schedule.rounds
    w = w.reshape(R, -1, *w.shape[1:])
    if R == 1:
        return w
    own, most = jax.lax.axis_index(AXIS), -(-R // S)  # pieces that go from one stage to another, at most
    first = lambda source, to: (to - source * R) % S  # noqa: E731  # of piece source R + k, k = first, first + S, ..
    sent = first(own, jnp.arange(S))[:, None] + S * jnp.arange(most)[None]
    got = jax.lax.all_to_all(w[jnp.minimum(sent, R - 1)], AXIS, 0, 0)
    number = jnp.arange(R) * S + own  # of the pieces to compute
    source = number // R
    return got[source, (number % R - first(source, own)) // S]
