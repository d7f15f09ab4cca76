"""Which settings fit a target and are fastest: all ranked by formulas, the best few compiled."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import jax
from pydantic import ValidationError

from configs.errors import UsageError
from configs.schema import Run
from configs.source import show
from model.architecture import Architecture
from train.planner.abstract import Planned, changed
from train.planner.costs import Costs, costs_of, theory
from train.planner.plan import Plan, memory_parts, plan_of
from train.recipes import kind_of
from train.setup import portion_of

Change = Mapping[str, Any]
COMPILED = 3  # candidates that are compiled at most, until one fits
CHUNKS = (512, 2048)


@dataclass(frozen=True)
class Candidate:
    """Changes to a recipe, and what the formulas say of it."""

    change: Change
    planned: Planned
    peak: float
    costs: Costs

    @property
    def override(self) -> str:
        """The changes as arguments of a command."""
        return " ".join(f"{key}={show(value)}" for key, value in self.change.items())


def apply(run: Run, change: Change) -> Run | None:
    """The run with some knobs changed; None where the schema refuses it."""
    values = run.model_dump()
    for key, value in change.items():
        section, _, name = key.partition(".")
        values[section][name] = value
    try:
        return Run.model_validate(values)
    except ValidationError:
        return None


def meshes(arch: Architecture, devices: int, rows: int, per_host: int, length: int) -> Iterator[dict[str, int]]:
    """Ways to cut devices into data x fsdp x context x expert x tensor that a model of this shape can take."""
    e = arch.experts
    tensors = [n for n in (1, 2, 4, 8) if arch.num_kv_heads % n == 0 and n <= max(1, per_host)]
    contexts = [n for n in (1, 2, 4, 8) if length // n >= 4096 or n == 1]
    experts = [n for n in (1, 2, 4, 8, 16, 32, 64) if e is not None and e.count % n == 0] or [1]
    for tensor, context, expert in product(tensors, contexts, experts):
        inner = tensor * context * expert
        if devices % inner:
            continue
        outer = devices // inner
        for fsdp in (outer >> shift for shift in range(outer.bit_length())):
            if fsdp and outer % fsdp == 0 and rows % outer == 0:
                yield {"data": outer // fsdp, "fsdp": fsdp, "context": context, "expert": expert, "tensor": tensor}


def candidates(planned: Planned, most: int | None = None) -> Iterator[Candidate]:
    """Everything that is tried, estimated; most: how many knobs may change."""
    job, run, target = planned.job, planned.job.run, planned.target
    rows, length = planned.batch["tokens"].shape
    per_host = target.chip.per_host * target.chip.cores
    now = {f"mesh.{axis}": job.mesh.shape[axis] for axis in ("data", "fsdp", "context", "expert", "tensor")}
    now |= {"optim.state_dtype": run.optim.state_dtype, "model.remat": job.compute.remat}
    now |= {"train.microbatches": job.portion.microbatches, "objective.loss_chunk": run.objective.loss_chunk}
    shapes = list(meshes(job.arch, job.mesh.size, rows, per_host, length)) or [dict(job.mesh.shape)]
    stored = kind_of(run.objective) != "rollout"
    pieces = [1 << i for i in range(rows.bit_length()) if stored and rows % (1 << i) == 0] or [job.portion.microbatches]
    for shape, dtype in product(shapes, dict.fromkeys(("float32", "bfloat16", run.optim.state_dtype))):
        mesh = {f"mesh.{axis}": size for axis, size in shape.items() if f"mesh.{axis}" in now}
        outer = _only({**mesh, "optim.state_dtype": dtype}, now)
        base = lay(planned, outer)
        if base is None:
            continue
        inner = product(
            pieces, dict.fromkeys(("none", "dots", "full")), dict.fromkeys((*CHUNKS, now["objective.loss_chunk"]))
        )
        for count, remat, chunk in inner:
            more = {"train.microbatches": count, "model.remat": remat, "objective.loss_chunk": chunk}
            change = outer | _only(more, now)
            knobs = len({key.partition(".")[0] if key.startswith("mesh.") else key for key in change})
            if most is None or knobs <= most:
                if (made := _with(base, change, remat)) is not None:
                    yield estimate(change, made)


def _only(change: Change, now: Change) -> dict[str, Any]:
    return {key: value for key, value in change.items() if value != now[key]}


def lay(planned: Planned, change: Change) -> Planned | None:
    """The job with changes that lay it out anew; None where it cannot be."""
    if not change:
        return planned
    whole = {f"mesh.{axis}": size for axis, size in planned.job.mesh.shape.items()} | dict(change)
    run = apply(planned.job.run, whole if any(key.startswith("mesh.") for key in change) else change)
    try:
        return None if run is None else changed(planned, run)
    except UsageError:  # some axis does not divide
        return None


def _with(base: Planned, change: Change, remat: str) -> Planned | None:
    """The job with changes that leave its arrays as they are; None where rows do not divide."""
    run = apply(base.job.run, change)
    if run is None:
        return None
    job = base.job
    stored = kind_of(run.objective) != "rollout"
    portion = portion_of(run) if stored else job.portion
    if portion.rows % math.prod(job.mesh.shape[axis] for axis in job.rules.axes("batch")):
        return None
    compute = replace(job.compute, remat=remat)
    return replace(base, job=replace(job, run=run, compute=compute, portion=portion))


def estimate(change: Change, planned: Planned) -> Candidate:
    """A candidate by formulas."""
    return Candidate(change, planned, float(sum(memory_parts(planned).values())), costs_of(planned, theory(planned)))


def ranked(planned: Planned, most: int | None = None, share: float = 1.0) -> list[Candidate]:
    """Those that fit by the formulas, the fastest first, of equals the one with the fewest changes; share: of a
    device's memory that they may take by the formulas."""
    limit = planned.target.memory * share
    fitting = [one for one in candidates(planned, most) if one.peak <= limit]
    return sorted(fitting, key=lambda one: (round(one.costs.serial, 4), len(one.change), one.peak))


