"""Tree surgery: attach is the identity, merged = attached, unmerge undoes merge, frozen weights get no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.errors import UsageError
from model import lora
from model.architecture import Architecture
from model.compute import Compute
from model.transformer import declare, forward, init
from model.tree import count, diff, flatten, join, select, split, unflatten
from model.weights import Lora, contract, materialise

ARCH = Architecture(97, 32, 3, 4, 2, 8, 48, 64, attention_bias=True)
PATHS = list(declare(ARCH))


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: init(ARCH, key))(jax.random.key(0))


def adapter(target_modules="all-linear", r=4, trained=True):
    shapes = lora.adapter_shapes(declare(ARCH), lora.target_paths(PATHS, target_modules), r)
    made = lora.init_adapter(shapes, jax.random.key(1))
    if trained:
        made = {p: (a, 0.3 * jax.random.normal(jax.random.key(2), b.shape)) for p, (a, b) in made.items()}
    return made


@jax.jit
def run(params):
    tokens = jnp.arange(24).reshape(2, 12)
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    return forward(ARCH, Compute(attention="reference"), params, tokens, positions, jnp.ones((2, 12), jnp.int32))


def test_attach_is_the_identity_at_init(params):
    np.testing.assert_array_equal(run(lora.attach(params, adapter(trained=False), 2.0)), run(params))


@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj", "v_proj"], ["layers/mlp/*"], "o_proj"])
def test_merged_equals_attached_and_unmerge_undoes_it(params, target_modules):
    attached = lora.attach(params, adapter(target_modules), 0.5)
    merged = lora.merge(attached)
    assert float(jnp.abs(run(attached) - run(params)).max()) > 1e-3
    np.testing.assert_allclose(run(merged), run(attached), atol=2e-5)
    back = lora.unmerge(merged, attached)
    assert jax.tree.structure(back) == jax.tree.structure(attached)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), back, attached)
    jax.tree.map(np.testing.assert_array_equal, lora.detach(attached), params)


def test_adapters_nest(params):
    """A second adapter over the first: the same node, so merge and contract need no new code."""
    once = lora.attach(params, adapter(), 0.5)
    path = "layers/mlp/up/weight"
    a, b = adapter()[path]
    node = once["layers"]["mlp"]["up"]["weight"]
    x = jax.random.normal(jax.random.key(3), (2, 5, 32))
    twice = Lora(node, a, b, 0.25)
    first = jax.tree.map(lambda leaf: leaf[0], twice)
    np.testing.assert_allclose(
        contract("BTD,DF->BTF", x, first), contract("BTD,DF->BTF", x, materialise(twice)[0]), atol=1e-5
    )


def test_only_adapters_are_trained(params):
    trainable, frozen = split(lora.attach(params, adapter(), 2.0), lambda p: p.endswith(("/a", "/b")))
    assert count(trainable) + count(frozen) == count(lora.attach(params, adapter(), 2.0))
    grads = jax.jit(jax.grad(lambda t: (run(join(t, frozen)) ** 2).sum()))(trainable)
    assert set(flatten(grads)) == {f"{p}/{n}" for p in adapter() for n in "ab"}
    jax.tree.map(np.testing.assert_array_equal, join(trainable, frozen), lora.attach(params, adapter(), 2.0))


def test_scale():
    assert lora.scale_of(16, 32.0, False) == 2.0
    assert lora.scale_of(16, 32.0, True) == 8.0


def test_unknown_targets_are_named():
    with pytest.raises(UsageError, match=r"tune.target_modules: 'wq' is unknown; known: all-linear, q_proj"):
        lora.target_paths(PATHS, ["wq"])
    with pytest.raises(UsageError, match=r"pattern 'layers/moe/\*' matches no weight"):
        lora.target_paths(PATHS, ["layers/moe/*"])
    with pytest.raises(ValueError, match="weights that the model lacks: nowhere"):
        lora.attach({"q": jnp.ones(3)}, {"nowhere": (1, 2)}, 1.0)


def test_tree_paths(params):
    flat = flatten(params)
    jax.tree.map(np.testing.assert_array_equal, unflatten(flat, params), params)
    assert select(flat, ["*norm*", "embed/*"], "key") == {p for p in flat if "norm" in p or p.startswith("embed/")}
    other = {**flat, "embed/weight": jnp.zeros((3, 3), jnp.bfloat16)}
    other["new"] = other.pop("norm/scale")
    assert diff(flat, other) == [
        "only in saved: norm/scale (32,)",
        "only in expected: new (32,)",
        "embed/weight: (97, 32) float32 in saved, (3, 3) bfloat16 in expected",
    ]
