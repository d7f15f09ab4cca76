"""A plan: what a recipe's step needs on a target, as numbers that a script can read (`--json`)."""

import json
import math
import re
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import jax

from configs.errors import UsageError
from configs.schema import Run
from train.planner.abstract import Planned, lower, make_abstract
from train.planner.costs import Costs, Flow, bytes_of, costs_of, decodes, excess, flows_of, theory
from train.planner.decoding import parse_cache, plan_decoding, rollout_of
from train.planner.program import Program
from train.planner.targets import INSTALL, USABLE, Target, has_compiler
from train.preflight import estimate_memory

Plan = dict[str, Any]


def make_plan(
    run: Run,
    target: Target,
    tokens: float | None = None,
    price: float | None = None,
    find: bool = False,
    decode: str | None = None,
) -> Plan:
    """Lay the recipe out on the target, compile its step if the compiler is there, and say what it needs.

    tokens: how many are to be trained on; default train.steps of full batches. price: of a chip and hour.
    find: search for the settings that fit and are fastest. decode: ROWSxLENGTH of a decoding step to plan beside it.
    UsageError when weights, gradients and optimizer alone exceed the devices.
    """
    compiled, wanted = has_compiler(target), None if decode is None else parse_cache(decode)
    planned = make_abstract(run, target, None if compiled else stand_ins(target))
    if find:
        from train.planner.search import search

        return search(planned, compiled, tokens, price)
    check_fits(planned)
    plan = plan_of(planned, compiled, tokens, price)
    if wanted is not None or decodes(planned):
        rows, length = wanted or rollout_of(planned)
        plan["decode"] = plan_decoding(planned, rows, length, compiled)
    memory = plan["memory"]
    if not memory["fits"]:
        from train.planner.search import cheapest

        estimated = sum(memory_parts(planned).values())  # the formulas are as far off for a similar step
        plan["change"] = cheapest(planned, min(1.0, estimated / memory["peak"]))
    return plan


def plan_of(planned: Planned, compiled: bool, tokens: float | None = None, price: float | None = None) -> Plan:
    """The plan of a job that is laid out; not compiled: by formulas alone."""
    parts, flows, seconds = memory_parts(planned), theory(planned), 0.0
    needed, peak = flows, float(sum(parts.values()))
    if compiled:
        began = time.perf_counter()
        program = compile_step(planned)
        if isinstance(program, float):  # the compiler gave up: it needs so much
            peak = max(program, planned.target.memory + 1)
        else:
            text, shape = program.as_text(), dict(planned.job.mesh.shape)
            flows = flows_of(Program(text, planned.job.portion.microbatches).collectives, shape)
            peak = peak_of(program.memory_analysis())
        compiled, seconds = not isinstance(program, float), time.perf_counter() - began
        parts = spread(parts, peak)
    costs, limit = costs_of(planned, flows), planned.target.memory
    return {
        "recipe": planned.job.run.objective.type,
        "model": planned.job.run.model.source,
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(planned.job.params(planned.state))),
        "trained": sum(math.prod(x.shape) for x in jax.tree.leaves(planned.state.params)),
        **describe_target(planned),
        "compiled": compiled,
        "compile_seconds": seconds,
        "install": None if has_compiler(planned.target) else INSTALL,
        "batch": describe_batch(planned),
        "memory": {"parts": parts, "peak": peak, "limit": limit, "fits": peak <= limit, "room": limit - peak},
        "collectives": [asdict(flow) for flow in flows],
        "theory": [asdict(flow) for flow in needed],
        "excess": excess(flows, needed) if compiled else {},
        **expected(planned, costs, tokens, price),
        "assumed": [*planned.assumed, *assumptions(planned)],
    }


def compile_step(planned: Planned) -> Any:
    """The compiled step; of one that the compiler cannot fit into the device's memory, the bytes that it wants."""
    try:
        return lower(planned).compile()
    except jax.errors.JaxRuntimeError as error:
        said = str(error)
        wanted = re.search(r"\((\d+(?:\.\d+)?)([MGT])\)", said)
        if "RESOURCE_EXHAUSTED" not in said or wanted is None:
            raise
        arguments = sum(memory_parts(planned)[name] for name in EXACT)
        return float(wanted[1]) * {"M": 2**20, "G": 2**30, "T": 2**40}[wanted[2]] + arguments


def stand_ins(target: Target) -> list[Any]:
    """Devices in name, for a mesh: nothing is compiled for them."""
    return [_StandIn(target, number) for number in range(target.size)]


class _StandIn:
    """A device in name."""

    platform = "cpu"

    def __init__(self, target: Target, number: int):
        per_host = target.chip.per_host * target.chip.cores
        self.id, self.process_index, self.device_kind = number, number // per_host, target.chip.device
        chip, places = number // target.chip.cores, []
        for extent in target.shape:
            chip, at = divmod(chip, extent)
            places.append(at)
        self.coords = tuple(places)


def memory_parts(planned: Planned) -> dict[str, int]:
    """Bytes per device by part: exact for what is an argument of the step, formulas for the rest."""
    job, state = planned.job, planned.state
    found = estimate_memory(job, state)
    return {
        "params": found["weights"],
        "optimizer": found["optimizer"],
        "carried": bytes_of(state.carried),
        "batch": bytes_of(planned.batch),
        **{name: found[name] for name in ("gradients", "activations", "logits")},
    }


