"""Processors against sorts in plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.logits import Temperature, TopK, TopP, first_largest, process, warpers

SHAPES = ((1, 50), (3, 1000))


def draw(shape, seed=0, scale=3.0):
    return scale * jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 2, 7, 50, 5000])
def test_top_k_is_a_sort(shape, k):
    logits = draw(shape)
    kept = np.isfinite(jax.jit(TopK(k))(logits))
    order = np.argsort(-np.asarray(logits), axis=1)
    expected = np.zeros(shape, bool)
    np.put_along_axis(expected, order[:, :k], True, axis=1)
    assert (kept == expected).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_is_a_sort(shape, p):
    logits = draw(shape)
    out = np.asarray(jax.jit(TopP(p))(logits))
    for row, got in zip(np.asarray(logits, np.float64), out, strict=True):
        order = np.argsort(-row)
        probs = np.exp(row - row.max())[order] / np.exp(row - row.max()).sum()
        above = np.cumsum(probs) - probs  # transformers keeps a token when what lies above it has not reached p
        clear = np.abs(above - p) > 1e-5  # float32 sums
        assert (np.isfinite(got[order]) == (above < p))[clear].all()
        kept = np.isfinite(got)
        assert (got[kept] == row[kept].astype(np.float32)).all()


def test_ties_stay_together_and_removed_tokens_stay_removed():
    logits = jnp.asarray([[0.0, -0.0, 1.0, -jnp.inf, 0.0, -2.0]])
    assert np.isfinite(TopK(2)(logits)).tolist() == [[True, True, True, False, True, False]]
    assert np.isfinite(TopP(0.5)(logits)).tolist() == [[True, True, True, False, True, False]]
    assert np.isfinite(TopK(6)(logits)).sum() == 5


def test_order_is_temperature_top_k_top_p():
    chain = warpers(0.5, 3, 0.9)
    assert [type(p) for p in chain] == [Temperature, TopK, TopP]
    assert warpers(1.0, 0, 1.0) == ()
    logits = draw((2, 40))
    by_hand = TopP(0.9)(TopK(3)(logits / 0.5))
    assert (process(chain, logits) == by_hand).all()


def test_numbers_are_traced_not_compiled_in():
    traces = []

    @jax.jit
    def run(chain, logits):
        traces.append(1)
        return process(chain, logits)

    for temperature, k, p in ((0.5, 3, 0.9), (0.7, 9, 0.2)):
        run(warpers(temperature, k, p), draw((2, 40)))
    assert len(traces) == 1


def test_first_largest_is_argmax():
    for x in (draw((4, 97)), jnp.asarray([[1.0, 3.0, 3.0], [-jnp.inf, -jnp.inf, -5.0]])):
        assert (first_largest(x) == jnp.argmax(x, -1)).all()
