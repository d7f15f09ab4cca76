"""Which example comes next: of one source in its seeded order, or of several sources in their shares.

Sources are drawn one example at a time, always from the one that is owed most (smooth weighted round robin): so after
any number of draws at constant shares each source has had its share to within about one example, and no randomness but
the seeded order inside each source is in it. What has been drawn and what is owed is the whole state.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from configs.errors import UsageError


@dataclass(frozen=True)
class Part:
    """A source: the numbers of its examples (start .. start + size), its weight from each step on, its passes at most;
    linear: between those steps the weight goes straight from one to the next."""

    name: str
    start: int
    size: int
    weights: tuple[tuple[int, float], ...] = ((0, 1.0),)
    epochs: float | None = None
    linear: bool = False

    def weight(self, step: int) -> float:
        """The weight at a step."""
        before = max((pair for pair in self.weights if pair[0] <= step), default=self.weights[0])
        after = min((pair for pair in self.weights if pair[0] > step), default=before)
        if not self.linear or after == before:
            return before[1]
        return before[1] + (after[1] - before[1]) * (step - before[0]) / (after[0] - before[0])


@dataclass(frozen=True)
class Place:
    """Where a window begins: which one it is, packed rows before it, and of each source the examples drawn and the
    examples owed. JSON-able by fields."""

    epoch: int = 0
    window: int = 0
    rows: int = 0
    drawn: tuple[int, ...] = ()
    owed: tuple[float, ...] = ()


@functools.lru_cache(maxsize=64)
def _order(size: int, seed: int) -> Any:
    import grain

    return grain.MapDataset.range(size).seed(seed).shuffle()  # indices past the end: the next epoch, in another order


@functools.lru_cache(maxsize=1 << 16)
def shuffled(size: int, seed: int, count: int) -> int:
    """What comes after `count` others of range(size), epoch by epoch in another seeded order.

    Kept, since of few grain takes long to find one: 70 ms / size (it walks a cycle of 65,536)."""
    return int(_order(size, seed)[count])


class Mixture:
    """Several sources as one endless order. An epoch ends where the first source has been seen once more."""

    def __init__(self, parts: Sequence[Part], seed: int = 0, shuffle: bool = True, drop: bool = False):
        if not parts or not all(part.size for part in parts):
            empty = next((part.name for part in parts if not part.size), "")
            raise UsageError(f"data.mix.{empty}: no example")
        for step in sorted({step for part in parts for step, _ in part.weights}):
            if not any(part.weight(step) for part in parts):
                raise UsageError(f"data.mix: all weights are 0 at step {step}: at least one source needs one above 0")
        for part in parts:
            if not any(weight for _, weight in part.weights):
                raise UsageError(f"data.mix.{part.name}.weight is 0 at every step: leave the source out")
        self.parts, self.seed, self.shuffle, self.drop = tuple(parts), seed, shuffle, drop

    def start(self) -> Place:
        """Where all begins."""
        return Place(drawn=(0,) * len(self.parts), owed=(0.0,) * len(self.parts))

    def number(self, part: int, count: int) -> int:
        """The example that a source gives after `count` others, in the seeded order of each of its epochs."""
        size = self.parts[part].size
        if not self.shuffle:
            return self.parts[part].start + count % size
        return self.parts[part].start + shuffled(size, (self.seed + part) % 2**32, count)

    def draw(self, place: Place, most: int, step: int) -> tuple[list[int], tuple[int, ...], tuple[float, ...], bool]:
        """The examples of the window at a place, what is drawn and owed after it, and whether the epoch ends there."""
        drawn, owed, numbers = list(place.drawn), list(place.owed), []
        weights = self._weights(drawn, step)
        ends = (place.epoch + 1) * self.parts[0].size
        while len(numbers) < most and drawn[0] < ends:
            for index, weight in enumerate(weights):
                owed[index] += weight
            index = max(range(len(owed)), key=lambda i: (owed[i] if weights[i] else -math.inf, -i))
            owed[index] -= 1.0
            numbers.append(self.number(index, drawn[index]))
            drawn[index] += 1
            if drawn[index] == self._limit(index):
                weights = self._weights(drawn, step)
                owed[index] = 0.0
        return numbers, tuple(drawn), tuple(owed), drawn[0] >= ends

    def _limit(self, index: int) -> int | None:
        part = self.parts[index]
        return None if part.epochs is None else math.ceil(part.epochs * part.size)

    def _weights(self, drawn: Sequence[int], step: int) -> list[float]:
        """Shares at a step, of the sources that have something left."""
        found = []
        for index, part in enumerate(self.parts):
            weight, limit = part.weight(step), self._limit(index)
            used = limit is not None and drawn[index] >= limit
            if used and weight and not self.drop:
                raise UsageError(
                    f"data.mix.{part.name}: its {part.size} examples have been seen {part.epochs:g} times at step "
                    f"{step}, and data.mix.{part.name}.epochs allows no more: give it more data, a smaller weight, or "
                    "set data.on_exhausted=drop to go on without it"
                )
            found.append(0.0 if used else weight)
        total = sum(found)
        if not total:
            raise UsageError(f"data.mix: every source with a weight is used up at step {step}: the data ends here")
        return [weight / total for weight in found]
