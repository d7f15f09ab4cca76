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

from configs.errors import UsageError
from model.architecture import Architecture
from model.block import Block
from model.compute import REMAT, Compute
from model.mask import Mask
from model.pattern import angles_of, layers_of
from sharding.place import constrain
from sharding.rules import Rules

AXIS = "stage"
PIPELINED = "layers"  # the group of layers that is; those before it are computed with the embedding
PICKING = ("dynamic_slice", "squeeze", "reshape")


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


def check_schedule(stages: int, rows: int, microbatches: int | None) -> None:
    """Raise UsageError where such a batch (see schedule_of) cannot flow through the stages."""
    if schedule_of(stages, rows, microbatches) is None:
        allowed = [str(m) for m in range(stages, rows + 1, stages) if rows % m == 0]
        given = "null" if microbatches is None else microbatches
        raise UsageError(
            f"mesh.pipeline_microbatches is {given}, mesh.stage={stages} and {rows} rows a micro-batch for each "
            f"pipeline: allowed are multiples of mesh.stage that divide the rows: {', '.join(allowed) or 'none'}"
        )


def check_stages(arch: Architecture, stages: int, rounds: int) -> None:
    """Raise UsageError where such a model cannot be cut into stages."""
    if stages == 1:
        return
    count = len(arch.groups[PIPELINED])
    if count % (stages * rounds):
        fit = [str(n) for n in range(2, count + 1) if count % (n * rounds) == 0]
        times = f" x mesh.pipeline_repeats={rounds}" if rounds > 1 else ""
        behind = f" behind the {arch.dense_layers} dense ones" if arch.dense_layers else ""
        raise UsageError(
            f"mesh.stage={stages}{times} does not divide the model's {count} layers{behind}; "
            f"it may be {', '.join(fit) or 1}"
        )


