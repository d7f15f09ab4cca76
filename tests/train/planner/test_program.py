"""The reader of HLO: groups in every form, loops, asynchronous and chained collectives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sharding.mesh import make_mesh
from train.planner.program import Collective, Program, group_of, groups_of

SHAPE = {"data": 2, "fsdp": 4}


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, dims", [(0, 1), (2, 3)]),
        ("replica_groups=[2,4]<=[8], dims", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dims", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dims", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'data'}, dims", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, dims", [(0, 2), (1, 3), (4, 6), (5, 7)]),
        ("replica_groups=mesh['a'=8] {'a':(4)2}, dims", [(0, 1), (2, 3), (4, 5), (6, 7)]),
    ],
)
def test_groups(text, groups):
    assert list(groups_of(text)) == groups


def test_a_permutation_joins_a_ring():
    assert group_of("source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,4}}, x", "collective-permute") == (
        0,
        1,
        2,
        3,
    )


def test_axes_and_bytes():
    one = Collective("all-reduce", 800, 3, (0, 1, 2, 3), "x")
    assert one.axes(SHAPE) == ("fsdp",)
    assert one.moved == 800 * 2 * 3 / 4 * 3
    assert Collective("all-gather", 800, 1, tuple(range(8)), "x").axes(SHAPE) == ("data", "fsdp")
    assert Collective("all-gather", 800, 1, (1, 5), "x").axes(SHAPE) == ("data",)


TEXT = """HloModule step, is_scheduled=true

%cond (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]{0}) parameter(0)
  %bound = s32[]{:T(128)} constant(5)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%inside (q: f32[8]) -> f32[16] {
  %q = f32[8]{0} parameter(0)
  ROOT %ag = f32[16]{0:T(128)} all-gather(%q), channel_id=1, replica_groups=[4,2]<=[8], dimensions={0}
}

%body (b: (s32[], f32[8])) -> (s32[], f32[8]) {
  %b = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%b), index=1
  %f = f32[16]{0} fusion(%x), kind=kCustom, calls=%inside
  %s = bf16[4]{0} reduce-scatter(%f), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum
  ROOT %t = (s32[], f32[8]{0}) tuple(%b, %x)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %w = (s32[], f32[8]{0}) while(%a), condition=%cond, body=%body
  %known = (s32[], f32[8]{0}) while(%a), condition=%unknown, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %c1 = f32[8]{0} all-gather(%a), channel_id=9, replica_groups=[4,2]<=[8], frontend_attributes={chain_id="0"}
  %c2 = f32[8]{0} all-gather(%a), channel_id=9, replica_groups=[4,2]<=[8], frontend_attributes={chain_id="0"}
  %ps = (bf16[4]{0}, bf16[4]{0}, u32[]) collective-permute-start(%a), source_target_pairs={{0,1},{1,0}}
  %ars = (f32[8]{0}, f32[2]{0}) all-reduce-start(%a, %a), channel_id=3, replica_groups=[1,8]<=[8], to_apply=%sum
  ROOT %r = f32[8]{0} get-tuple-element(%w), index=1
}
"""


def test_loops_count_as_often_as_they_go_round():
    found = {one.name: one for one in Program(TEXT).collectives}
    assert (found["ag"].times, found["ag"].size) == (12, 64)
    assert (found["s"].times, found["s"].size) == (12, 4 * 2 * 8)  # what goes in
    assert found["ps"].size == 8
    assert found["ars"].size == 40
    assert len([name for name in found if name in ("c1", "c2")]) == 1  # pieces of one


def test_against_a_program_that_is_known():
    """Eight layers of a product whose weights are split: a gather of each a step, as many bytes as they have."""
    mesh = make_mesh({"data": 2, "fsdp": 4})
    put = lambda shape, *axes: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*axes)))  # noqa: E731

    def step(w, x):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, P())
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), P(("data", "fsdp"))), None

        return jax.lax.scan(layer, x, w)[0]

    with jax.set_mesh(mesh):
        made = jax.jit(step).lower(put((8, 64, 64), None, "fsdp"), put((16, 64), ("data", "fsdp"))).compile()
    found = Program(made.as_text()).collectives
    assert {one.kind for one in found} == {"all-gather"}
    shape = dict(mesh.shape)
    assert {one.axes(shape) for one in found} == {("fsdp",)}
    assert sum(one.moved for one in found) == pytest.approx(8 * 64 * 64 * 4 * 3 / 4)
    assert np.prod([one.times for one in found]) in (1, 8)  # gathered in the loop, or before it
