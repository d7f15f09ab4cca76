"""Weights, adapters and optimizer state lie where the rules say from their first byte; no device ever holds more."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from model import lora
from model.architecture import Architecture
from model.transformer import declare, init, nest
from model.tree import flatten, split
from sharding.mesh import make_mesh
from sharding.rules import DEFAULT, make_rules
from train.state import init_state, shardings_of

ARCH = Architecture(96, 32, 2, 4, 2, 8, 48, 64)
# of the default table on data=2, fsdp=2, tensor=2
EXPECTED = {
    "embed/weight": P("tensor", "fsdp"),
    "head/weight": P("fsdp", "tensor"),
    "layers/attn/k/weight": P(None, "fsdp", "tensor", None),
    "layers/attn/o/weight": P(None, "tensor", None, "fsdp"),
    "layers/attn/q/weight": P(None, "fsdp", "tensor", None),
    "layers/attn/v/weight": P(None, "fsdp", "tensor", None),
    "layers/attn_norm/scale": P(None, None),
    "layers/mlp/down/weight": P(None, "tensor", "fsdp"),
    "layers/mlp/gate/weight": P(None, "fsdp", "tensor"),
    "layers/mlp/up/weight": P(None, "fsdp", "tensor"),
    "layers/mlp_norm/scale": P(None, None),
    "norm/scale": P(None),
}


def born(mesh, rules=DEFAULT):
    where = lora.sharding_of(ARCH, mesh, rules)
    shardings = nest({path: where(path, declared.shape) for path, declared in declare(ARCH).items()})
    return jax.jit(lambda key: init(ARCH, key), out_shardings=shardings)(jax.random.key(0)), where


def zeros(declared, sharding):
    return jax.make_array_from_callback(declared.shape, sharding, np.zeros(declared.shape, np.float32).__getitem__)


def check(leaf, mesh, spec, where):
    assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim), (where, leaf.sharding.spec)
    assert len(leaf.sharding.device_set) == mesh.size, where
    assert {s.data.shape for s in leaf.addressable_shards} == {leaf.sharding.shard_shape(leaf.shape)}, where


@pytest.fixture(scope="module")
def placed():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        params, where = born(mesh)
        state = init_state(params, optax.adamw(1e-3), mesh)
    return mesh, params, where, state


def test_weights(placed):
    mesh, params, _, _ = placed
    flat = flatten(params)
    assert set(flat) == set(EXPECTED)
    for path, spec in EXPECTED.items():
        check(flat[path], mesh, spec, path)
        parts = np.prod([mesh.shape[axis] for axis in spec if axis])
        assert flat[path].addressable_shards[0].data.nbytes * parts == flat[path].nbytes, path


def test_optimizer_state_lies_where_the_weights_lie(placed):
    """jax.jit(tx.init) alone would leave it all on one device."""
    mesh, _, _, state = placed
    flat = flatten(state.opt)
    moments = [path for path in flat if path.endswith(tuple(EXPECTED))]
    assert len(moments) == 2 * len(EXPECTED)
    for path in moments:
        weight = next(w for w in EXPECTED if path.endswith("/" + w))
        check(flat[path], mesh, EXPECTED[weight], path)
    for path in set(flat) - set(moments):
        check(flat[path], mesh, P(), path)
    check(state.step, mesh, P(), "step")
    assert all(isinstance(s, NamedSharding) for s in jax.tree.leaves(shardings_of(state)))


def test_adapters_share_their_weights_axes(placed):
    mesh, params, where, _ = placed
    shapes = lora.adapter_shapes(declare(ARCH), lora.target_paths(list(declare(ARCH)), "all-linear"), 4)
    shardings = {
        p: tuple(where(f"{p}/{n}", d.shape) for n, d in zip("ab", ab, strict=True)) for p, ab in shapes.items()
    }
    adapter = {p: tuple(map(zeros, ab, shardings[p])) for p, ab in shapes.items()}
    trainable, frozen = split(lora.attach(params, adapter, 2.0), lambda path: path.endswith(("/a", "/b")))
    expected = {
        "layers/attn/q/weight": (P(None, "fsdp", None), P(None, None, "tensor", None)),
        "layers/attn/k/weight": (P(None, "fsdp", None), P(None, None, "tensor", None)),
        "layers/attn/v/weight": (P(None, "fsdp", None), P(None, None, "tensor", None)),
        "layers/attn/o/weight": (P(None, "tensor", None, None), P(None, None, "fsdp")),
        "layers/mlp/gate/weight": (P(None, "fsdp", None), P(None, None, "tensor")),
        "layers/mlp/up/weight": (P(None, "fsdp", None), P(None, None, "tensor")),
        "layers/mlp/down/weight": (P(None, "tensor", None), P(None, None, "fsdp")),
    }
    with jax.set_mesh(mesh):
        state = init_state(trainable, optax.adamw(1e-3), mesh)
    moments = flatten(state.opt)
    flat = flatten(trainable)
    assert set(flat) == {f"{p}/{n}" for p in expected for n in "ab"}
    for path, specs in expected.items():
        for name, spec in zip("ab", specs, strict=True):
            check(flat[f"{path}/{name}"], mesh, spec, path)
            found = [leaf for p, leaf in moments.items() if p.endswith(f"/{path}/{name}")]
            assert len(found) == 2
            for leaf in found:
                check(leaf, mesh, spec, path)
    assert flatten(frozen).keys() == {p + "/base" if p in expected else p for p in EXPECTED}


def test_moments_of_weights_of_one_shape_are_told_apart():
    """gate and down transposed have the same shape when d_ff = d_model: the path decides, not the shape."""
    mesh, rules = make_mesh({"fsdp": 4, "tensor": 2}), make_rules()
    square = Architecture(96, 32, 2, 4, 4, 8, 32, 64)
    where = lora.sharding_of(square, mesh, rules)
    params = nest({path: zeros(declared, where(path, declared.shape)) for path, declared in declare(square).items()})
    state = init_state(params, optax.adamw(1e-3), mesh)
    for path, leaf in flatten(state.opt).items():
        if path.endswith("mlp/gate/weight"):
            check(leaf, mesh, P(None, "fsdp", "tensor"), path)
        if path.endswith("mlp/down/weight"):
            check(leaf, mesh, P(None, "tensor", "fsdp"), path)
