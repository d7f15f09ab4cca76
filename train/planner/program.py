"""Which collectives a compiled program runs: kind, mesh axis, bytes, how often. Read from the text of its HLO."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
WIDTHS = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%(\S+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
COMPUTATION = re.compile(r"^(?:ENTRY )?%(\S+) \(.*\{$")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%([^\s,)}]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Collective:
    """One instruction: the bytes of its result on a device (of reduce-scatter, of what goes in), how often it runs in a
    step, the devices that take part together (numbers in the mesh's order)."""

    kind: str
    size: int
    times: int
    group: tuple[int, ...]
    name: str

    @property
    def moved(self) -> float:
        """Bytes that a device passes on in a step, at the least: round a ring."""
        n = len(self.group)
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(self.kind, (n - 1) / n)
        return self.size * share * self.times

    def axes(self, shape: dict[str, int]) -> tuple[str, ...]:
        """The mesh axes that it runs over."""
        places = np.stack(np.unravel_index(np.asarray(self.group), tuple(shape.values())))
        return tuple(axis for axis, row in zip(shape, places, strict=True) if len(set(row.tolist())) > 1)


@dataclass(frozen=True)
class Instruction:
    """A line of HLO."""

    name: str
    shape: str
    op: str
    rest: str


class Program:
    """The text of a compiled program, by computation."""

    def __init__(self, text: str, unknown: int = 1):
        self.unknown = unknown  # how often a loop goes round whose length only the data tells, at the most
        self.computations: dict[str, list[Instruction]] = {}
        current: list[Instruction] = []
        for line in text.splitlines():
            if found := COMPUTATION.match(line):
                current = self.computations[found[1]] = []
                if line.startswith("ENTRY"):
                    self.entry = found[1]
            elif found := INSTRUCTION.match(line):
                current.append(Instruction(*found.groups()))

    @cached_property
    def times(self) -> dict[str, int]:
        """How often each computation runs in one run of the program."""
        times: dict[str, int] = defaultdict(int)
        todo = [(self.entry, 1)]
        while todo:
            name, count = todo.pop()
            times[name] += count
            for one in self.computations[name]:
                trips = count * self.trips(one) if one.op == "while" else count
                names = CALLED.findall(one.rest)
                for branches in BRANCHES.findall(one.rest):
                    names += [branch.strip().lstrip("%") for branch in branches.split(",")]
                todo += [(called, trips) for called in names if called in self.computations]
        return times

    def trips(self, loop: Instruction) -> int:
        """How often a while loop goes round: as the compiler knows, or from `i < constant` in its condition."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known[1])
        condition = re.search(r"condition=%([^\s,)}]+)", loop.rest)
        lines = self.computations.get(condition[1], []) if condition else []
        if not lines or lines[-1].op != "compare" or "direction=LT" not in lines[-1].rest:
            return self.unknown
        bounds = {one.name: one.rest for one in lines if one.op == "constant"}
        _, second = re.findall(r"%([^\s,)]+)", lines[-1].rest)[:2]
        found = re.match(r"(\d+)\)", bounds.get(second, ""))
        return int(found[1]) if found else self.unknown

    @cached_property
    def collectives(self) -> list[Collective]:
        """All of them that take part in moving data."""
        found, chained = [], {}
        for name, lines in self.computations.items():
            for one in lines:
                kind = one.op.removesuffix("-start")
                if kind not in KINDS or not self.times[name]:
                    continue
                made = Collective(kind, size_of(one), self.times[name], group_of(one.rest, kind), one.name)
                channel = re.search(r"channel_id=(\d+)", one.rest)
                if channel and "chain_id=" in one.rest:  # one collective, cut into steps that run beside something else
                    chained[kind, channel[1]] = made
                elif len(made.group) > 1:
                    found.append(made)
        return found + [one for one in chained.values() if len(one.group) > 1]


def size_of(one: Instruction) -> int:
    """Bytes of the larger side of a collective, on a device."""
    shapes = _arrays(one.shape)
    if one.op == "collective-permute-start":  # (operand, result, contexts)
        return shapes[0]
    if one.op.endswith("-start") and one.shape.startswith("(("):  # ((operands), (results))
        return sum(shapes) - sum(sorted(shapes)[: len(shapes) // 2])
    if one.op == "all-gather-start":
        return max(shapes)
    if one.op == "reduce-scatter":
        return sum(shapes) * len(group_of(one.rest, one.op))
    return sum(shapes)


def _arrays(text: str) -> list[int]:
    """Bytes of each array in a shape's text."""
    sizes = []
    for kind, dims in re.findall(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]", text):
        bits = re.match(r"[suf](\d+)", kind)
        width = WIDTHS.get(kind) or (int(bits[1]) / 8 if bits else 4)
        sizes.append(int(math.prod(int(n) for n in dims.split(",") if n) * width))
    return sizes


def group_of(rest: str, kind: str) -> tuple[int, ...]:
    """The first group of devices; of a permutation, everything that one device's data comes past."""
    if kind == "collective-permute":
        found = re.search(r"source_target_pairs=\{(.*?)\}\}", rest)
        pairs = [tuple(map(int, pair)) for pair in re.findall(r"\{?(\d+),(\d+)\}?", found[1] if found else "")]
        return _ring([(a, b) for a, b in pairs if a != b])
    return next(iter(groups_of(rest)), ())


def _ring(pairs: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """The devices that are joined to the first pair's."""
    if not pairs:
        return ()
    inside = set(pairs[0])
    while more := {x for pair in pairs if inside & set(pair) for x in pair} - inside:
        inside |= more
    return tuple(sorted(inside))


def groups_of(rest: str) -> Iterator[tuple[int, ...]]:
    """The replica groups of an instruction, in any of the forms that XLA prints."""
    if found := re.search(r"replica_groups=\{(\{.*?\})\}", rest):  # {{0,1},{2,3}}
        for group in re.findall(r"\{([\d,]+)\}", found[1]):
            yield tuple(map(int, group.split(",")))
    elif found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):  # iota
        shape, dims, order = ([int(n) for n in part.split(",")] if part else None for part in found.groups())
        ids = np.arange(math.prod(dims or ())).reshape(dims or ())
        if order is not None:
            ids = ids.transpose(order)
        for row in ids.reshape(shape or ()).tolist():
            yield tuple(row)
    elif found := re.search(
        r"replica_groups=(?:@?\w*)mesh\[(.*?)\](.*?)\{(.*?)\}", rest
    ):  # named axes, or parts of them
        yield from _named(found[1], found[2], found[3])


def _named(mesh: str, order: str, axes: str) -> Iterator[tuple[int, ...]]:
    """Groups along axes of a mesh: 'a', or 'a':(m)k, the part of size k behind the first m of it."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    ids = np.arange(math.prod(sizes.values()))
    if listed := re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", order):
        dims = [int(n) for n in listed[1].split(",")]
        ids = ids.reshape(dims)
        ids = (ids.transpose([int(n) for n in listed[2].split(",")]) if listed[2] else ids).reshape(-1)
    dims, taken = [], []
    parts = {name: (int(m), int(k)) for name, m, k in re.findall(r"'([^']+)':\((\d+)\)(\d+)", axes)}
    whole = set(re.findall(r"'([^']+)'(?!:)", axes))
    for name, size in sizes.items():
        if name in parts:
            before, part = parts[name]
            dims += [before, part, size // before // part]
            taken.append(len(dims) - 2)
        else:
            dims.append(size)
            if name in whole:
                taken.append(len(dims) - 1)
    others = [i for i in range(len(dims)) if i not in taken]
    grid = ids.reshape(dims).transpose([*others, *taken])
    for row in grid.reshape(-1, math.prod(dims[i] for i in taken)).tolist():
        yield tuple(row)
