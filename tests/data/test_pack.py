"""Packing: every example exactly once, within capacity, each alone in its segment."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.pack import COLUMNS, fill_row, pack_window


@given(lengths=st.lists(st.integers(0, 32), max_size=60), seed=st.none() | st.integers(0, 2**32))
def test_every_example_once_and_no_row_too_full(lengths, seed):
    rows = pack_window(lengths, 32, seed)
    assert sorted(index for row in rows for index in row) == [index for index, length in enumerate(lengths) if length]
    assert all(0 < sum(lengths[index] for index in row) <= 32 for row in rows)
    assert rows == pack_window(lengths, 32, seed)
    # best fit never leaves two rows that could be one
    sums = sorted(sum(lengths[index] for index in row) for row in rows)
    assert len(sums) < 2 or sums[0] + sums[1] > 32


def test_best_fit_is_good():
    lengths = np.random.default_rng(0).integers(3, 30, 1000).tolist()
    rows = pack_window(lengths, 64, 0)
    assert sum(lengths) / (64 * len(rows)) > 0.97


def test_seed_moves_rows_only():
    lengths = list(range(1, 30))
    one, two = pack_window(lengths, 32, 1), pack_window(lengths, 32, 2)
    assert one != two
    assert sorted(one) == sorted(two)
    assert pack_window([5, 5, 5], 10, None) == [[0, 1], [2]]


def test_too_long():
    with pytest.raises(ValueError, match="takes 11 positions, a row has 10"):
        pack_window([3, 11], 10, 0)


EXAMPLE = st.integers(2, 9).flatmap(
    lambda size: st.tuples(
        st.lists(st.integers(1, 99), min_size=size, max_size=size),
        st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=size, max_size=size),
    )
)


@given(given=st.lists(EXAMPLE, max_size=6))
def test_rows_hold_shifted_examples(given):
    examples = [{"tokens": np.array(t, np.int32), "weights": np.array(w, np.float32)} for t, w in given]
    row = fill_row(examples, 60, pad_id=100)
    assert {name: column.dtype.type for name, column in row.items()} == COLUMNS
    used = 0
    for segment, example in enumerate(examples, 1):
        inside = row["segments"] == segment
        size = len(example["tokens"]) - 1
        used += size
        assert row["tokens"][inside].tolist() == example["tokens"][:-1].tolist()
        assert row["targets"][inside].tolist() == example["tokens"][1:].tolist()
        assert row["weights"][inside].tolist() == example["weights"][1:].tolist()
        assert row["positions"][inside].tolist() == list(range(size))
    padding = row["segments"] == 0
    assert padding.sum() == 60 - used
    assert not padding[:used].any()
    assert (row["tokens"][padding] == 100).all()
    assert not row["weights"][padding].any()


def test_a_row_that_is_too_small():
    example = {"tokens": np.arange(5), "weights": np.ones(5)}
    with pytest.raises(ValueError, match="more than its 3 positions"):
        fill_row([example], 3)
