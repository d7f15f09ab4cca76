"""Several examples in one row: best-fit decreasing over a window, and the columns of a row."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from configs.schema import Data

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


class Piece(NamedTuple):
    """What a row holds of an example: its positions start .. stop; its tokens, where rows are one stream."""

    number: int
    start: int
    stop: int


def pack_rows(lengths: Sequence[int], data: "Data", seed: int | Sequence[int] | None) -> list[list[Piece]]:
    """The rows of a window, as pieces of its examples, which have `lengths` positions each (0: left out).

    Rows come shuffled by `seed`; with None in order. Without document_mask a row is max_length + 1 tokens, of which
    the first is the last of another row where a document goes on, so that every token is predicted once.
    """
    stream = not data.document_mask
    sizes = [length + stream if length else 0 for length in lengths]
    capacity = data.max_length + stream
    if data.packing == "concat":
        rows = _cut_stream(sizes, capacity, stream)
    else:
        pieces = [piece for index, size in enumerate(sizes) for piece in _split(index, size, capacity, stream)]
        if data.packing == "best_fit":
            packed = pack_window([piece.stop - piece.start for piece in pieces], capacity, seed)
            return [[pieces[number] for number in row] for row in packed]
        return [[piece] for piece in pieces]
    if seed is None:
        return rows
    return [rows[number] for number in np.random.default_rng(seed).permutation(len(rows))]


def _split(index: int, size: int, capacity: int, overlap: int) -> list[Piece]:
    """An example in pieces that fit a row, one after the other."""
    stride = capacity - overlap
    return [Piece(index, at, min(at + capacity, size)) for at in range(0, max(size - overlap, 0), stride)]


def _cut_stream(sizes: Sequence[int], capacity: int, overlap: int) -> list[list[Piece]]:
    """All examples one after the other, cut into rows wherever they are full."""
    ends = list(accumulate(sizes))
    total, rows = ends[-1] if ends else 0, []
    for begin in range(0, max(total - overlap, 0), capacity - overlap):
        end, row = min(begin + capacity, total), []
        for index in range(bisect_right(ends, begin), len(sizes)):
            first = ends[index] - sizes[index]
            if first >= end:
                break
            if sizes[index]:
                row.append(Piece(index, max(begin - first, 0), min(end, ends[index]) - first))
        rows.append(row)
    return rows


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


def fill_pieces(
    row: Sequence[Piece], examples: Sequence[Columns], data: "Data", pad_id: int = 0, more: Sequence[str] = ()
) -> Columns:
    """The columns of a row of pieces of examples, as data.document_mask and data.reset_positions say."""
    length = data.max_length
    if not data.document_mask:
        joined = {
            name: np.concatenate([e[name][p.start : p.stop] for p, e in zip(row, examples, strict=True)])
            for name in ("tokens", "weights")
            if row
        }
        return fill_row([joined] if row else [], length, pad_id, more)
    filled = fill_row([_cut(*pair) for pair in zip(row, examples, strict=True)], length, pad_id, more)
    if not data.reset_positions:
        filled["positions"] = np.where(filled["segments"] > 0, np.arange(length, dtype=np.int32), 0)
    return filled


def _cut(piece: Piece, example: Columns) -> Columns:
    """A piece of an example, as a row has it; positions start where it starts."""
    columns = shifted(example)
    if piece.stop - piece.start == len(columns["tokens"]):
        return columns
    part = {name: column[piece.start : piece.stop] for name, column in columns.items()}
    return {**part, "positions": part["positions"] - piece.start}


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
