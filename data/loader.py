"""Batches in a seeded global order that depends on nothing but the data and the configuration.

The order of an epoch is cut into windows of `data.window` examples, each window is packed by itself, and the rows of
all windows of all epochs form one stream, cut into batches. So a position is (epoch, window, row), the same for every
process; a process fills only its own rows of each batch (p, p+P, p+2P, ...).
"""

import math
import queue
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.errors import UsageError
from data.examples import Examples
from data.pack import Columns, fill_row, pack_window

if TYPE_CHECKING:
    from configs.schema import Data

Position = tuple[int, int, int]  # epoch, window, row


class Loader:
    """Iterator of batches {column: [batch_size / process_count, max_length]}; state() and restore() are exact.

    Ends after `epochs` (a fraction is a share of the last epoch's rows), or never with None. The last batch is filled
    up with empty rows."""

    def __init__(
        self,
        examples: Examples,
        data: "Data",
        batch_size: int,
        seed: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
        epochs: float | None = None,
    ):
        if batch_size % process_count:
            raise UsageError(f"batch_size {batch_size} does not divide evenly over {process_count} processes")
        self.examples, self.data, self.batch_size, self.epochs = examples, data, batch_size, epochs
        self.seed = data.seed if seed is None else seed
        self.process_index, self.process_count = process_index, process_count
        self.windows = max(1, math.ceil(len(examples) / data.window))
        self._position: Position = (0, 0, 0)
        self._plan: tuple[tuple[int, int], list[list[int]]] | None = None
        self._order: Any = None
        self._counts: dict[int, int] = {}
        self._stream: Iterator[tuple[Columns, Position]] | None = None

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Columns:
        if self._stream is None:
            stream = self._batches(self._position)
            self._stream = Prefetch(stream, self.data.prefetch) if self.data.prefetch else stream
        batch, self._position = next(self._stream)
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

    def state(self) -> dict[str, int]:
        """Where the next batch begins (batches prepared ahead do not count); JSON-able."""
        return dict(zip(("epoch", "window", "row"), self._position, strict=True))

    def restore(self, state: dict[str, int]) -> None:
        """Go on at a position that state() gave."""
        self.close()
        position = state["epoch"], state["window"], state["row"]
        if min(position) < 0 or position[1] > self.windows:
            raise UsageError(
                f"the saved data position {state} does not fit this data ({self.windows} windows of {self.data.window} "
                "rows an epoch): the data files, data.window or the filters have changed since the checkpoint"
            )
        self._position = position

    def fingerprint(self) -> dict[str, Any]:
        """What the order of the data depends on; a resumed run must have the same."""
        data = self.data
        names = ("max_length", "packing", "truncation", "shuffle", "window")
        return {"rows": len(self.examples), "seed": self.seed, "batch_size": self.batch_size} | {
            name: getattr(data, name) for name in names
        }

    def order(self, epoch: int, window: int) -> list[int]:
        """The row numbers of a window, in the seeded order of that epoch."""
        size = len(self.examples)
        inside = range(window * self.data.window, min(size, (window + 1) * self.data.window))
        if not self.data.shuffle:
            return list(inside)
        if self._order is None:
            import grain

            # Indices past the end belong to the next epoch, in another order
            self._order = grain.MapDataset.range(size).seed(self.seed % 2**32).shuffle()
        return [int(self._order[epoch * size + index]) for index in inside]

    def plan(self, epoch: int, window: int) -> list[list[int]]:
        """The packed rows of a window, as row numbers of the source."""
        known = self._plan  # read once: the prefetching thread sets it too
        if known is not None and known[0] == (epoch, window):
            return known[1]
        order = self.order(epoch, window)
        lengths = [self.examples.length(index) for index in order]
        if self.data.packing == "none":
            rows = [[index] for index, length in zip(order, lengths, strict=True) if length]
        else:
            seed = (self.seed, epoch, window) if self.data.shuffle else None
            packed = pack_window(lengths, self.data.max_length, seed)
            rows = [[order[number] for number in row] for row in packed]
        self._plan = (epoch, window), rows
        return rows

    def rows_in(self, epoch: int) -> int:
        """Packed rows in an epoch. Tokenises everything once."""
        if epoch not in self._counts:
            self._counts[epoch] = sum(len(self.plan(epoch, window)) for window in range(self.windows))
            self.examples.check_not_empty()
        return self._counts[epoch]

    def rows(self, epochs: float) -> int:
        """Packed rows in that many epochs."""
        whole = int(epochs)
        rest = epochs - whole
        # without packing, or without a new order, every epoch has as many rows
        if self.data.packing == "none" or not self.data.shuffle:
            one = self.rows_in(0)
            return whole * one + math.ceil(rest * one)
        count = sum(self.rows_in(epoch) for epoch in range(whole))
        return count + (math.ceil(rest * self.rows_in(whole)) if rest else 0)

    def steps_per_epoch(self) -> int:
        """Batches that the first epoch takes."""
        return self.steps(1)

    def steps(self, epochs: float) -> int:
        """Batches, from the beginning, that `epochs` take; the last one may be partly empty."""
        return math.ceil(self.rows(epochs) / self.batch_size)

    def walk(self, position: Position) -> Iterator[tuple[list[int], Position]]:
        """Rows from a position on, each with the position after it."""
        epoch, window, row = position
        empty = 0
        while self.epochs is None or epoch < self.epochs:
            left = self._share(epoch)
            if left is not None:
                left -= sum(len(self.plan(epoch, before)) for before in range(window)) + row
            while window < self.windows:
                rows = self.plan(epoch, window)
                while row < len(rows):
                    if left is not None and left <= 0:
                        return
                    row, empty = row + 1, 0
                    left = None if left is None else left - 1
                    yield rows[row - 1], (epoch, window, row)
                window, row, empty = window + 1, 0, empty + 1
                if empty >= self.windows:
                    self.examples.check_not_empty()
            epoch, window = epoch + 1, 0

    def _share(self, epoch: int) -> int | None:
        """How many rows of an epoch to use, where the epochs end within it."""
        if self.epochs is None or epoch + 1 <= self.epochs:
            return None
        return math.ceil((self.epochs - epoch) * self.rows_in(epoch))

    def _batches(self, position: Position) -> Iterator[tuple[Columns, Position]]:
        """Batches from a position on, each with the position after it."""
        rows: list[list[int]] = []
        for row, after in self.walk(position):
            rows.append(row)
            position = after
            if len(rows) == self.batch_size:
                yield self.stack(rows), position
                rows = []
        if rows:
            yield self.stack(rows + [[]] * (self.batch_size - len(rows))), position

    def stack(self, rows: list[list[int]]) -> Columns:
        """The columns of this process's rows of one batch."""
        mine = rows[self.process_index :: self.process_count]
        filled = [self.fill([self.examples[index] for index in row]) for row in mine]
        return {name: np.stack([row[name] for row in filled]) for name in filled[0]}

    def fill(self, examples: list[Columns]) -> Columns:
        """The columns of one row."""
        return fill_row(examples, self.data.max_length, self.examples.tokenizer.pad_id or 0, self.examples.columns)


class Prefetch:
    """An iterator run ahead in a thread, by at most `depth` items. Its exceptions reach the caller in their turn."""

    def __init__(self, source: Iterator[Any], depth: int):
        self._queue: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._done = False
        self._thread = threading.Thread(target=self._run, args=(source,), name="purestep-data", daemon=True)
        self._thread.start()

    def _run(self, source: Iterator[Any]) -> None:
        try:
            for item in source:
                if not self._put((True, item)):
                    return
            self._put((False, StopIteration()))
        except BaseException as error:
            self._put((False, error))

    def _put(self, item: tuple[bool, Any]) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> "Prefetch":
        return self

    def __next__(self) -> Any:
        if self._done:
            raise StopIteration
        good, item = self._queue.get()
        if good:
            return item
        self._done = True
        raise item

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._stop.set()
        self._done = True
        self._thread.join()