def planned(arch: Architecture, compute: Compute, rows: int) -> Schedule | None:
    """The schedule of such a batch on the mesh in context; None: the layers run one after the other.

    That is also how the cache is filled and read, whose steps have no micro-batches: right, but each layer's weights
    are fetched from the stage that has them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    stages = 1 if mesh.empty else mesh.shape.get(AXIS, 1)
    if stages == 1 or len(arch.groups[PIPELINED]) % (stages * compute.pipeline_repeats):
        return None
    others = math.prod(mesh.shape[axis] for axis in compute.rules.axes("batch") if axis != AXIS)
    if rows % others:
        return None
    return schedule_of(stages, rows // others, compute.pipeline_microbatches, compute.pipeline_repeats)


def pipeline(
    arch: Architecture,
    compute: Compute,
    schedule: Schedule,
    weights: Any,
    x: Float[Array, "B T D"],
    mask: Mask,
    routed: bool = False,
) -> tuple[Float[Array, "B T D"], Any]:
    """The residual stream behind these layers; routed: and what their routers saw, by layer.

    Manual over `stage` and over axes whose devices only have other rows: so their gradients are summed once, not after
    each micro-batch. Those are `data`, and `fsdp` where weights are gathered once a step. Within, the other axes are
    the partitioner's, or other shard_maps'. Outside, the batch is split over `stage` as well (sharding/rules.py), so
    that embedding and head are nobody's work twice.
    """
    columns, whole = jax.tree.flatten(mask)
    apart = ("data", "fsdp") if compute.pipeline_gather == "step" else ("data",)
    rows = tuple(axis for axis in compute.rules.axes("batch") if axis in apart)
    inner = replace(compute, rules=compute.rules.without(AXIS, *rows))
    cut = partial(_cut, schedule, compute.rules.without(AXIS), _lead(compute))
    run = jax.shard_map(
        partial(_stage, arch, inner, schedule, routed, whole),
        in_specs=(P(AXIS), P(AXIS, None, rows), P(AXIS, None, rows)),
        out_specs=(P(AXIS, None, rows), P(AXIS, rows)),
        axis_names={AXIS, *rows},
        check_vma=False,
    )
    queues = cut(x), [cut(column) for column in columns]
    # what all stages have, made out here: of all-gathers and reduce-scatters within, XLA would gather the other axes
    out, seen = run(weights, *jax.tree.map(lambda v: jnp.broadcast_to(v, (schedule.stages, *v.shape)), queues))
    out = _joined(out.sum(0), schedule, _lead(compute))
    # [S, rows, R, L/SR, ..] -> [L, ..]
    return out, jax.tree.map(lambda v: v.sum(1).swapaxes(0, 1).reshape(-1, *v.shape[4:]), seen)


def _lead(compute: Compute) -> int:
    """How many devices split the batch before `stage` does."""
    axes, sizes = compute.rules.axes("batch"), jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in axes[: axes.index(AXIS)]) if AXIS in axes else 1


def _cut(schedule: Schedule, rules: Rules, lead: int, v: Array) -> Array:
    """[B, ..] -> [M, B / M, ..], each device's own rows in as few micro-batches as can be; whole on every stage."""
    S, M = schedule.stages, schedule.microbatches
    v = v.reshape(lead, S, -1, M // S, *v.shape[1:])
    v = jnp.moveaxis(v, (1, 3), (0, 1))
    v = v.reshape(M, -1, *v.shape[4:])
    return constrain(v, rules, None, *(("batch", "stream", "width") if v.ndim == 4 else ("batch", "seq")))


def _joined(v: Array, schedule: Schedule, lead: int) -> Array:
    """The inverse of _cut."""
    S, M = schedule.stages, schedule.microbatches
    v = v.reshape(S, M // S, lead, -1, *v.shape[2:])
    return jnp.moveaxis(v, (0, 1), (1, 3)).reshape(-1, *v.shape[4:])


def _stage(
    arch: Architecture, compute: Compute, schedule: Schedule, routed: bool, mask: Any, weights: Any, x: Array, ids: Any
) -> tuple[Array, Any]:
    """What one stage does with its layers [L/S, ..] and all micro-batches [1, M, B / M, ..]; mask: that of the
    columns `ids`. The stream behind the last layer is 0 but on the last stage."""
    S, M, R = schedule.stages, schedule.microbatches, schedule.rounds
    own = jax.lax.axis_index(AXIS)
    queue, ids = jax.tree.map(lambda v: v[0], (x, ids))
    pieces = jax.tree.map(partial(_by_round, schedule), weights)
    which = jax.tree.map(lambda v: v.reshape(R * S, -1), layers_of(arch, arch.groups[PIPELINED]))

    def tick(received: Array, t: Array) -> Any:
        at = jnp.clip(t - own, 0, M * R - 1)
        r, m = at // S % R, at // (S * R) * S + at % S
        entering = jnp.where((own == 0) & (r == 0), queue[m], received)
        of = lambda v: v[0] if R == 1 else jax.lax.dynamic_index_in_dim(v, r, keepdims=False)  # noqa: E731
        mine, layer = jax.tree.map(of, pieces), jax.tree.map(lambda v: v[r * S + own], which)
        its = jax.tree.unflatten(mask, [v[m] for v in ids])
        y, seen = _layers(arch, compute, routed, mine, layer, entering, its)
        real = (t >= own) & (t - own < M * R)  # else the stage waits: what it computes is nobody's
        mark = (jnp.arange(R) == r) & real
        seen = jax.tree.map(lambda v: jnp.einsum("R,...->R...", mark.astype(v.dtype), v), seen)
        return jax.lax.ppermute(y, AXIS, [(i, (i + 1) % S) for i in range(S)]), (y, seen)

    if R > 1:  # else each tick would keep a copy of the weights that it picked
        tick = jax.checkpoint(tick, policy=lambda kind, *_, **__: kind.name not in PICKING, prevent_cse=False)
    _, (ys, seen) = jax.lax.scan(tick, jnp.zeros_like(queue[0]), jnp.arange(schedule.ticks))
    m = jnp.arange(M)
    leaves = (m // S * R + R - 1) * S + m % S + S - 1  # the tick in which a micro-batch leaves the last stage
    done = jnp.where(own == S - 1, ys[leaves], 0)
    return done[None], jax.tree.map(lambda v: v.sum(0)[None, None], seen)


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
    x = constrain(x, compute.rules, "batch", "stream", "width")
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
    got = []
    for d in range(S):  # an all-to-all; but of one over some of the axes XLA would gather the others
        sent = first(own, (own + d) % S) + S * jnp.arange(most)
        some = w[jnp.minimum(sent, R - 1)]
        got.append(jax.lax.ppermute(some, AXIS, [(i, (i + d) % S) for i in range(S)]) if d else some)
    number = jnp.arange(R) * S + own  # of the pieces to compute
    source = number // R
    return jnp.stack(got)[(own - source) % S, (number % R - first(source, own)) // S]
