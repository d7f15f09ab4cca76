"""KTO and its kin against the papers' formulas in NumPy: values, gradients, the baseline, extremes, metrics."""

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.losses.preference import LOSSES, combine
from train.losses.unpaired import Unpaired, apo_zero_unpaired, kto, kto_columns, reward_metrics

N = 12
GIVEN = {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def numbers(seed=0):
    rng = np.random.default_rng(seed)
    ref = -rng.uniform(1, 60, N)
    return ref + rng.normal(0, 4, N), ref, rng.integers(0, 2, N).astype(bool)


def sig(z):
    return 1 / (1 + np.exp(-z))


def oracle(logps, ref, desirable, z0, beta, desirable_weight=1.0, undesirable_weight=1.0):
    """lambda - v of equation 7: v = lambda_D sig(beta (r - z0)), or lambda_U sig(beta (z0 - r))."""
    good = desirable_weight - desirable_weight * sig(beta * (logps - ref - z0))
    return np.where(desirable, good, undesirable_weight - undesirable_weight * sig(beta * (z0 - (logps - ref))))


@pytest.mark.parametrize("constants", [{"beta": 0.1}, GIVEN])
@pytest.mark.parametrize(("name", "z0"), [("kto", 1.7), ("kto", 0.0), ("apo_zero_unpaired", 0.0)])
def test_values_and_gradients(name, z0, constants):
    logps, ref, desirable = numbers()

    def loss(logps):
        examples = Unpaired(logps, jnp.asarray(ref), jnp.asarray(desirable))
        return combine(examples, ((name, 2.0),), {**constants, "z0": jnp.full(N, z0)})

    losses, pull = jax.vjp(loss, jnp.asarray(logps))
    np.testing.assert_allclose(losses, 2 * oracle(logps, ref, desirable, z0, **constants), rtol=1e-12)
    want = 2 * oracle(logps + 1e-30j, ref, desirable, z0, **constants).imag / 1e-30
    np.testing.assert_allclose(pull(jnp.ones(N))[0], want, rtol=1e-12)
    assert (np.sign(want) == np.where(desirable, -1, 1)).all()


def test_at_zero_margin():
    """Half of each completion's weight, once the policy is the reference (then z0 is 0, too)."""
    _, ref, desirable = (jnp.asarray(x) for x in numbers())
    z0 = kto_columns(ref, ref, jnp.ones(N, bool))
    for name in ("kto", "apo_zero_unpaired"):
        found = combine(Unpaired(ref, ref, desirable), ((name, 1.0),), {**GIVEN, **z0})
        np.testing.assert_allclose(found / jnp.where(desirable, 1.3, 0.7), LOSSES[name].at_zero(GIVEN), rtol=1e-15)


def test_the_opposite_label_mirrors_the_score():
    logps, ref, desirable = (jnp.asarray(x) for x in numbers(1))
    z0 = jnp.full(N, 0.9)
    turned = Unpaired(2 * (ref + z0) - logps, ref, ~desirable)
    np.testing.assert_allclose(
        kto(turned, beta=0.2, z0=z0), kto(Unpaired(logps, ref, desirable), beta=0.2, z0=z0), rtol=1e-12
    )


@pytest.mark.parametrize("shift", [-3.0, 3.0])
def test_the_baseline_is_one_clipped_mean_of_the_real_ones(shift):
    logps, ref, _ = numbers(2)
    logps, mask = logps + shift, np.arange(N) % 4 > 0
    want = max(0.0, (logps - ref)[mask].mean())
    assert (want > 0) == (shift > 0)
    broken = np.where(mask, logps, np.nan).reshape(3, 4)
    found = kto_columns(jnp.asarray(broken), jnp.asarray(ref.reshape(3, 4)), jnp.asarray(mask.reshape(3, 4)))
    np.testing.assert_allclose(found["z0"], np.full((3, 4), want), rtol=1e-14)
    assert (kto_columns(jnp.asarray(logps), jnp.asarray(ref), jnp.zeros(N, bool))["z0"] == 0).all()


def test_the_baseline_has_no_gradient():
    logps, ref, desirable = (jnp.asarray(x) for x in numbers(3))

    def loss(mismatched):
        z0 = kto_columns(mismatched + 3, ref, jnp.ones(N, bool))["z0"]
        return kto(Unpaired(logps, ref, desirable), beta=0.1, z0=z0).sum()

    assert (jax.grad(loss)(logps) == 0).all()
    assert (jax.grad(lambda z0: kto(Unpaired(logps, ref, desirable), beta=0.1, z0=z0).sum())(logps) == 0).all()


LOGPS = st.floats(-1e6, 0, width=32) | st.sampled_from([0.0, -1e-8, -88.8])


@jax.jit
def in_float32(logps, ref, desirable):
    z0 = kto_columns(ref, logps, desirable)["z0"]
    loss = lambda x: kto(Unpaired(x, ref, desirable), beta=10.0, z0=z0)  # noqa: E731
    value, pull = jax.vjp(loss, logps)
    return value, pull(jnp.ones_like(value))[0]


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    hypothesis.extra.numpy.arrays(np.float32, (2, N), elements=LOGPS), hypothesis.extra.numpy.arrays(bool, N)
)
def test_extremes_are_finite_in_float32(logps, desirable):
    value, grad = in_float32(*logps, desirable)
    assert value.dtype == grad.dtype == jnp.float32
    assert np.isfinite(value).all()
    assert np.isfinite(grad).all()
    assert ((value >= 0) & (value <= 1)).all()


def test_bfloat16_is_computed_in_float32():
    logps, ref, desirable = (jnp.asarray(x) for x in numbers(4))
    narrow = Unpaired(logps.astype(jnp.bfloat16), ref.astype(jnp.bfloat16), desirable)
    found = apo_zero_unpaired(narrow, beta=0.1)
    assert found.dtype == jnp.float32
    exact = Unpaired(narrow.logps.astype(jnp.float64), narrow.ref_logps.astype(jnp.float64), desirable)
    np.testing.assert_allclose(found, apo_zero_unpaired(exact, beta=0.1), rtol=1e-6)


def test_metrics_count_real_completions_only():
    logps, ref, desirable = numbers(5)
    real = np.arange(N) % 3 > 0
    examples = Unpaired(jnp.asarray(np.where(real, logps, np.nan)), jnp.asarray(ref), jnp.asarray(desirable))
    found = reward_metrics(examples, jnp.asarray(real), beta=0.1)
    for side, label in (("chosen", True), ("rejected", False)):
        rows = real & (desirable == label)
        for name, values in (("rewards", 0.1 * (logps - ref)), ("logps", logps)):
            total, weight = found.pop(f"{name}/{side}")
            assert weight == rows.sum() > 0
            np.testing.assert_allclose(total, values[rows].sum(), rtol=1e-13)
    assert not found
