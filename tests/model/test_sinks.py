"""Attention sinks, one more key of each head with a score of its own and no value: every backend, and the cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import blockwise
from model.attention import attend
from model.mask import self_attention

T, N, K, H = 7, 4, 2, 8


def by_the_formula(q, k, v, sinks):
    """Causal attention of one row, head by head, in NumPy."""
    out = np.zeros((T, N, H))
    for n, t in np.ndindex(N, T):
        scores = np.append(k[: t + 1, n // (N // K)] @ q[t, n] / H**0.5, sinks[n])
        odds = np.exp(scores - scores.max())
        out[t, n] = (odds[:-1] / odds.sum()) @ v[: t + 1, n // (N // K)]
    return out


@pytest.mark.parametrize(("backend", "whole"), [("reference", 256), ("chunked", 256), ("chunked", 0)])
def test_backends(backend, whole, monkeypatch):
    monkeypatch.setattr(blockwise, "WHOLE", whole)
    monkeypatch.setattr(blockwise, "BLOCKS", {"cpu": (256, 3)})
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, T, n, H)) for n in (N, K, K))
    sinks, g = rng.normal(size=N), rng.normal(size=(1, T, N, H))
    with jax.enable_x64():
        mask = self_attention(jnp.arange(T)[None], jnp.ones((1, T), jnp.int32))
        value = lambda q, k, v, s: (attend(q, k, v, mask, backend, sinks=s) * g).sum()  # noqa: E731
        made = attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), mask, backend, sinks=jnp.asarray(sinks))
        grads = jax.jit(jax.grad(value, (0, 1, 2, 3)))(*map(jnp.asarray, (q, k, v, sinks)))
        np.testing.assert_allclose(made[0], by_the_formula(q[0], k[0], v[0], sinks), rtol=1e-11, atol=1e-12)
    for at in range(N):  # by differences
        step = 1e-6 * np.eye(N)[at]
        up, down = (by_the_formula(q[0], k[0], v[0], sinks + s) for s in (step, -step))
        assert float(grads[3][at]) == pytest.approx(((up - down) * g[0]).sum() / 2e-6, rel=1e-6)
    if backend != "reference":
        with jax.enable_x64():
            plain = lambda q, k, v, s: (attend(q, k, v, mask, "reference", sinks=s) * g).sum()  # noqa: E731
            want = jax.grad(plain, (0, 1, 2, 3))
            for ours, theirs in zip(grads, want(*map(jnp.asarray, (q, k, v, sinks))), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_xla_has_none():
    x = jnp.zeros((1, 2, 2, 4))
    mask = self_attention(jnp.arange(2)[None], jnp.ones((1, 2), jnp.int32))
    with pytest.raises(ValueError, match="'xla' has no soft cap of scores, no sinks"):
        attend(x, x, x, mask, "xla", sinks=jnp.zeros(2))
