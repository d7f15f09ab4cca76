"""Several examples in one row: best-fit decreasing over a window, and the columns of a row."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

Columns = dict[str, np.ndarray]
COLUMNS = {
    "tokens": np.int32,
    "targets": np.int32,
    "weights": np.float32,
    "positions": np.int32,
    "segments": np.int32,
}


def pack_window(lengths: Sequence[int], capacity: int, seed: int | Sequence[int] | None) -> list[list[int]]:
    """Rows of indices into `lengths` whose lengths sum to at most `capacity`: longest first, each into the row with
    the least room that still fits it. Length 0 is left out. Rows come shuffled by `seed`; with None, by their
    first index. O(n log n) comparisons."""
    if lengths and max(lengths) > capacity:
        raise ValueError(f"an example takes {max(lengths)} positions, a row has {capacity}: truncate before packing")
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (positions left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        if length <= 0:
            continue
        at = bisect_left(room, (length, -1))
        left, row = room.pop(at) if at < len(room) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        if left > length:
            insort(room, (left - length, row))
    if seed is None:
        return sorted(rows, key=min)
    return [rows[number] for number in np.random.default_rng(seed).permutation(len(rows))]


def fill_row(examples: Sequence[Columns], length: int, pad_id: int = 0) -> Columns:
    """One row of `length` positions: each example shifted within itself, so nothing predicts across examples.
    Positions start at 0 and segments count from 1 in each example; padding has segment and weight 0."""
    row = {name: np.zeros(length, dtype) for name, dtype in COLUMNS.items()}
    row["tokens"][:] = pad_id
    row["targets"][:] = pad_id
    start = 0
    for segment, example in enumerate(examples, 1):
        size = len(example["tokens"]) - 1
        if start + size > length:
            raise ValueError(f"the examples of a row take more than its {length} positions")
        part = slice(start, start + size)
        row["tokens"][part] = example["tokens"][:-1]
        row["targets"][part] = example["tokens"][1:]
        row["weights"][part] = example["weights"][1:]
        row["positions"][part] = np.arange(size)
        row["segments"][part] = segment
        start += size
    return row
