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
# columns of some kinds of examples only; branches: 0 what all go on from, 1 chosen, 2 rejected (of pairs), or
# 1 the completion, 2 another row's (of labelled ones)
MORE = {
    "branches": np.int32,
    "ref_logprobs": np.float32,
    "margins": np.float32,
    "desirable": np.float32,
    "labels": np.float32,
    "completions": np.int32,
    "sampler_logprobs": np.float32,
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


def shifted(example: Columns) -> Columns:
    """An example's columns as a row has them; one without targets is shifted within itself."""
    if "targets" in example:
        return example
    tokens, weights = example["tokens"], example["weights"]
    return {
        "tokens": tokens[:-1],
        "targets": tokens[1:],
        "weights": weights[1:],
        "positions": np.arange(len(tokens) - 1),
    }


def fill_row(examples: Sequence[Columns], length: int, pad_id: int = 0, more: Sequence[str] = ()) -> Columns:
    """One row of `length` positions: examples one after the other, nothing predicts across them.
    Positions start at 0 and segments count from 1 in each example; padding has segment and weight 0.
    more: columns besides those that every example has."""
    row = {name: np.zeros(length, dtype) for name, dtype in (COLUMNS | {name: MORE[name] for name in more}).items()}
    row["tokens"][:] = pad_id
    row["targets"][:] = pad_id
    start = 0
    for segment, example in enumerate(examples, 1):
        columns = shifted(example)
        size = len(columns["tokens"])
        if start + size > length:
            raise ValueError(f"the examples of a row take more than its {length} positions")
        part = slice(start, start + size)
        row["segments"][part] = segment
        for name in ("tokens", "targets", "weights", "positions", *more):
            row[name][part] = columns[name]
        start += size
    return row
