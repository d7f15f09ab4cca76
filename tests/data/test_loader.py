"""Batches: exact position, the same whatever the process count, everything once an epoch."""

import itertools
import json
import threading
import time

import numpy as np
import pytest

from configs.errors import UsageError
from data.examples import Examples
from data.loader import Loader
from data.prefetch import Prefetch
from data.stats import summarise

ROWS = [{"tokens": [3 + index % 97, 200, *[5] * (index % 13), 7]} for index in range(101)]


@pytest.fixture
def loader(tokenizer_with, settings):
    """loader(batch_size=4, epochs=2, process_index=0, ..., packing='none', ...)"""
    names = {"batch_size", "seed", "epochs", "process_index", "process_count", "rows"}

    def make(**given) -> Loader:
        data = settings(**{"max_length": 32, "window": 16, **{k: v for k, v in given.items() if k not in names}})
        mine = {"batch_size": 4, **{k: v for k, v in given.items() if k in names}}
        examples = Examples(mine.pop("rows", ROWS), tokenizer_with("chatml"), data)
        return Loader(examples, data, **mine)

    return make


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def examples_in(batches):
    """All examples of some batches, as tuples of targets."""
    found = []
    for batch in batches:
        for targets, segments in zip(batch["targets"], batch["segments"], strict=True):
            found += [tuple(targets[segments == number]) for number in range(1, segments.max() + 1)]
    return found


@pytest.mark.parametrize("packing", ["best_fit", "none"])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_every_example_once_an_epoch(loader, packing, shuffle, prefetch):
    one = loader(packing=packing, shuffle=shuffle, prefetch=prefetch, epochs=2)
    batches = list(one)
    assert len(batches) == one.steps(2)
    want = sorted(tuple(row["tokens"][1:]) for row in ROWS) * 2
    assert sorted(examples_in(batches)) == sorted(want)
    assert all(batch["tokens"].shape == (4, 32) for batch in batches)
    with pytest.raises(StopIteration):
        next(one)


def test_order(loader):
    plain = loader(packing="none", shuffle=False, epochs=1)
    assert examples_in(plain) == [tuple(row["tokens"][1:]) for row in ROWS]
    one = loader(packing="none")
    epochs = [[row for window in one.windows(epoch) for row in window] for epoch in (0, 1)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert next(loader(seed=1).windows(0)) != next(loader(seed=2).windows(0))


@pytest.mark.parametrize("packing", ["best_fit", "none"])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_resume_is_bitwise(loader, packing, prefetch):
    whole = loader(packing=packing, prefetch=prefetch, batch_size=3, epochs=3)
    states, batches = [whole.state()], []
    for batch in whole:
        batches.append(batch)
        states.append(json.loads(json.dumps(whole.state())))
    assert len(batches) == whole.steps(3)
    for start in range(0, len(batches), 5):
        part = loader(packing=packing, prefetch=prefetch, batch_size=3, epochs=3)
        part.restore(states[start])
        for number, batch in enumerate(part, start):
            same(batch, batches[number])
            assert part.state() == states[number + 1]
        assert number == len(batches) - 1


def test_going_back_in_one_loader(loader):
    one = loader(prefetch=2)
    first = next(one)
    state = one.state()
    second = next(one)
    one.close()
    third = next(one)
    one.restore(state)
    same(next(one), second)
    same(next(one), third)
    one.restore(loader().state())
    same(next(one), first)
    one.close()


def test_processes_take_strided_rows(loader):
    whole = list(loader(epochs=1))
    parts = [list(loader(epochs=1, process_index=index, process_count=2)) for index in range(2)]
    for number, batch in enumerate(whole):
        for name, column in batch.items():
            for index in range(2):
                np.testing.assert_array_equal(parts[index][number][name], column[index::2])
    with pytest.raises(UsageError, match="does not divide evenly"):
        loader(process_count=3)


def test_fractions_of_an_epoch(loader):
    for packing, epochs in itertools.product(("best_fit", "none"), (0.3, 1.0, 1.5)):
        one = loader(packing=packing, epochs=epochs)
        batches = list(one)
        assert len(batches) == one.steps(epochs)
        rows = sum(int((batch["segments"].max(axis=1) > 0).sum()) for batch in batches)
        assert rows == one.rows(epochs)
        # and from the middle
        later = loader(packing=packing, epochs=epochs)
        for _ in range(len(batches) - 1):
            next(later)
        again = loader(packing=packing, epochs=epochs)
        again.restore(later.state())
        same(next(again), batches[-1])
        assert list(again) == []


def test_without_end(loader):
    one = loader(rows=ROWS[:3], packing="none")
    for _ in range(20):
        assert (next(one)["segments"].max(axis=1) > 0).all()
    assert one.state()["epoch"] > 20


def test_last_batch_is_filled_up(loader):
    batches = list(loader(rows=ROWS[:5], packing="none", epochs=1))
    assert len(batches) == 2
    assert batches[1]["segments"].max(axis=1).tolist() == [1, 0, 0, 0]
    assert not batches[1]["weights"][1:].any()


def test_dropped_rows_vanish(loader):
    rows = [row if index % 3 else {"tokens": [1]} for index, row in enumerate(ROWS)]
    one = loader(rows=rows, epochs=1)
    assert len(examples_in(one)) == sum(1 for index in range(101) if index % 3)
    with pytest.raises(UsageError, match="no example is left of 20 rows: 20 fewer than two tokens"):
        next(loader(rows=[{"tokens": [1]}] * 20))
    with pytest.raises(UsageError, match="no example is left"):
        list(loader(rows=[{"tokens": [1]}] * 20, epochs=1, prefetch=2))
    with pytest.raises(UsageError, match="no example is left"):
        loader(rows=[{"tokens": [1]}] * 20).steps(1)


def test_a_position_of_other_data(loader):
    with pytest.raises(UsageError, match="does not fit this data"):
        loader().restore({**loader().state(), "window": 50, "drawn": [800]})
    assert loader().fingerprint() == loader().fingerprint()
    assert loader().fingerprint() != loader(window=8).fingerprint()
    json.dumps(loader().fingerprint())


def test_errors_of_the_thread_arrive_in_turn():
    def source():
        yield 1
        yield 2
        raise RuntimeError("broken")

    ahead = Prefetch(source(), 2)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(RuntimeError, match="broken"):
        next(ahead)
    with pytest.raises(StopIteration):
        next(ahead)
    ahead.close()


def test_prefetch_is_bounded_and_stops():
    made = []
    ahead = Prefetch((made.append(number) or number for number in itertools.count()), 3)
    assert next(ahead) == 0
    time.sleep(0.3)
    assert len(made) <= 5
    ahead.close()
    assert not any(thread.name == "purestep-data" and thread.is_alive() for thread in threading.enumerate())


def test_summary(loader):
    rows = [*ROWS, {"tokens": [1]}, {"tokens": [1, 2, 3], "weights": [1, 0, 0]}, {"tokens": [4] * 100}]
    one = loader(rows=rows)
    summary = summarise(one)
    positions = sum(len(row["tokens"]) - 1 for row in ROWS) + 32
    assert (summary.rows, summary.examples, summary.truncated) == (104, 102, 1)
    assert summary.dropped == {"too_short": 1, "no_trained_token": 1}
    assert summary.positions == summary.trained == positions
    assert summary.percentiles[0] == 2
    assert summary.percentiles[100] == 32
    assert sum(count for _, count in summary.histogram) == 102
    assert summary.fill == positions / (32 * summary.packed_rows)
    text = "\n".join(summary.lines())
    assert "102 examples of 104 rows" in text
    assert "1 fewer than two tokens" in text
