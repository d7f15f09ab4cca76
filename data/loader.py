"""Batches in a seeded global order that depends on nothing but the data and the configuration.

The order of an epoch is cut into windows of `data.window` examples, each window is packed by itself, and the rows of
all windows of all epochs form one stream, cut into batches. So a position is a window's place and a row in it, the same
for every process; a process fills only its own rows of each batch (p, p+P, p+2P, ...).
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.errors import UsageError
from data.examples import Examples
from data.mix import Mixture, Part, Place
from data.pack import Columns, Piece, fill_pieces, pack_rows
from data.prefetch import Prefetch

if TYPE_CHECKING:
    from configs.schema import Data

Rows = list[list[Piece]]
Position = tuple[Place, int]  # a window and a row in it


@dataclass(frozen=True)
class Ramp:
    """Sequences in each batch: `most`, or at first fewer and linearly more over `steps`, in multiples of `unit`."""

    most: int
    start: int = 0
    steps: int = 0
    unit: int = 1
    _before: list[int] = field(default_factory=lambda: [0])  # sequences before each batch of the ramp

    def size(self, step: int) -> int:
        """Sequences in the batch after `step` others."""
        if step >= self.steps:
            return self.most
        wanted = self.start + (self.most - self.start) * step / self.steps
        return max(self.unit, int(wanted / self.unit) * self.unit)

    def before(self, step: int) -> int:
        """Sequences in the first `step` batches."""
        while len(self._before) <= min(step, self.steps):
            self._before.append(self._before[-1] + self.size(len(self._before) - 1))
        whole = min(step, self.steps)
        return self._before[whole] + (step - whole) * self.most

    def step(self, rows: int) -> int:
        """Batches that so many sequences fill."""
        ramp = self.before(self.steps)
        if rows >= ramp:
            return self.steps + (rows - ramp) // self.most
        return next(step for step in range(self.steps) if self.before(step + 1) > rows)


class Loader:
    """Iterator of batches {column: [batch_size / process_count, max_length]}; state() and restore() are exact.

    Ends after `epochs` (a fraction is a share of the last epoch's rows), or never with None. The last batch, and those
    of a ramp, are filled up with empty rows."""

    def __init__(
        self,
        examples: Examples,
        data: "Data",
        batch_size: int,
        seed: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
        epochs: float | None = None,
        mixture: Mixture | None = None,
        ramp: Ramp | None = None,
    ):
        if batch_size % process_count:
            raise UsageError(f"batch_size {batch_size} does not divide evenly over {process_count} processes")
        self.examples, self.data, self.batch_size, self.epochs = examples, data, batch_size, epochs
        self.seed = data.seed if seed is None else seed
        self.process_index, self.process_count = process_index, process_count
        if not len(examples):
            examples.check_not_empty()
        self.mixture = mixture or Mixture([Part("train", 0, len(examples))], self.seed, data.shuffle)
        self.ramp = ramp or Ramp(batch_size)
        self._position: Position = (self.mixture.start(), 0)
        self._starts = {0: self.mixture.start()}  # of epochs
        self._plan: tuple[Place, tuple[Rows, Place]] | None = None
        self._counts: dict[int, int] = {}
        self._stream: Iterator[tuple[Columns, Position, np.ndarray]] | None = None
        self._used = np.zeros(len(self.mixture.parts), np.int64)  # positions of each source in the batches so far

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Columns:
        if self._stream is None:
            stream = self._batches(self._position)
            self._stream = Prefetch(stream, self.data.prefetch) if self.data.prefetch else stream
        batch, self._position, used = next(self._stream)
        self._used += used
        return batch

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop preparing batches. Iterating again goes on after the last batch handed out."""
        if isinstance(self._stream, Prefetch):
            self._stream.close()
        self._stream = None

    def state(self) -> dict[str, Any]:
        """Where the next batch begins (batches prepared ahead do not count); JSON-able."""
        place, row = self._position
        lists = {"drawn": list(place.drawn), "owed": list(place.owed), "used": self._used.tolist()}
        return {**asdict(place), "row": row, **lists}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on at a position that state() gave."""
        self.close()
        place = Place(state["epoch"], state["window"], state["rows"], tuple(state["drawn"]), tuple(state["owed"]))
        size, seen = self.mixture.parts[0].size, place.drawn[0] - place.epoch * self.mixture.parts[0].size
        fits = len(place.drawn) == len(self.mixture.parts) and 0 <= seen <= size
        if not fits or min(place.epoch, place.window, state["row"]) < 0 or place.window * self.data.window < seen:
            raise UsageError(
                f"the saved data position {state} does not fit this data ({[p.size for p in self.mixture.parts]} "
                f"examples in windows of {self.data.window}): the data files, data.window or the filters have changed "
                "since the checkpoint"
            )
        self._position, self._used = (place, state["row"]), np.asarray(state["used"], np.int64)

    def shares(self) -> dict[str, float]:
        """Of a mixture, the share that each source has had of the tokens so far."""
        names = [part.name for part in self.mixture.parts]
        return dict(zip(names, (self._used / max(1, self._used.sum())).tolist(), strict=True)) if names[1:] else {}

    def fingerprint(self) -> dict[str, Any]:
        """What the order of the data depends on; a resumed run must have the same."""
        names = (
            "max_length", "packing", "truncation", "shuffle", "window", "document_mask", "reset_positions", "fim_rate",
            "fim_spm_rate", "on_exhausted",
        )  # fmt: skip
        return {
            "rows": len(self.examples),
            "seed": self.seed,
            "batch_size": self.batch_size,
            **{name: getattr(self.data, name) for name in names},
            "sources": [repr(part) for part in self.mixture.parts],
            "ramp": [self.ramp.start, self.ramp.steps, self.ramp.unit],
        }

    def plan(self, place: Place) -> tuple[Rows, Place]:
        """The packed rows of the window at a place, and the place of the window after it."""
        known = self._plan  # read once: the prefetching thread sets it too
        if known is not None and known[0] == place:
            return known[1]
        step = self.ramp.step(place.rows)
        numbers, drawn, owed, ends = self.mixture.draw(place, self.data.window, step)
        self.examples.prepare(numbers)
        lengths = [self.examples.length(number) for number in numbers]
        seed = (self.seed, place.epoch, place.window) if self.data.shuffle else None
        packed = pack_rows(lengths, self.data, seed)
        rows = [[piece._replace(number=numbers[piece.number]) for piece in row] for row in packed]
        after = Place(place.epoch + ends, 0 if ends else place.window + 1, place.rows + len(rows), drawn, owed)
        self._plan = place, (rows, after)
        return rows, after

    def windows(self, epoch: int) -> Iterator[Rows]:
        """The packed rows of each window of an epoch."""
        place = self._start(epoch)
        while place.epoch == epoch:
            rows, place = self.plan(place)
            yield rows
        self._starts[epoch + 1] = place

    def _start(self, epoch: int) -> Place:
        """Where an epoch begins; what comes before it is drawn for that."""
        for before in range(epoch):
            if before + 1 not in self._starts:
                self._counts[before] = sum(map(len, self.windows(before)))
        return self._starts[epoch]

    def foresee(self, steps: int, most: int = 100_000) -> list[str]:
        """What a mixture will have given after so many steps, or after `most` examples, in words; tokenises those.
        Raises UsageError for a source that is used up before."""
        place, tokens = self.mixture.start(), np.zeros(len(self.mixture.parts), np.int64)
        while place.rows < self.ramp.before(steps) and sum(place.drawn) < most:
            rows, place = self.plan(place)
            tokens += self._sources(rows)
        counts, lines = np.asarray(place.drawn), []
        for part, count, share in zip(self.mixture.parts, counts, tokens / max(1, tokens.sum()), strict=True):
            drawn = f"{count / max(1, counts.sum()):.2%} of the examples, {share:.2%} of the tokens"
            lines.append(f"{part.name}: {drawn}, {count / part.size:.2f} passes over {part.size} examples")
        done = self.ramp.step(place.rows)
        return lines if done >= steps else [*lines, f"(up to step {done} of {steps}; no further was looked)"]

    def rows_in(self, epoch: int) -> int:
        """Packed rows in an epoch. Tokenises everything once."""
        if epoch not in self._counts:
            self._counts[epoch] = sum(map(len, self.windows(epoch)))
            self.examples.check_not_empty()
        return self._counts[epoch]

    def rows(self, epochs: float) -> int:
        """Packed rows in that many epochs."""
        whole = int(epochs)
        rest = epochs - whole
        # without packing, or without a new order, every epoch of one source has as many rows
        if len(self.mixture.parts) == 1 and (self.data.packing == "none" or not self.data.shuffle):
            one = self.rows_in(0)
            return whole * one + math.ceil(rest * one)
        count = sum(self.rows_in(epoch) for epoch in range(whole))
        return count + (math.ceil(rest * self.rows_in(whole)) if rest else 0)

    def steps_per_epoch(self) -> int:
        """Batches that the first epoch takes."""
        return self.steps(1)

    def steps(self, epochs: float) -> int:
        """Batches, from the beginning, that `epochs` take; the last one may be partly empty."""
        rows = self.rows(epochs)
        step = self.ramp.step(rows)
        return step + (self.ramp.before(step) < rows)

    def walk(self, position: Position | None = None) -> Iterator[tuple[list[Piece], Position]]:
        """Rows from a position on, each with the position after it."""
        place, row = position or (self.mixture.start(), 0)
        left, empty = self._left(place, row), 0
        while self.epochs is None or place.epoch < self.epochs:
            rows, after = self.plan(place)
            while row < len(rows):
                if left is not None and left <= 0:
                    return
                row, empty = row + 1, 0
                left = None if left is None else left - 1
                yield rows[row - 1], (place, row)
            empty += 1
            if after.epoch != place.epoch:
                if empty > after.window + place.window:  # nothing in a whole epoch
                    self.examples.check_not_empty()
                left = self._left(after, 0)
            place, row = after, 0

    def _left(self, place: Place, row: int) -> int | None:
        """How many rows of the place's epoch are still to be used, where the epochs end within it."""
        epoch = place.epoch
        if self.epochs is None or epoch + 1 <= self.epochs or epoch >= self.epochs:
            return None
        share = math.ceil((self.epochs - epoch) * self.rows_in(epoch))
        return share - (place.rows - self._start(epoch).rows) - row

    def _batches(self, position: Position) -> Iterator[tuple[Columns, Position, np.ndarray]]:
        """Batches from a position on, each with the position after it and the positions that each source has in it."""
        rows: Rows = []
        step = self.ramp.step(position[0].rows + position[1])
        for row, after in self.walk(position):
            rows.append(row)
            position = after
            if len(rows) == self.ramp.size(step):
                yield self.stack(self._spread(rows)), position, self._sources(rows)
                rows, step = [], step + 1
        if rows:
            yield self.stack(self._spread(rows)), position, self._sources(rows)

    def _spread(self, rows: Rows) -> Rows:
        """A batch's rows with empty ones; those of a ramp so that whole micro-batches (every n-th row) stay empty."""
        full = rows + [[]] * (self.batch_size - len(rows))
        parts = self.batch_size // self.ramp.unit
        if self.ramp.steps == 0 or parts == 1:
            return full
        return [full[part * self.ramp.unit + place] for place in range(self.ramp.unit) for part in range(parts)]

    def _sources(self, rows: Rows) -> np.ndarray:
        counts = np.zeros(len(self.mixture.parts), np.int64)
        starts = [part.start for part in self.mixture.parts]
        for piece in (piece for row in rows for piece in row):
            counts[np.searchsorted(starts, piece.number, "right") - 1] += piece.stop - piece.start
        return counts

    def stack(self, rows: Rows) -> Columns:
        """The columns of this process's rows of one batch."""
        mine = rows[self.process_index :: self.process_count]
        filled = [self.fill(row) for row in mine]
        return {name: np.stack([row[name] for row in filled]) for name in filled[0]}

    def fill(self, row: list[Piece]) -> Columns:
        """The columns of one row."""
        examples, pad = [self.examples[piece.number] for piece in row], self.examples.tokenizer.pad_id or 0
        return fill_pieces(row, examples, self.data, pad, self.examples.columns)
