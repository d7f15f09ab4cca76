"""What a step takes at best: FLOPs, bytes of memory and of each network axis, and the time of them all.

Formulas alone, so that a plan can be made without a compiler; with one, the network's bytes are those it compiled.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from model.flops import matmul_params, train_flops
from model.pipeline import PIPELINED
from model.pipeline import planned as pipeline_of
from model.tree import flatten
from train.planner.abstract import Planned
from train.planner.program import Collective
from train.recipes import kind_of

# What of a data sheet's rate a program can have: matrix products of any size on H100 and H200 reach 80 % (Stas Bekman's
# MAMF), copies 90 % of HBM, rings 88 % of NVLink (396 of 450 GB/s). Of other chips the same is assumed.
REACHABLE = {"compute": 0.8, "hbm": 0.9, "network": 0.88}
# Forward passes that the backward pass does again, of the matrix products.
REDONE = {"none": 0.0, "dots": 0.0, "full": 1.0}

Axes = tuple[str, ...]


@dataclass(frozen=True)
class Flow:
    """Collectives of one kind over the same axes, in a step on one device."""

    kind: str
    axes: Axes
    count: int
    moved: float  # bytes


@dataclass(frozen=True)
class Costs:
    """Of a step: model FLOPs over all devices, FLOPs with what is computed again, bytes and seconds of one device."""

    flops: float
    computed: float
    hbm_bytes: float
    seconds: Mapping[str, float]  # by resource: compute, hbm, and each network axis

    @property
    def overlapped(self) -> float:
        """Seconds if all resources work at the same time."""
        return max(self.seconds.values())

    @property
    def serial(self) -> float:
        """Seconds if network waits for compute: compute or memory, whichever is slower, and then each axis."""
        local = ("compute", "hbm")
        return max(self.seconds[name] for name in local) + sum(
            seconds for name, seconds in self.seconds.items() if name not in local
        )


def costs_of(planned: Planned, flows: Iterable[Flow]) -> Costs:
    """The roofline of a step whose network traffic is `flows`."""
    job, target = planned.job, planned.target
    devices = job.mesh.size
    flops, computed = flops_of(planned)
    rate = target.chip.bf16 / target.chip.cores / (1 if np.dtype(job.compute.dtype).itemsize <= 2 else 2)
    moved = hbm_of(planned)
    seconds = {
        "compute": computed / devices / (rate * REACHABLE["compute"]),
        "hbm": moved / (target.chip.hbm / target.chip.cores * REACHABLE["hbm"]),
    }
    for flow in flows:
        name = " x ".join(flow.axes)
        bandwidth = target.bandwidth(group_along(job.mesh, flow.axes)) * REACHABLE["network"]
        seconds[name] = seconds.get(name, 0.0) + flow.moved / bandwidth
    return Costs(flops, computed, moved, seconds)


def group_along(mesh: Any, axes: Axes) -> list[Any]:
    """The devices of the first group along these axes."""
    picked = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
    return list(np.asarray(mesh.devices[picked]).flat)


def flops_of(planned: Planned) -> tuple[float, float]:
    """(model FLOPs of a step, with those of what is computed again and of columns made before the loss). Rows are taken
    as full, of one document each."""
    job = planned.job
    tokens, length = float(planned.tokens), job.run.data.max_length
    context = tokens * (length + 1) / 2
    frozen = job.run.tune.method != "full"
    flops = train_flops(job.arch, tokens, context, frozen)
    forward = train_flops(job.arch, tokens, context, False) / 3
    passes = REDONE[job.compute.remat] + (job.recipe.columns.score is not None)
    return flops, flops + forward * passes


def hbm_of(planned: Planned) -> float:
    """Bytes that a device reads and writes in a step: gathered weights for each pass and micro-batch, the optimizer's
    arrays once each way, gradients, and activations (each product's result written once and read twice a pass)."""
    job, pieces = planned.job, planned.job.portion.microbatches
    width = np.dtype(job.compute.dtype).itemsize
    passes = 2 + REDONE[job.compute.remat]
    weights = sum(gathered(x, job) * width for x in jax.tree.leaves(job.params(planned.state)))
    trained, opt = bytes_of(planned.state.params), bytes_of(planned.state.opt)
    arch, e = job.arch, job.arch.experts
    heads = (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim
    products = heads + 3 * arch.d_model + 3 * (arch.d_ff if e is None else e.top_k * e.d_ff + e.shared_d_ff)
    split = math.prod(job.mesh.shape[axis] for axis in ("tensor", "stage") if axis in job.mesh.shape)
    activations = 3 * products * arch.num_layers * width * planned.tokens_per_device * pieces / split
    return weights * passes * pieces + 2 * (trained + opt) + 3 * trained + activations * passes


def bytes_of(tree: Any) -> int:
    """Bytes of a tree of arrays or shapes on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def gathered(x: Any, job: Any) -> int:
    """Elements of a weight on a device once the axes that split rows have given their parts."""
    local = math.prod(x.sharding.shard_shape(x.shape))
    return local * math.prod(job.mesh.shape[axis] for axis in split_over(x) if axis in job.rules.axes("batch"))


def split_over(x: Any) -> Axes:
    """The mesh axes, longer than 1, that an array is cut along."""
    names = [part if isinstance(part, tuple) else (part,) for part in x.sharding.spec if part]
    return tuple(axis for several in names for axis in several if x.sharding.mesh.shape[axis] > 1)


def flows_of(collectives: Iterable[Collective], shape: dict[str, int]) -> list[Flow]:
    """A compiled program's collectives by kind and axes."""
    found: dict[tuple[str, Axes], tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for one in collectives:
        key = one.kind, one.axes(shape)
        count, moved = found[key]
        found[key] = count + one.times, moved + one.moved
    return [Flow(*key, *numbers) for key, numbers in sorted(found.items())]


def theory(planned: Planned) -> list[Flow]:
    """The traffic that the layout needs: of weights split over axes that split rows an all-gather for each of the two
    passes and a reduce-scatter of the gradient; of weights that lie whole on such axes an all-reduce of the gradient;
    what tensor, context, expert and stage axes pass on of the activations. One tenth more is no surprise: norms, sums.
    Of a pipeline's layers, which lie where they are used, it needs the weights for every micro-batch, or once.
    """
    job = planned.job
    shape, pieces, width = dict(job.mesh.shape), job.portion.microbatches, np.dtype(job.compute.dtype).itemsize
    rows = tuple(axis for axis in (*job.rules.axes("batch"), *job.rules.axes("seq")) if shape[axis] > 1)
    flows: dict[tuple[str, Axes], tuple[int, float]] = defaultdict(lambda: (0, 0.0))

    def add(kind: str, axes: Axes, count: float | int, size: float | int) -> None:
        n = math.prod(shape[axis] for axis in axes)
        if n > 1:
            share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(kind, (n - 1) / n)
            before, moved = flows[kind, axes]
            flows[kind, axes] = before + round(count), moved + count * size * share

    trained, stacks = set(flatten(planned.state.params)), tuple(f"{name}/" for name in job.arch.groups)
    schedule = schedule_in(planned)
    for path, x in flatten(job.params(planned.state)).items():
        if x.ndim == 0:
            continue
        staged = schedule is not None and path.startswith(f"{PIPELINED}/")
        across = tuple(axis for axis in rows if not (staged and axis == "stage"))
        over = tuple(axis for axis in split_over(x) if axis in across)
        whole = tuple(axis for axis in across if axis not in over)
        layers = x.shape[0] // (shape["stage"] if staged else 1) if path.startswith(stacks) else 1  # each by itself
        local = math.prod(x.sharding.shard_shape(x.shape)) * width // layers
        size = local * math.prod(shape[axis] for axis in over)
        passes, sums = 2 * pieces * layers, pieces * layers
        if schedule is not None and staged and job.compute.pipeline_gather == "tick":
            passes, sums = passes * schedule.microbatches, sums * schedule.microbatches
        elif staged:  # kept for the backward pass
            passes = sums
        add("all-gather", over, passes, size)
        if path in trained:
            wide = 1 if job.run.optim.reduce_dtype == "compute" else max(1, x.dtype.itemsize // width)
            add("reduce-scatter", over, sums, size * wide)
            add("all-reduce", whole, layers, local * wide)
    _activations(planned, add, width, pieces)
    return [Flow(*key, *numbers) for key, numbers in sorted(flows.items())]


def schedule_in(planned: Planned) -> Any:
    """How its pipeline works, where it has one."""
    job = planned.job
    with jax.set_mesh(job.mesh):
        return pipeline_of(job.arch, job.compute, job.run.train.batch_size // job.portion.microbatches)


def _activations(planned: Planned, add: Any, width: int, pieces: int) -> None:
    """What the axes within a layer pass on, both ways and again where it is computed again."""
    job = planned.job
    arch, tokens = job.arch, planned.tokens_per_device
    again = REDONE[job.compute.remat]
    layers = arch.num_layers / job.mesh.shape["stage"]
    hidden = tokens * arch.d_model * width
    add("all-reduce", ("tensor",), pieces * layers * 2 * (2 + again), hidden)
    keys = 2 * tokens * arch.num_kv_heads * arch.head_dim * width * job.mesh.shape["context"] / job.mesh.shape["tensor"]
    add("collective-permute", ("context",), pieces * layers * (3 + again), keys)
    if arch.experts is not None:
        add("all-to-all", ("expert",), pieces * layers * (4 + 2 * again), hidden * arch.experts.top_k)
    if (stages := job.mesh.shape["stage"]) > 1:  # outside the pipeline each stage has its share of the rows
        rounds = schedule.rounds if (schedule := schedule_in(planned)) is not None else 1
        add("collective-permute", ("stage",), 2 * pieces * rounds, hidden * stages)
        for kind in ("all-gather", "reduce-scatter"):
            add(kind, ("stage",), 2 * pieces, hidden * stages)


def excess(made: Iterable[Flow], needed: Iterable[Flow]) -> dict[str, float]:
    """{axes: bytes that are moved along them / bytes that the layout needs}; inf where it needs none."""
    totals: list[dict[str, float]] = [defaultdict(float), defaultdict(float)]
    for total, flows in zip(totals, (made, needed), strict=True):
        for flow in flows:
            total[" x ".join(flow.axes)] += flow.moved
    first, second = totals
    return {axes: moved / second[axes] if second.get(axes) else math.inf for axes, moved in first.items()}


def decodes(planned: Planned) -> bool:
    """Whether the recipe also generates."""
    return kind_of(planned.job.run.objective) == "rollout"


def decode_floor(planned: Planned, rows: int, length: int) -> tuple[float, float, float]:
    """(bytes of all keys and values, seconds of one step at best, tokens a second): the weights and the cache, half
    full, are read once a step, over all devices."""
    job, target = planned.job, planned.target
    arch, width = job.arch, np.dtype(job.compute.dtype).itemsize
    per_token = (
        2 * arch.num_kv_heads * arch.head_dim if arch.latent is None else arch.latent.rank + arch.latent.rope_dim
    )
    cache = float(rows * length * arch.num_layers * per_token * width)
    weights = matmul_params(arch) * np.dtype(job.run.model.param_dtype).itemsize
    hbm = target.chip.hbm * target.chips * REACHABLE["hbm"]
    compute = 2 * matmul_params(arch) * rows / (target.chip.bf16 * target.chips * REACHABLE["compute"])
    seconds = max((weights + cache / 2) / hbm, compute)
    return cache, seconds, rows / seconds
