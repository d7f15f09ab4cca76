"""Attention by blocks: any lengths of blocks are the formula, memory is linear, what is forbidden is left out."""

from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from model import blockwise
from model.architecture import Architecture
from model.attention import attend
from model.compute import Compute
from model.context import attend_over
from model.mask import self_attention
from model.transformer import forward, init
from sharding.mesh import make_mesh
from train.planner.program import Program


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(
    st.integers(1, 40), st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(0, 24), st.integers(1, 5000)),
    st.booleans(), st.sampled_from([None, 1, 5]), st.sampled_from([None, 1.5]), st.booleans(), st.integers(0, 10),
)  # fmt: skip
def test_any_blocks_are_the_formula(T, sizes, branches, window, softcap, sinks, seed):
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(0, 4, (2, T)), axis=1)[:, ::-1].astype(np.int32)
    with jax.enable_x64(), patch.multiple(blockwise, BLOCKS={"cpu": sizes[:2]}, WHOLE=sizes[2], MOST=sizes[3]):
        q, k, v = (jnp.asarray(rng.normal(size=(2, T, n, width))) for n, width in ((4, 6), (2, 6), (2, 5)))
        apart = jnp.asarray(rng.integers(0, 3, (2, T))) if branches else None
        mask = self_attention(jnp.broadcast_to(jnp.arange(T), (2, T)), jnp.asarray(segments), window, apart)
        more, real = (jnp.asarray(rng.normal(size=4)) if sinks else None), jnp.asarray(segments > 0)[..., None, None]

        def total(q, k, v, more, backend):
            out = attend(q, k, v, mask, backend, softcap, more)
            return (jnp.where(real, out, 0) * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum()

        args = (0, 1, 2, 3) if sinks else (0, 1, 2)
        want, ours = (jax.value_and_grad(total, args)(q, k, v, more, name) for name in ("reference", "chunked"))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("context", [1, 2])
def test_memory_is_linear_in_the_length(context):
    """Through a scan over layers, whose masks are alike: they are made block by block in each."""
    arch = Architecture(16, 16, 2, 4, 2, 4, 16, 4096)
    params = init(arch, jax.random.key(0))
    loss = lambda p, *rows: forward(arch, Compute(attention="auto", remat="full"), p, *rows).sum()  # noqa: E731
    used = {}
    with jax.set_mesh(make_mesh({"context": context}, jax.devices()[:context])):
        for length in (2048, 4096):
            rows = (jnp.zeros((1, length), jnp.int32),) * 3
            made = jax.jit(jax.grad(loss)).lower(params, *rows).compile().memory_analysis()
            used[length] = made.temp_size_in_bytes  # type: ignore[union-attr]
    assert used[4096] < 2.2 * used[2048]


def test_what_nobody_may_see_is_left_out():
    """No number is made of it: it may be none."""
    T = 512
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, T, 2, 4)), jnp.float32) for _ in range(3))
    k, v = (x.at[:, T // 2 :].set(jnp.nan) for x in (k, v))
    mask = self_attention(jnp.arange(T)[None], jnp.ones((1, T), jnp.int32))
    out, back = jax.vjp(lambda q: attend(q, k, v, mask, "chunked")[:, : T // 2], q)
    assert np.isfinite(out).all()
    assert np.isfinite(back(jnp.ones_like(out))[0][:, : T // 2]).all()


@pytest.mark.parametrize("shape", [{"fsdp": 4, "tensor": 2}, {"data": 2, "stage": 2, "fsdp": 2}])
def test_devices_look_through_their_own_rows_and_heads(shape):
    """No device waits for others to know what may be seen, and nothing is passed on."""
    T = 512
    mesh = make_mesh(shape)
    q, k, v = (jax.ShapeDtypeStruct((8, T, n, 4), jnp.float32) for n in (4, 2, 2))
    ids = jax.ShapeDtypeStruct((8, T), jnp.int32)

    def gradients(q, k, v, positions, segments, g):
        mask = self_attention(positions, segments)
        return jax.vjp(lambda q, k, v: attend_over(q, k, v, mask, Compute()), q, k, v)[1](g)

    rows = ("data", "stage", "fsdp", "expert")
    heads, columns = (NamedSharding(mesh, spec) for spec in (P(rows, None, "tensor"), P(rows)))
    with jax.set_mesh(mesh):
        where = (heads, heads, heads, columns, columns, heads)
        made = jax.jit(gradients, in_shardings=where, out_shardings=where[:3])
        text = str(made.lower(q, k, v, ids, ids, q).compile().as_text())
    assert " conditional(" in text
    assert not [one for one in Program(text).collectives if one.moved]