EXACT = ("params", "optimizer", "carried", "batch")


def spread(parts: dict[str, int], peak: float) -> dict[str, float]:
    """The parts with what the compiler found: what is no argument shares what is left of the peak as the formulas have
    it; they may not all live at the same time."""
    exact = {name: float(parts[name]) for name in EXACT}
    rest = max(0.0, peak - sum(exact.values()))
    guessed = {name: size for name, size in parts.items() if name not in EXACT}
    total = sum(guessed.values()) or 1
    return exact | {name: rest * size / total for name, size in guessed.items()}


def peak_of(found: Any) -> float:
    """The most bytes that live at one time, as the compiler lays them out; what is donated counts once."""
    whole = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    whole += found.temp_size_in_bytes + found.generated_code_size_in_bytes
    return float(max(whole, getattr(found, "peak_memory_in_bytes", 0) or 0))


def check_fits(planned: Planned) -> None:
    """Raise UsageError where what is there between steps exceeds a device: nothing needs to be compiled for that."""
    parts, limit = memory_parts(planned), planned.target.memory
    needed = parts["params"] + parts["optimizer"] + parts["carried"]
    if needed <= limit:
        return
    from train.planner.search import cheapest

    change = cheapest(planned)
    hint = f"the cheapest change that would fit: {change}" if change else "no single change that is known would fit"
    raise UsageError(
        f"--target {planned.target.text}: weights and optimizer state alone take {gib(needed)} of a device's "
        f"{gib(limit)}: {gib(needed - limit)} too much; {hint}"
    )


def gib(size: float | int) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB"


def describe_target(planned: Planned) -> Plan:
    """The hardware and the mesh on it."""
    target, chip = planned.target, planned.target.chip
    return {
        "target": {
            "name": target.text, "chips": target.chips, "devices": target.size, "memory": target.memory,
            "bf16_flops": chip.bf16, "fp8_flops": chip.fp8, "hbm": chip.hbm, "link": chip.link, "source": chip.source,
        },
        "mesh": {axis: size for axis, size in planned.job.mesh.shape.items() if size > 1},
        "compute": {
            "dtype": str(jax.numpy.dtype(planned.job.compute.dtype)), "remat": planned.job.compute.remat,
            "attention": planned.job.compute.attention,
        },
    }  # fmt: skip


def describe_batch(planned: Planned) -> Plan:
    """How much a step computes."""
    rows, length = planned.batch["tokens"].shape
    return {
        "rows": rows,
        "length": length,
        "microbatches": planned.job.portion.microbatches,
        "tokens": planned.tokens,
        "tokens_per_device_at_once": planned.tokens_per_device,
    }


def expected(planned: Planned, costs: Costs, tokens: float | None, price: float | None) -> Plan:
    """The times that a roofline allows, and what a number of tokens takes."""
    target, run = planned.target, planned.job.run
    if tokens is None and run.train.steps is not None:
        tokens = float(run.train.steps) * planned.tokens
    peak = target.chip.bf16 * target.chips
    found: Plan = {
        "flops": costs.flops,
        "flops_computed": costs.computed,
        "seconds": dict(costs.seconds),
    }
    ways: Plan = {}
    for name, seconds in (("overlapped", costs.overlapped), ("serial", costs.serial)):
        rate = planned.tokens / seconds
        way = {"step_seconds": seconds, "mfu": costs.flops / seconds / peak, "tokens_per_second": rate}
        if tokens is not None:
            hours = tokens / rate / 3600
            way |= {"hours": hours, "chip_hours": hours * target.chips}
            if price is not None:
                way["cost"] = hours * target.chips * price
        ways[name] = way
    return {**found, "expected": ways, "tokens": tokens, "price": price}


def assumptions(planned: Planned) -> Iterable[str]:
    """What the expected numbers rest on."""
    from train.planner.costs import REACHABLE

    yield (
        f"reached of the data sheet: {REACHABLE['compute']:.0%} of the FLOP/s, {REACHABLE['hbm']:.0%} of the memory's "
        f"bandwidth, {REACHABLE['network']:.0%} of the links'"
    )
    yield "rows are full, one document each; attention computes no masked block"
    yield "overlapped: network beside compute; serial: one after the other; the truth is between them, or slower"
    if planned.target.chip.kind == "gpu":
        yield (
            f"programs may take {USABLE['gpu']:.0%} of the memory (XLA_PYTHON_CLIENT_MEM_FRACTION={USABLE['gpu']}); "
            f"a network card of {planned.target.chip.network / 1e9:.0f} GB/s for each GPU"
        )
    if planned.target.chip.kind == "tpu":
        yield f"programs may take {USABLE['tpu']:.0%} of the memory"


def dumps(plan: Plan) -> str:
    """The plan as JSON; what is infinite is null."""
    return json.dumps(_finite(plan), indent=1)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flows_in(plan: Plan, key: str = "collectives") -> list[Flow]:
    """The plan's traffic."""
    return [Flow(**{**one, "axes": tuple(one["axes"])}) for one in plan[key]]