# What saves most where nothing milder does.
LAST = (
    {"model.param_dtype": "bfloat16", "optim.state_dtype": "bfloat16"},
    {"tune.method": "lora"},
    {"tune.method": "lora", "model.param_dtype": "bfloat16"},
)


def cheapest(planned: Planned, share: float = 1.0) -> str | None:
    """The change of at most two knobs that fits by the formulas and costs the least time, as an override; where none
    does, with fewer or narrower weights to train."""
    for more in ({}, *LAST):
        if (base := lay(planned, more)) is None:
            continue
        for most in (1, 2):
            fitting = [one for one in ranked(base, most, share) if one.change or more]
            if fitting:
                return replace(fitting[0], change={**more, **fitting[0].change}).override
    return None


def search(planned: Planned, compiled: bool, tokens: float | None = None, price: float | None = None) -> Plan:
    """The plan of the fastest candidate that fits, with the override that makes it; the best few are compiled until one
    fits. UsageError when none does by the formulas."""
    best = ranked(planned)
    if not best:
        raise UsageError(
            f"--search: nothing that was tried fits {planned.target.text} by the formulas; with fewer weights to train "
            f"(tune.method=lora), smaller batches or more devices it might; tried: mesh, model.remat, "
            "train.microbatches, objective.loss_chunk, optim.state_dtype"
        )
    tried: list[dict[str, Any]] = []
    plan: Plan = {}
    for one in best[: COMPILED if compiled else 1]:
        made = changed(one.planned, one.planned.job.run)  # recipe and loss anew, with these settings
        plan = plan_of(made, compiled, tokens, price)
        tried.append({"override": one.override, "peak": plan["memory"]["peak"], "estimated": one.peak})
        if plan["memory"]["fits"]:
            break
        jax.clear_caches()
    return {**plan, "override": tried[-1]["override"], "tried": tried, "candidates": len(best)}
