"""Meshes: the errors, the axis that takes the rest, the rule table, batches onto devices."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs.errors import UsageError
from sharding.mesh import AXES, make_mesh
from sharding.place import constrain, place_batch, placer, weight_sharding
from sharding.rules import DEFAULT, make_rules, spec


def test_absent_axes_are_one_and_one_axis_takes_the_rest():
    assert make_mesh({"data": 2, "fsdp": -1}).shape == {**dict.fromkeys(AXES, 1), "data": 2, "fsdp": 4}
    assert make_mesh({}, jax.devices()[:1]).size == 1
    assert make_mesh({"tensor": -1}).shape["tensor"] == 8


def test_tensor_neighbours_are_neighbouring_devices():
    """The innermost axis has the fastest network: its devices lie side by side."""
    ids = np.vectorize(lambda d: d.id)(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}).devices).reshape(2, 2, 2)
    assert ids.tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensors": 8}, "mesh.tensors: unknown axis; axes: data, stage, fsdp, context, expert, tensor"),
        ({"data": -1, "fsdp": -1}, "mesh: only one axis may be -1, not data and fsdp"),
        ({"data": 3, "fsdp": -1}, "mesh: data=3, fsdp=-1 needs a multiple of 3 devices, there are 8"),
        ({"data": 3}, "mesh: data=3 needs 3 devices, there are 8 (-1 on one axis takes the rest)"),
        ({"data": 16}, "mesh: data=16 needs 16 devices, there are 8"),
        ({"data": 0}, "mesh: sizes are at least 1"),
        ({"data": -2, "fsdp": 4}, "mesh: sizes are at least 1"),
        ({}, "mesh: all axes 1 needs 1 device, there are 8"),
        ({"data": 4}, "mesh: data=4 needs 4 devices, there are 8"),
    ],
)
def test_wrong_meshes_are_refused(sizes, message):
    with pytest.raises(UsageError) as raised:
        make_mesh(sizes)
    assert message in str(raised.value)


def test_rules():
    rules = make_rules()
    assert spec(rules, ("layers", "embed", "heads", "head_dim")) == P("stage", ("fsdp", "expert"), "tensor", None)
    assert spec(rules, ("expert", "expert_embed", "mlp")) == P("expert", "fsdp", "tensor")
    rows = ("data", "stage", "fsdp", "expert")
    assert spec(rules, ("batch", "seq")) == P(rows, "context")
    assert spec(rules, ("batch", "stream", "width")) == P(rows, ("context", "tensor"), None)
    assert spec(make_rules("replicated"), ("embed", "mlp")) == P(None, "tensor")
    changed = make_rules("fsdp", {"mlp": ["fsdp", "tensor"], "embed": None, "vocab": "fsdp"})
    assert spec(changed, ("embed", "mlp")) == P(None, ("fsdp", "tensor"))
    assert spec(changed, ("vocab", "embed")) == P("fsdp", None)
    assert hash(changed) == hash(make_rules("fsdp", {"mlp": ("fsdp", "tensor"), "embed": (), "vocab": ("fsdp",)}))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: make_rules("zero3"), "mesh.preset: 'zero3' is unknown; presets: fsdp, replicated"),
        (lambda: make_rules(overrides={"width?": "data"}), "mesh.rules.width?: unknown logical axis; known: batch"),
        (lambda: spec(DEFAULT, ("embed", "colour")), "unknown logical axis 'colour'; known: batch"),
        (
            lambda: spec(make_rules(overrides={"mlp": "fsdp"}), ("layers", "embed", "mlp"), "layers/mlp/up/weight"),
            "layers/mlp/up/weight: 'embed' and 'mlp' both want mesh axis 'fsdp' (mesh.rules)",
        ),
    ],
)
def test_wrong_rules_are_refused(act, message):
    with pytest.raises(UsageError) as raised:
        act()
    assert message in str(raised.value)


def test_a_dimension_that_does_not_divide_names_weight_and_axis():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    axes = ("layers", "embed", "kv_heads", "head_dim")
    assert weight_sharding(mesh, DEFAULT, axes, (2, 32, 2, 8), "w").spec == P(
        "stage", ("fsdp", "expert"), "tensor", None
    )
    with pytest.raises(UsageError) as raised:
        weight_sharding(mesh, DEFAULT, axes, (2, 32, 3, 8), "layers/attn/k/weight")
    assert str(raised.value) == (
        "layers/attn/k/weight: dimension 'kv_heads' of 3 does not divide over mesh axis tensor=2; "
        "divisors: 1, 3; change the mesh, or mesh.rules.kv_heads: null"
    )
    both = make_rules(overrides={"embed": ("fsdp", "tensor"), "kv_heads": None})
    with pytest.raises(UsageError, match="'embed' of 12 does not divide over mesh axis fsdp=4 x tensor=2"):
        weight_sharding(mesh, both, axes, (2, 12, 3, 8), "w")


def test_a_batch_is_split_over_the_devices():
    mesh = make_mesh({"data": 2, "fsdp": 2, "context": 2})
    batch = {"tokens": np.arange(8 * 6, dtype=np.int32).reshape(8, 6), "scores": np.arange(8, dtype=np.float32)}
    placed = place_batch(batch, mesh, DEFAULT)
    assert placed["tokens"].sharding == NamedSharding(mesh, P(DEFAULT.axes("batch"), "context"))
    assert placed["scores"].sharding == NamedSharding(mesh, P(DEFAULT.axes("batch")))
    assert {s.data.shape for s in placed["tokens"].addressable_shards} == {(2, 3)}
    assert {s.data.shape for s in placed["scores"].addressable_shards} == {(2,)}
    for name, column in batch.items():
        np.testing.assert_array_equal(placed[name], column)
        for shard in placed[name].addressable_shards:
            np.testing.assert_array_equal(shard.data, column[shard.index])


def test_a_weight_is_read_in_the_parts_that_devices_need():
    mesh, asked = make_mesh({"fsdp": 4, "data": 2}), []
    whole = np.arange(32, dtype=np.float32).reshape(8, 4)

    def read(index):
        asked.append(index)
        return whole[index]

    place = placer(lambda path, shape: weight_sharding(mesh, DEFAULT, ("embed", "head_dim"), shape, path))
    placed = place("w", (8, 4), np.float32, read)
    assert all(whole[index].shape == (2, 4) for index in asked)
    np.testing.assert_array_equal(placed, whole)


def test_constrain_without_a_mesh_is_the_identity():
    x = jax.device_put(np.ones((2, 3), np.float32))
    assert constrain(x, DEFAULT, "batch", "width") is x
    with jax.set_mesh(make_mesh({"data": 2, "tensor": 4})):
        split = jax.jit(lambda x: constrain(x, DEFAULT, "batch", "width"))(x)
    assert {s.data.shape for s in split.addressable_shards} == {(1, 3)}
