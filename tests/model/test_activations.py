"""Activations are told when asked for, and cost nothing when not."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.architecture import Architecture
from model.compute import Compute
from model.transformer import activations, forward, init

ARCH = Architecture(96, 32, 2, 8, 2, 4, 48, 64, tie_embeddings=True)


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_by_layer_over_what_is_not_padding(remat):
    params = init(ARCH, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, 96)
    at = jnp.broadcast_to(jnp.arange(8), (2, 8))
    segments = (at < 6).astype(jnp.int32)
    found = activations(ARCH, Compute(jnp.float32, "reference", remat), params, tokens, at, segments)
    assert sorted(found) == [f"{x}_{y}" for x in ("attention", "mlp", "residual") for y in ("max", "rms")]
    # the residual stream behind each layer is what a model of so many layers has before its last norm, of scale 1
    for layers in (1, 2):
        part = {**params, "layers": jax.tree.map(lambda x, n=layers: x[:n], params["layers"])}
        arch, compute = replace(ARCH, num_layers=layers), Compute(jnp.float32, "reference")
        same = activations(arch, compute, part, tokens, at, segments)
        assert same["residual_rms"].shape == (layers,)
        np.testing.assert_allclose(found["residual_rms"][:layers], same["residual_rms"], rtol=1e-5)
    # x = embedding + attention + mlp, so the parts bound the whole
    embedded = jnp.sqrt((params["embed"]["weight"][tokens[:, :6]] ** 2).mean())
    assert found["residual_rms"][0] <= embedded + found["attention_rms"][0] + found["mlp_rms"][0] + 1e-6
    shorter = activations(ARCH, Compute(jnp.float32, "reference"), params, tokens[:, :6], at[:, :6], segments[:, :6])
    for name, value in shorter.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_nothing_is_traced_unless_asked_for(remat, monkeypatch):
    params = jax.eval_shape(lambda key: init(ARCH, key), jax.random.key(0))
    zero = jnp.zeros((2, 8), jnp.int32)
    compute = Compute(jnp.float32, "reference", remat)

    def total(params):
        return forward(ARCH, compute, params, zero, zero, zero + 1).sum()

    traced = [str(jax.make_jaxpr(f)(params)) for f in (total, jax.grad(total))]
    monkeypatch.setattr("model.block.Block.is_mutable_collection", lambda *_: False)
    jax.clear_caches()
    assert [str(jax.make_jaxpr(f)(params)) for f in (total, jax.grad(total))] == traced
    assert " abs " not in traced[0]
