"""Draws against the distribution they are from; the k largest against a sort in plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from decode.choose import BLOCKS, first_largest, gumbel_perturbed, largest, sample
from decode.logits import TopK

VOCAB = 1003
DRAWS, PART = 20_000, 4_000
SAMPLE = jax.jit(sample)
LARGEST = jax.jit(largest, static_argnums=1)


def seeds_of(count, start=0):
    """Different seed pairs, one a row."""
    return jnp.stack([jnp.full(count, 11, jnp.uint32), jnp.arange(start, start + count, dtype=jnp.uint32)], 1)


@jax.jit
def draw_part(logits, start):
    rows = jnp.broadcast_to(logits, (PART, logits.shape[0]))
    return sample(rows, seeds_of(PART) + jnp.asarray([[0, 1]], jnp.uint32) * start, jnp.full(PART, 5))[0]


def distributions():
    """Logits of a peaked, a flat and a masked distribution."""
    rng = np.random.default_rng(0)
    noise = jnp.asarray(rng.normal(size=VOCAB), jnp.float32)
    return {
        "peaked": 4 * noise,
        "flat": jnp.zeros(VOCAB),
        "top-k": TopK(20)(2 * noise[None])[0],
        "last block alone": jnp.where(jnp.arange(VOCAB) < VOCAB - 3, -jnp.inf, noise),
    }


@pytest.mark.parametrize("name", distributions())
def test_draws_are_from_the_softmax(name):
    assert all(VOCAB % size for size in BLOCKS)
    logits = distributions()[name]
    tokens = np.concatenate([draw_part(logits, jnp.uint32(start)) for start in range(0, DRAWS, PART)])
    probs = np.exp(np.asarray(logits, np.float64) - float(logits.max()))
    expected = DRAWS * probs / probs.sum()
    observed = np.bincount(tokens, minlength=VOCAB)
    assert len(observed) == VOCAB
    assert not observed[np.isneginf(logits)].any()
    rare = expected < 5  # together in one cell
    cells = [np.append(x[~rare], x[rare].sum()) for x in (observed, expected)]
    if cells[1][-1] < 1e-3:
        assert cells[0][-1] == 0
        cells = [x[:-1] for x in cells]
    assert len(cells[0]) > 2
    assert chisquare(*cells).pvalue > 1e-3


def test_rare_tokens_come_as_often_as_they_should():
    # two tokens in different blocks, one of them with probability 1e-3
    logits = jnp.full(VOCAB, -jnp.inf).at[3].set(0).at[900].set(np.log(1e-3))
    tokens = np.concatenate([draw_part(logits, jnp.uint32(start)) for start in range(0, DRAWS, PART)])
    assert set(tokens) == {3, 900}
    assert abs((tokens == 900).sum() - DRAWS * 1e-3) < 4 * np.sqrt(DRAWS * 1e-3)


@pytest.mark.parametrize("vocab", [1, 300, 512])
def test_a_row_does_not_see_its_batch(vocab):
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(6, vocab)) * 2, jnp.float32)
    seeds, positions = seeds_of(6), jnp.asarray([0, 1, 1, 70, 3, 3], jnp.int32)
    tokens, total = SAMPLE(logits, seeds, positions)
    for rows in ([3], [5, 4, 3, 2, 1, 0], [2, 2, 1]):
        some, totals = SAMPLE(logits[np.asarray(rows)], seeds[np.asarray(rows)], positions[np.asarray(rows)])
        assert (some == tokens[np.asarray(rows)]).all()
        np.testing.assert_allclose(totals, total[np.asarray(rows)], rtol=1e-6, atol=1e-6)


def test_seed_number_and_position_each_change_the_draw():
    logits = jnp.zeros((8, VOCAB))
    seeds = jnp.asarray([[0, 0], [1, 0], [0, 1], [1, 1], [0, 0], [1, 0], [0, 1], [0, 0]], jnp.uint32)
    positions = jnp.asarray([0, 0, 0, 0, 1, 1, 1, 0], jnp.int32)
    tokens = SAMPLE(logits, seeds, positions)[0].tolist()
    assert len(set(tokens)) == 7
    assert tokens[0] == tokens[-1]


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-13)])
def test_logsumexp_comes_with_the_draw(dtype, tolerance):
    with jax.enable_x64(dtype == np.float64):
        x = np.random.default_rng(2).normal(size=(4, 301)) * 20 + 1000
        x[:, ::3] = -np.inf
        x = x.astype(dtype)
        tokens, total = SAMPLE(jnp.asarray(x), seeds_of(4), jnp.zeros(4, jnp.int32))
        exact = x.astype(np.float64)
        top = exact.max(1)
        np.testing.assert_allclose(total, top + np.log(np.exp(exact - top[:, None]).sum(1)), rtol=tolerance)
        assert total.dtype == dtype
        assert np.isfinite(x[np.arange(4), tokens]).all()


def test_rows_without_a_choice():
    x = jnp.full((3, VOCAB), -jnp.inf).at[1, 1000].set(-4.0)
    x = x.at[2].set(jnp.nan)
    tokens, total = SAMPLE(x, seeds_of(3), jnp.zeros(3, jnp.int32))
    assert tokens[1] == 1000
    assert (tokens >= 0).all()
    assert (tokens < VOCAB).all()
    assert total[0] == -jnp.inf
    assert total[1] == -4.0


def test_the_draw_keeps_its_choice_when_logits_move_by_rounding():
    x = jnp.asarray(np.random.default_rng(3).normal(size=(PART, VOCAB)), jnp.float32)
    moved = x * (1 + 1e-6)
    a, b = (SAMPLE(y, seeds_of(PART), jnp.zeros(PART, jnp.int32))[0] for y in (x, moved))
    assert (a == b).mean() > 0.999


def test_perturbed_logits_draw_without_replacement():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.2]))
    rows = jnp.broadcast_to(logits, (DRAWS, 3))
    noisy = jax.jit(gumbel_perturbed)(rows, seeds_of(DRAWS), jnp.zeros(DRAWS, jnp.int32))
    first, second = np.argsort(-np.asarray(noisy), axis=1)[:, :2].T
    p = np.asarray([0.5, 0.3, 0.2])
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    expected = [DRAWS * p[i] * p[j] / (1 - p[i]) for i, j in pairs]
    assert chisquare([((first == i) & (second == j)).sum() for i, j in pairs], expected).pvalue > 1e-3


def test_first_largest_is_argmax():
    rng = np.random.default_rng(4)
    for x in (
        rng.normal(size=(4, 97)).astype(np.float32),
        rng.integers(0, 3, (5, 300)),
        np.asarray([[1.0, 3.0, 3.0], [-np.inf, -np.inf, -5.0], [-np.inf, -np.inf, -np.inf]], np.float32),
    ):
        assert (np.asarray(first_largest(jnp.asarray(x))) == x.argmax(-1)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("vocab", "k"), [(1, 1), (50, 50), (301, 7), (1100, 2), (5121, 10), (12000, 20), (12000, 1)])
@pytest.mark.parametrize("kind", ["smooth", "ties", "removed", "equal"])
def test_largest_is_a_stable_sort(kind, vocab, k, dtype):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(3, vocab)).astype(dtype)
    if kind == "ties":
        x = np.round(x) + 0.0  # without -0, which lax.top_k puts below 0
    elif kind == "removed":
        x[rng.random(x.shape) < 0.999] = -np.inf
    elif kind == "equal":
        x[:] = -2
    with jax.enable_x64(dtype == np.float64):
        values, ids = LARGEST(jnp.asarray(x), k)
        order = np.argsort(-x, axis=1, kind="stable")[:, :k]
        assert (np.asarray(ids) == order).all()
        assert (np.asarray(values) == np.take_along_axis(x, order, 1)).all()
        assert values.dtype == dtype
