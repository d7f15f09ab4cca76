"""mesh: auto. The sizes of the mesh's axes from numbers alone: devices, model, batch. Explains what it chose.

All meshes that divide everything are weighed by a rough step time (what a chip computes at best against what its links
carry at best) among those that fit the memory. Rough is enough to rank them: `purestep plan` measures.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from configs.errors import UsageError
from sharding.mesh import AXES

GIB = 2.0**30
USED = 0.9  # of the memory: the rest is for fragments and the runtime
NEAR = 1.02  # step times that differ by less are alike: the simpler mesh is taken, then the one of less memory


@dataclass(frozen=True)
class Hardware:
    """Devices that are alike; bytes/s are one device's, one way: to its neighbours, and beyond its slice or host."""

    count: int
    memory: float | int  # bytes of a device
    flops: float | int  # FLOP/s of a device at best
    near: float | int = 1e11
    far: float | int = 6e9
    slice: int = 0  # devices with the fast network between them; 0: all


@dataclass(frozen=True)
class Workload:
    """A model and a batch: what must divide, and how much there is."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    d_ff: int
    vocab: int
    rows: int  # of a micro-batch, over all devices
    length: int  # tokens of a row
    parameters: float | int  # of the layers
    table_parameters: float | int  # of embedding and head
    state: float | int = 16.0  # bytes a parameter: weight, gradient, moments
    itemsize: int = 2  # bytes of an activation
    kept: float | int = 1.0  # of a layer's activations, in widths a token, until the backward pass
    work: float | int = 16.0  # of the layer that is computed, likewise
    logits: float | int = 0.0  # bytes of the head's chunk
    active: float | int = 1.0  # of the layers' parameters, those a token is multiplied with
    passes: float | int = 3.0  # forward passes' worth of FLOPs in a step; 4 with everything recomputed
    experts: int = 0
    top_k: int = 0
    before: int = 0  # of the layers, those that come before a pipeline
    repeats: int = 1  # of a pipeline


@dataclass(frozen=True)
class Choice:
    """A mesh, what it needs on each device and how long it is about to take."""

    shape: dict[str, int]
    memory: float | int
    seconds: float
    fits: bool
    why: tuple[str, ...]


def auto_mesh(
    work: Workload,
    hardware: Hardware,
    fixed: Mapping[str, int] | None = None,
    multiples: Mapping[str, int] | None = None,
) -> Choice:
    """The mesh of all devices that should be fastest among those that fit, or the one that needs least memory.

    fixed: axes that are given; multiples: numbers that divide an axis. UsageError where no mesh divides everything.
    """
    parts = (multiples or {}).items()
    shapes = [s for s in _shapes(hardware.count, dict(fixed or {})) if not any(s[axis] % n for axis, n in parts)]
    able = [shape for shape in shapes if not obstacles(work, shape)]
    if not able:
        raise UsageError(_none(work, hardware, shapes, fixed or {}))
    weighed = [(shape, memory_of(work, shape), seconds_of(work, hardware, shape)) for shape in able]
    best = _best(weighed, hardware)
    shape, memory, seconds = best
    why = [_told(work, hardware, shape, memory)]
    for axis, size in shape.items():  # the two that rows go over need no reason
        if size > 1 and axis not in ("data", "fsdp") and axis not in (fixed or {}):
            without = [one for one in weighed if one[0][axis] == 1]
            why.append(f"{axis} {size}: {_reason(without, best, hardware)}")
    return Choice(shape, memory, seconds, memory <= USED * hardware.memory, tuple(why))


def _best(
    weighed: list[tuple[dict[str, int], float, float]], hardware: Hardware
) -> tuple[dict[str, int], float, float]:
    fitting = [one for one in weighed if one[1] <= USED * hardware.memory]
    if not fitting:
        return min(weighed, key=lambda one: (one[1], one[2]))
    limit = NEAR * min(seconds for _, _, seconds in fitting)
    alike = [one for one in fitting if one[2] <= limit]
    return min(alike, key=lambda one: (sum(size > 1 for size in one[0].values()), one[1], one[2]))


def _shapes(count: int, fixed: dict[str, int]) -> Iterator[dict[str, int]]:
    """All meshes of so many devices with the fixed axes as they are."""
    open_axes = [axis for axis in AXES if axis not in fixed]

    def cut(left: int, axes: list[str]) -> Iterator[dict[str, int]]:
        if not axes:
            if left == 1:
                yield {}
            return
        for size in [left] if len(axes) == 1 else [n for n in range(1, left + 1) if left % n == 0]:
            for rest in cut(left // size, axes[1:]):
                yield {axes[0]: size, **rest}

    taken = math.prod(fixed.values())
    if count % taken == 0:
        for some in cut(count // taken, open_axes):
            yield {axis: some.get(axis, fixed.get(axis, 1)) for axis in AXES}


def obstacles(work: Workload, shape: Mapping[str, int]) -> list[str]:
    """What such a mesh does not divide, in words."""
    rows = math.prod(shape[axis] for axis in ("data", "stage", "fsdp", "expert"))
    tensor, expert, context, stage = shape["tensor"], shape["expert"], shape["context"], shape["stage"]
    split = stage * shape["fsdp"] * expert
    return [
        f"{what} ({size}) over {over}"
        for what, size, over, parts in (
            ("rows of a micro-batch", work.rows, "data x stage x fsdp x expert", rows),
            ("width", work.width, "stage x fsdp x expert", split),
            ("heads", work.heads, "tensor", tensor),
            ("kv heads", work.kv_heads, "tensor", tensor),
            ("d_ff", work.d_ff, "tensor", tensor),
            ("vocabulary", work.vocab, "tensor", tensor),
            ("layers", work.layers - work.before, "stage x pipeline_repeats", stage * work.repeats if stage > 1 else 1),
            ("tokens of a row", work.length, "2 x context", 2 * context if context > 1 else 1),
            ("tokens of a row", work.length, "context x tensor", context * tensor),
            ("experts", work.experts or 1, "expert", expert),
        )
        if size % parts
    ]


def memory_of(work: Workload, shape: Mapping[str, int]) -> float:
    """Bytes on each device."""
    parts = shape["stage"] * shape["fsdp"] * shape["expert"] * shape["tensor"]
    before = work.parameters * work.before / work.layers  # which every stage has
    state = work.state * (work.parameters + work.table_parameters + before * (shape["stage"] - 1)) / parts
    # a layer's weights, gathered, twice: the next one comes while this one is used
    gathered = 2 * work.itemsize * work.parameters / (work.layers * shape["tensor"] * shape["expert"])
    tokens = tokens_of(work, shape)
    stream = tokens * work.width * work.itemsize
    # of a pipeline each stage keeps its layers' inputs for all micro-batches
    kept = stream * work.layers * work.kept / shape["tensor"]
    queue = 3 * stream * shape["stage"] if shape["stage"] > 1 else 0
    working = stream * work.work / shape["tensor"] + work.logits
    return state + gathered * (shape["fsdp"] > 1) + kept + queue + working


def tokens_of(work: Workload, shape: Mapping[str, int]) -> float:
    """Tokens of a micro-batch for each device that splits rows or their tokens."""
    return work.rows * work.length / math.prod(shape[axis] for axis in AXES if axis != "tensor")


def seconds_of(work: Workload, hardware: Hardware, shape: Mapping[str, int]) -> float:
    """A micro-batch's time: what is computed, with the weights' traffic beside it, and the activations' between."""
    data, stage, fsdp, context, expert, tensor = (shape[axis] for axis in AXES)
    tokens = tokens_of(work, shape) * stage  # a stage has all rows, and 1 / stage of the layers
    layers = work.layers / stage
    matmul = work.active * work.parameters + work.table_parameters
    flops = 2 * matmul * work.rows * work.length
    flops += 2 * work.rows * work.length**2 * work.heads * work.head_dim * work.layers  # causal: half of 4
    compute = work.passes * flops / hardware.count / hardware.flops
    if stage > 1:
        parts = 2 * stage if work.rows % (2 * stage * data * fsdp * expert) == 0 else stage
        compute *= (parts + stage - 1) / parts
    wire = lambda axis, size: size * (shape[axis] - 1) / shape[axis] / _bandwidth(hardware, shape, axis)  # noqa: E731
    own = work.itemsize * (work.parameters / (stage * expert) + work.table_parameters) / tensor
    rounds = stage if stage > 1 else 1  # weights are gathered again for each of a pipeline's micro-batches
    weights = wire("fsdp", 3 * own * rounds) + wire("data", 2 * own / fsdp)
    stream = tokens * work.width * work.itemsize
    exchange = wire("tensor", 8 * layers * stream)  # in and out of attention and MLP, both ways
    kv = 2 * tokens * context * work.kv_heads * work.head_dim / tensor * work.itemsize
    exchange += wire("context", 3 * layers * kv)
    exchange += wire("expert", 4 * layers * stream * work.top_k)
    exchange += wire("stage", 4 * stream)
    return max(compute, weights) + exchange


