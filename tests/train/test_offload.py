"""Memory of the host: optimizer state and block inputs that wait there change nothing; the dtype of gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.errors import UsageError
from model.compute import Compute
from model.product import narrow_gradients, product
from model.transformer import forward, init
from sharding.place import HOST, check_host_memory
from tests.train.test_step import ARCH
from train.loop import train
from train.setup import make_job, prepare


def rows(folder):
    import json

    kept = ("step", "loss", "grad_norm", "skipped")
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in kept if key in row} for row in found]


@pytest.mark.slow
def test_a_run_with_its_optimizer_on_the_host(make_run):
    """The same losses as without, on a mesh, with a guard and an average of weights; saved, resumed, exported."""
    common = (
        "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "train.steps=6", "train.on_bad_step=skip", "checkpoint.every=4",
        "optim.ema_decay=0.9", "train.batch_size=8", "train.microbatches=2", "log.preflight=true",
    )  # fmt: skip
    plain = rows(train(make_run(*common, output="plain")))
    given = make_run(*common, "optim.offload=true", "model.remat=offload", output="offload")
    folder = train(given)
    for mine, theirs in zip(rows(folder), plain, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)
    import shutil

    shutil.rmtree(folder / "checkpoints" / "6")
    assert rows(train(given)) == rows(folder)


def test_the_state_waits_on_the_host(make_run):
    run = make_run("optim.offload=true", "mesh.fsdp=1", "mesh.data=8", "train.batch_size=8")
    source, mesh, rules, compute = prepare(run)
    with jax.set_mesh(mesh):
        job, state = make_job(run, source, mesh, rules, compute, 4)
    kinds = {leaf.ndim > 0: leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt)}
    assert kinds == {True: HOST, False: "device"}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves((state.params, job.averaged(state).params))} == {
        "device"
    }


def test_a_device_without_memory_of_its_host_is_refused():
    class Memory:
        kind = "device"

    class Device:
        device_kind = "toy"

        def addressable_memories(self):
            return [Memory()]

    with pytest.raises(UsageError, match=r"optim\.offload: toy has no pinned_host memory; it has device"):
        check_host_memory(Device(), "optim.offload")


def test_block_inputs_on_the_host_give_the_same_gradient():
    params = init(ARCH, jax.random.key(0))
    tokens = jnp.arange(24).reshape(2, 12) % 96
    rest = jnp.broadcast_to(jnp.arange(12), (2, 12)), jnp.ones((2, 12), jnp.int32)

    def gradient(remat):
        loss = lambda p: (forward(ARCH, Compute(remat=remat), p, tokens, *rest) ** 2).sum()  # noqa: E731
        return jax.jit(jax.grad(loss))(params), str(jax.make_jaxpr(jax.grad(loss))(params))

    (plain, _), (moved, text) = gradient("full"), gradient("offload")
    assert "f32<host>[2,2,12,32]" in text  # what the scan over two layers keeps
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_gradients_of_wide_weights_are_wide_unless_told():
    x, w = jax.random.normal(jax.random.key(0), (64, 8), jnp.bfloat16), jnp.ones((8, 4)) / 3

    def gradient(narrow):
        with narrow_gradients(narrow):
            return jax.grad(lambda w: product("BD,DF->BF", x, w).astype(jnp.float32).sum())(w)

    exact = np.asarray(x, np.float64).sum(0)[:, None].repeat(4, 1)
    np.testing.assert_allclose(gradient(False), exact, rtol=1e-5, atol=1e-5)
    rounded = np.asarray(gradient(True))
    assert rounded.dtype == np.float32
    np.testing.assert_array_equal(rounded, rounded.astype(jnp.bfloat16).astype(np.float32))
    assert np.abs(rounded - exact).max() > 1e-4
