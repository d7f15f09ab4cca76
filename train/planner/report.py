"""A plan for people: a few tables."""

import math

from rich.console import Console
from rich.table import Table

from train.plan import shorten
from train.planner.plan import Plan, gib


def show(plan: Plan, console: Console) -> None:
    """Print a plan."""
    target, batch = plan["target"], plan["batch"]
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items()) or "1 device"
    seconds = plan["compile_seconds"]
    how = "NOT COMPILED: more memory than there is" if seconds else "ANALYTIC: nothing was compiled"
    how = f"compiled in {seconds:.0f} s" if plan["compiled"] else how
    compute = plan["compute"]
    console.print(
        f"{plan['recipe']} of {plan['model']}: {shorten(plan['parameters'])} parameters, {shorten(plan['trained'])} "
        f"trained, on {target['name']} ({target['chips']} chips, {target['devices']} devices); {how}",
        f"mesh: {mesh}; {compute['dtype']}, remat {compute['remat']}, attention {compute['attention']}",
        f"step: {batch['rows']} x {batch['length']} = {batch['tokens']:,} tokens in {batch['microbatches']} "
        f"micro-batches, {batch['tokens_per_device_at_once']:,} on a device at once",
        sep="\n",
        highlight=False,
    )
    if plan["install"]:
        console.print(
            f"peak memory is estimated, traffic is theory; what compiles them: {plan['install']}",
            markup=False,
            highlight=False,
        )
    console.print(memory_table(plan), traffic_table(plan), time_table(plan))
    if "decode" in plan:
        console.print(decode_table(plan["decode"]))
    for line in plan["assumed"]:
        console.print(f"assumed: {line}", style="dim", highlight=False)
    if plan.get("change"):
        console.print(f"the cheapest change that would fit, by the formulas: {plan['change']}", highlight=False)
    if "override" in plan:
        tried = f"{plan['candidates']} fit by the formulas, {len(plan['tried'])} made whole"
        console.print(f"searched ({tried}); the best:", plan["override"] or "the recipe as it is", highlight=False)


def memory_table(plan: Plan) -> Table:
    """Bytes per device."""
    memory = plan["memory"]
    table = Table("memory per device", "GiB", title_justify="left")
    exact = ("params", "optimizer", "carried", "batch")
    for name, size in memory["parts"].items():
        if size:
            note = "" if name in exact else " (share of the rest)" if plan["compiled"] else " (formula)"
            table.add_row(f"{name}{note}", f"{size / 2**30:.3f}")
    table.add_section()
    table.add_row("peak, the compiler's" if plan["compiled"] else "sum", f"{memory['peak'] / 2**30:.3f}")
    table.add_row("a program may take", f"{memory['limit'] / 2**30:.3f}")
    fits = f"fits, {gib(memory['room'])} to spare" if memory["fits"] else f"DOES NOT FIT by {gib(-memory['room'])}"
    table.add_row(fits, "")
    return table


def traffic_table(plan: Plan) -> Table:
    """Collectives of a step on a device, and theory's beside them."""
    table = Table("collectives of a step", "over", "times", "GB a device", "theory", "excess")
    needed = {(one["kind"], tuple(one["axes"])): one for one in plan["theory"]}
    totals: dict[str, list[float]] = {}
    for one in plan["collectives"]:
        key = one["kind"], tuple(one["axes"])
        same = needed.pop(key, {"moved": 0.0})
        axes = " x ".join(key[1])
        table.add_row(one["kind"], axes, f"{one['count']:,}", f"{one['moved'] / 1e9:.3f}", f"{same['moved'] / 1e9:.3f}")
        total = totals.setdefault(axes, [0.0, 0.0])
        total[0] += one["moved"]
        total[1] += same["moved"]
    for (kind, axes), one in needed.items():
        table.add_row(kind, " x ".join(axes), "0", "0", f"{one['moved'] / 1e9:.3f}")
        totals.setdefault(" x ".join(axes), [0.0, 0.0])[1] += one["moved"]
    if plan["compiled"]:
        table.add_section()
        for axes, (made, theory) in totals.items():
            ratio = plan["excess"].get(axes, 0.0)
            said = f"{ratio:.2f} x" if math.isfinite(ratio) else "not needed"
            table.add_row("all", axes, "", f"{made / 1e9:.3f}", f"{theory / 1e9:.3f}", said)
    return table


def decode_table(found: Plan) -> Table:
    """A step of decoding."""
    table = Table(f"decoding {found['rows']} rows of {found['length']} tokens", "")
    table.add_row("cache, whole", gib(found["cache"]))
    if "peak" in found:
        table.add_row("cache on a device", gib(found["cache_per_device"]))
        table.add_row("peak on a device, the compiler's", gib(found["peak"]))
        table.add_row("fits" if found["fits"] else "DOES NOT FIT", "")
        for one in found["collectives"]:
            said = f"{one['count']} x, {one['moved'] / 1e9:.3f} GB"
            table.add_row(f"{one['kind']} over {' x '.join(one['axes'])}, a step", said)
    table.add_row("step at best, cache half full, expected", f"{found['step_seconds'] * 1e3:.2f} ms")
    table.add_row("tokens/s at best, expected", f"{found['tokens_per_second']:,.0f}")
    return table


def time_table(plan: Plan) -> Table:
    """What the roofline expects."""
    table = Table("expected, not measured", "overlapped", "serial")
    ways = plan["expected"]
    rows = {
        "step": lambda way: f"{way['step_seconds']:.3f} s",
        "MFU": lambda way: f"{way['mfu']:.1%}",
        "tokens/s": lambda way: f"{way['tokens_per_second']:,.0f}",
    }
    if plan["tokens"] is not None:
        rows[f"{shorten(plan['tokens'])} tokens"] = lambda way: f"{way['hours']:,.1f} h"
        rows["chip-hours"] = lambda way: f"{way['chip_hours']:,.0f}"
    if plan["tokens"] is not None and plan["price"] is not None:
        rows[f"cost at {plan['price']:g} a chip-hour"] = lambda way: f"{way['cost']:,.0f}"
    for name, say in rows.items():
        table.add_row(name, *(say(ways[way]) for way in ("overlapped", "serial")))
    table.add_section()
    table.add_row("model FLOPs of a step", f"{plan['flops']:.3g}", f"{plan['flops_computed']:.3g} computed")
    for name, seconds in plan["seconds"].items():
        table.add_row(f"  {name}", f"{seconds:.3f} s", "")
    return table
