"""Thresholds against sorts in plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.threshold import highest_enough, kth_largest, ordered, unordered

KTH = jax.jit(kth_largest)
ENOUGH = jax.jit(highest_enough)
EXTREMES = (0.0, -0.0, 1e30, -1e30, 1e-30, -1e-30, 3.0, 3.0, np.finfo(np.float32).max, np.finfo(np.float32).min)


def rows(kind, vocab, dtype, seed=0):
    """Three rows of numbers that a search may stumble over."""
    rng = np.random.default_rng(seed)
    if kind == "smooth":
        x = rng.normal(size=(3, vocab)) * 4
    elif kind == "ties":
        x = rng.integers(-3, 3, (3, vocab)) / 2
    elif kind == "equal":
        x = np.broadcast_to(np.asarray([[0.0], [-5.0], [7.0]]), (3, vocab))
    elif kind == "extremes":
        x = rng.choice(EXTREMES, (3, vocab))
    else:
        x = np.where(rng.random((3, vocab)) < 0.7, -np.inf, rng.normal(size=(3, vocab)))
    return np.asarray(x, dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["smooth", "ties", "equal", "extremes", "removed"])
@pytest.mark.parametrize("vocab", [1, 3, 127, 300, 1000])
def test_kth_largest_is_a_sort(kind, vocab, dtype):
    with jax.enable_x64(dtype == np.float64):
        x = rows(kind, vocab, dtype)
        descending = -np.sort(-x, axis=1)
        for k in ((1, 2, 3), (vocab, vocab - 1, vocab // 2), (7, vocab + 1, 10 * vocab), (50, 1, 128)):
            k = np.maximum(k, 1)
            found = np.asarray(KTH(jnp.asarray(x), jnp.asarray(k, jnp.int32)))
            assert found.dtype == dtype
            expected = np.where(k < vocab, descending[np.arange(3), np.minimum(k, vocab) - 1], -np.inf)
            assert ((x >= found[:, None]) == (x >= expected[:, None])).all()


@pytest.mark.parametrize("kind", ["smooth", "ties", "equal", "extremes", "removed"])
@pytest.mark.parametrize("vocab", [1, 3, 300])
def test_smallest_set_that_weighs_enough(kind, vocab):
    rng = np.random.default_rng(1)
    x = rows(kind, vocab, np.float32, 2)
    weights = rng.integers(1, 9, x.shape).astype(np.float32)  # whole: every sum is exact
    for share in (1e-3, 0.2, 0.5, 0.9, 1.0):
        target = np.ceil(share * weights.sum(1))
        low, top = np.full(3, -np.inf, np.float32), x.max(1)
        found = np.asarray(ENOUGH(*map(jnp.asarray, (x, weights, target, low, top))))
        for row, weight, threshold, wanted in zip(x, weights, found, target, strict=True):
            values = sorted(set(row.tolist()), reverse=True)
            expected = next(value for value in values if weight[row >= value].sum() >= wanted)
            assert ((row >= threshold) == (row >= expected)).all()


def test_nothing_asked_for_asks_for_all_and_the_impossible_gives_low():
    x = jnp.asarray([[1.0, 2.0, 3.0]] * 3)
    low, top = jnp.asarray([-jnp.inf, 2.0, 2.0]), jnp.full(3, 3.0)
    found = ENOUGH(x, None, jnp.asarray([0.0, -1.0, 9.0]), low, top)
    assert found.tolist() == [-np.inf, -np.inf, 2.0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ordered_keeps_the_order_and_comes_back(dtype):
    with jax.enable_x64(dtype == np.float64):
        x = np.sort(np.asarray([-np.inf, np.inf, *EXTREMES[2:], 0.0, *np.linspace(-3, 3, 17)], dtype))
        keys = np.asarray(ordered(jnp.asarray(x)))
        assert (np.diff(keys.astype(object)) >= 0).all()
        assert ((np.diff(keys.astype(object)) > 0) == (np.diff(x) != 0)).sum() == len(x) - 1
        assert np.asarray(unordered(jnp.asarray(keys), jnp.dtype(dtype))).tolist() == x.tolist()
