"""Mixtures: exact shares, the same for any number of processes, resumed anywhere."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.data import Data, Mixed, Replay
from configs.errors import UsageError
from data.examples import Examples
from data.loader import Loader, Ramp
from data.mix import Mixture, Part
from data.mixture import open_mixture


def parts_of(weights, size=50, **more):
    """Sources of `size` examples with the given weights."""
    return [
        Part(name, i * size, size, ((0, w),), **more)
        for i, (name, w) in enumerate(zip("abcdef", weights, strict=False))
    ]


def draws(mixture, count, window=64, step=0):
    """The numbers of the first examples, and the place after them."""
    place, numbers = mixture.start(), []
    while len(numbers) < count:
        more, drawn, owed, ends = mixture.draw(place, min(window, count - len(numbers)), step)
        numbers += more
        place = type(place)(place.epoch + ends, 0 if ends else place.window + 1, 0, drawn, owed)
    return numbers, place


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=6), st.integers(1, 300))
def test_shares_are_exact_after_any_number_of_draws(weights, window):
    mixture = Mixture(parts_of(weights), shuffle=False)
    numbers, place = draws(mixture, 10_000, window)
    shares = np.asarray(weights) / sum(weights)
    counts = np.bincount(np.asarray(numbers) // 50, minlength=len(weights))
    assert tuple(counts) == place.drawn
    assert np.abs(counts / 10_000 - shares).max() <= 1e-3
    for at in (100, 1000):
        some = np.bincount(np.asarray(numbers[:at]) // 50, minlength=len(weights))
        assert np.abs(some - at * shares).max() < len(weights)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=4), st.integers(0, 5))
def test_each_source_gives_every_example_once_before_any_twice(weights, seed):
    mixture = Mixture(parts_of(weights, size=60), seed)
    numbers, place = draws(mixture, 300)
    for part, drawn in zip(mixture.parts, place.drawn, strict=True):
        own = [n for n in numbers if part.start <= n < part.start + part.size]
        for begin in range(0, drawn, part.size):
            epoch = own[begin : begin + part.size]
            assert len(set(epoch)) == len(epoch)


def test_an_epoch_is_one_pass_over_the_first_source():
    mixture = Mixture(parts_of([3, 1], size=30))
    numbers, place, ends = [], mixture.start(), False
    while not ends:
        more, drawn, owed, ends = mixture.draw(place, 16, 0)
        numbers += more
        place = type(place)(0, place.window + 1, 0, drawn, owed)
    assert sorted(n for n in numbers if n < 30) == list(range(30))
    assert len(numbers) in (39, 40, 41)


@pytest.mark.parametrize(("linear", "at_50"), [(False, 1.0), (True, 0.75)])
def test_weights_by_step(linear, at_50):
    part = Part("a", 0, 1, ((0, 1.0), (100, 0.5)), linear=linear)
    assert [part.weight(step) for step in (0, 50, 100, 1000)] == [1.0, at_50, 0.5, 0.5]


def test_a_source_that_is_used_up():
    few = [Part("a", 0, 50, ((0, 1.0),)), Part("b", 50, 10, ((0, 1.0),), epochs=1.5)]
    with pytest.raises(UsageError, match=r"data.mix.b: its 10 examples have been seen 1.5 times at step 7"):
        draws(Mixture(few), 100, step=7)
    numbers, place = draws(Mixture(few, drop=True), 45)
    assert place.drawn == (30, 15)
    assert all(n < 50 for n in numbers[31:])
    with pytest.raises(UsageError, match="every source with a weight is used up"):
        draws(Mixture(parts_of([1, 1], size=4, epochs=1), drop=True), 9)


@pytest.mark.parametrize(
    ("weights", "words"),
    [([0, 0], "all weights are 0 at step 0"), ([1, 0], "data.mix.b.weight is 0 at every step: leave the source out")],
)
def test_weights_of_nothing(weights, words):
    with pytest.raises(UsageError, match=words):
        Mixture(parts_of(weights))


def test_a_stage_without_any_weight():
    two = [Part("a", 0, 5, ((0, 1.0), (10, 0.0))), Part("b", 5, 5, ((0, 1.0), (10, 0.0)))]
    with pytest.raises(UsageError, match="all weights are 0 at step 10"):
        Mixture(two)


@pytest.fixture
def files(tmp_path):
    """Two sources: of 40 short rows whose tokens are below 100, of 20 longer ones above."""
    for name, count, low, most in (("short", 40, 10, 5), ("long", 20, 100, 15)):
        rows = [{"tokens": [low + i % 90, *[low] * (2 + i % most), 7]} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def loader(files, tokenizer_with):
    """loader(process_index=0, ..., mix_by='tokens', ...)"""

    def make(process_index=0, process_count=1, epochs=None, ramp=None, **given):
        mix = {"short": Mixed(train=(str(files / "short.jsonl"),), weight=3.0),
               "long": Mixed(train=(str(files / "long.jsonl"),), weight=1.0)}  # fmt: skip
        data = Data(**{"mix": mix, "max_length": 32, "window": 16, "prefetch": 0, **given})
        examples, mixture = open_mixture(tokenizer_with("chatml"), data)
        return Loader(examples, data, 4, 0, process_index, process_count, epochs, mixture, ramp)

    return make


@pytest.mark.parametrize("packing", ["best_fit", "concat", "none"])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_resume_and_processes(loader, packing, prefetch):
    whole = loader(packing=packing, prefetch=prefetch)
    states, batches = [whole.state()], []
    for batch in itertools.islice(whole, 20):
        batches.append(batch)
        states.append(json.loads(json.dumps(whole.state())))
    whole.close()
    for start in (1, 13):
        for count in (1, 4):  # hosts that were added meanwhile read the same rows
            for index in range(count):
                part = loader(index, count, packing=packing, prefetch=prefetch)
                part.restore(states[start])
                for number, batch in enumerate(itertools.islice(part, 20 - start), start):
                    for name, column in batch.items():
                        np.testing.assert_array_equal(column, batches[number][name][index::count])
                    assert part.state() == states[number + 1]
                part.close()


def test_realised_shares_of_tokens(loader):
    """By tokens: 3 to 1 of what is trained on, within what one window can be off."""
    one = loader(mix_by="tokens")
    counts = np.zeros(2)
    for batch in itertools.islice(one, 60):
        inside = batch["segments"] > 0
        counts += [(inside & (batch["tokens"] < 100)).sum(), (inside & (batch["tokens"] >= 100)).sum()]
    assert one.shares()["short"] == pytest.approx(counts[0] / counts.sum())
    assert counts[0] / counts.sum() == pytest.approx(0.75, abs=0.02)
    by_examples = loader()
    list(itertools.islice(by_examples, 60))
    assert by_examples.shares()["short"] < 0.65


def test_weights_by_size_and_temperature(loader, files):
    def sizes(**more):
        mix = {name: Mixed(train=(str(files / f"{name}.jsonl"),)) for name in ("short", "long")}
        parts = loader(mix=mix, **more).mixture.parts
        return [part.weight(0) for part in parts]

    assert sizes() == [40, 20]
    one, two = sizes(mix_temperature=2.0)
    assert one / two == pytest.approx(2**0.5)


def test_replay(files, tokenizer_with):
    data = Data(train=(str(files / "short.jsonl"),), replay=Replay(train=(str(files / "long.jsonl"),), share=0.2))
    examples, mixture = open_mixture(tokenizer_with("chatml"), data)
    numbers, _ = draws(mixture, 50)
    assert sum(n >= 40 for n in numbers) == 10
    assert isinstance(examples, Examples)


def test_stages_follow_the_step(loader, files):
    paths = {name: (str(files / f"{name}.jsonl"),) for name in ("short", "long")}
    late = Mixed(train=paths["long"], weight={0: 0.0, 5: 9.0})
    mix = {"short": Mixed(train=paths["short"], weight=1.0), "long": late}
    one, seen = loader(mix=mix, window=4, packing="none"), []
    for batch in itertools.islice(one, 12):
        seen.append(float((batch["tokens"][:, 0] >= 100).mean()))
    assert seen[:5] == [0.0] * 5
    assert np.mean(seen[6:]) > 0.8


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(0, 9), st.integers(0, 12), st.sampled_from([1, 2, 4]))
def test_a_ramp_counts_its_sequences(most, start, steps, unit):
    ramp = Ramp(most * unit, min(start, most * unit), steps, unit)
    sizes = [ramp.size(step) for step in range(steps + 5)]
    assert sizes == sorted(sizes)
    assert all(size % unit == 0 and 0 < size <= most * unit for size in sizes)
    assert sizes[steps:] == [most * unit] * 5
    for step in range(steps + 5):
        assert ramp.before(step) == sum(sizes[:step])
        assert ramp.step(ramp.before(step)) == step
        assert ramp.step(ramp.before(step) + sizes[step] - 1) == step


def test_batches_of_a_ramp(loader):
    one = loader(packing="none", ramp=Ramp(4, 1, 6, 2))
    full = [(batch["segments"].max(1) > 0).tolist() for batch in itertools.islice(one, 8)]
    # whole micro-batches, which are every second row, stay empty
    assert full[0] == [True, False, True, False]
    assert [sum(rows) for rows in full] == [2, 2, 2, 2, 2, 2, 4, 4]
    again = loader(packing="none", ramp=Ramp(4, 1, 6, 2))
    for _ in range(5):
        next(again)
    later = loader(packing="none", ramp=Ramp(4, 1, 6, 2))
    later.restore(again.state())
    assert [sum(batch["segments"].max(1) > 0) for batch in itertools.islice(later, 3)] == [2, 4, 4]