def _bandwidth(hardware: Hardware, shape: Mapping[str, int], axis: str) -> float:
    """Of an axis's ring: the slow network's where it and the axes inside it do not fit one slice."""
    inner = math.prod(shape[name] for name in AXES[AXES.index(axis) :])
    return hardware.near if not hardware.slice or inner <= hardware.slice else hardware.far


def _told(work: Workload, hardware: Hardware, shape: Mapping[str, int], memory: float) -> str:
    axes = ", ".join(f"{axis} {size}" for axis, size in shape.items() if size > 1) or "one device"
    need = f"about {memory / GIB:.1f} of {hardware.memory / GIB:.1f} GiB each"
    poor = "" if memory <= USED * hardware.memory else ": it does not fit, but no other mesh needs less"
    return f"{axes} ({hardware.count} devices, {need}{poor}; {work.rows} rows of {work.length} tokens)"


def _reason(
    without: list[tuple[dict[str, int], float, float]], best: tuple[dict[str, int], float, float], hardware: Hardware
) -> str:
    """Why an axis is there: what the best mesh without it would be."""
    if not without:
        return "no mesh without it divides rows, heads and layers"
    _, memory, seconds = _best(without, hardware)
    if memory > USED * hardware.memory:
        return f"without it the best mesh needs {memory / GIB:.1f} GiB on each device"
    return f"without it a step would take {seconds / best[2]:.2f} x as long"


def _none(work: Workload, hardware: Hardware, shapes: list[dict[str, int]], fixed: Mapping[str, int]) -> str:
    given = f" with {', '.join(f'{a}={n}' for a, n in fixed.items())}" if fixed else ""
    if not shapes:
        return f"mesh: auto{given}: no mesh of {hardware.count} devices has these axes (and mesh.dcn)"
    nearest = min((obstacles(work, shape) for shape in shapes), key=len)
    return (
        f"mesh: auto{given}: no mesh of {hardware.count} devices divides everything; the nearest does not divide "
        f"{'; '.join(nearest)}. Usual cause: train.batch_size in rows is no multiple of the devices"
    )
