"""Training with experts: over a mesh as on one device, in micro-batches as at once, and what the knobs refuse."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.errors import UsageError
from configs.objective import Objective
from configs.sample import Sample
from model import lora
from model.architecture import Architecture, Experts
from model.compute import Compute
from model.transformer import init, nest
from model.tree import flatten
from sharding.mesh import make_mesh
from sharding.place import place_batch
from sharding.rules import make_rules
from train.losses.lm import lm_loss
from train.recipes import make_recipe

ARCH = Architecture(
    vocab_size=32, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=24, max_position=32,
    experts=Experts(4, 2, 8, shared_d_ff=8, shared_gate=True, aux_loss_coef=0.2),
)  # fmt: skip


def batch(rows=4, T=8):
    rng = np.random.default_rng(0)
    segments = (np.arange(T)[None] < rng.integers(4, T + 1, (rows, 1))).astype(np.int32)
    tokens = rng.integers(0, 32, (rows, T)).astype(np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (rows, T)).copy()
    weights = segments.astype(np.float32)
    return {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "positions": positions, "segments": segments,
            "weights": weights}  # fmt: skip


def weights():
    shapes = flatten(jax.eval_shape(partial(init, ARCH), jax.random.key(0)))
    rng = np.random.default_rng(1)
    return {path: rng.normal(float("norm" in path), 0.2, x.shape).astype(np.float32) for path, x in shapes.items()}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["blocks", "ragged"])
def test_a_mesh_with_experts_apart_is_one_device(backend):
    rules, made = make_rules(), []
    for shape in ({}, {"fsdp": 2, "expert": 2, "tensor": 2}):
        mesh = make_mesh(shape, jax.devices()[: 8 if shape else 1])
        where = lora.sharding_of(ARCH, mesh, rules)
        flat = {path: jax.device_put(x, where(path, x.shape)) for path, x in weights().items()}
        if shape:
            gate = flat["layers/mlp/experts/gate/weight"]
            assert gate.sharding.shard_shape(gate.shape) == (2, 2, 8, 4)
        compute = Compute(jnp.float32, "reference", "full", rules=rules, experts=backend)
        with jax.set_mesh(mesh):
            rows = place_batch(batch(), mesh, rules)
            loss = partial(
                lm_loss, norms={"tokens": rows["weights"].sum()}, arch=ARCH, compute=compute, router=(0.3, 0.1)
            )
            (total, sums), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(nest(flat), rows)
        made.append((float(total), {k: float(v[0]) for k, v in sums.items()}, jax.tree.map(np.asarray, flatten(grads))))
    (one, told, grads), (other, told_too, found) = made
    assert one == pytest.approx(other, rel=1e-5)
    assert told == pytest.approx(told_too, rel=1e-5)
    for path, g in grads.items():
        assert np.linalg.norm(g - found[path]) < 1e-5 * np.linalg.norm(g), path


def test_the_weight_of_the_load_balance_loss():
    def recipe(**knobs):
        loss: Any = make_recipe(Objective(**knobs), ARCH, Compute(), Sample()).loss
        return loss.keywords["router"]

    assert recipe() == (0.2, 0.0)  # as config.json has it
    assert recipe(router_aux_loss_coef=0.0, router_z_loss_coef=1e-3) == (0.0, 1e-3)
    dense = Architecture(32, 16, 2, 4, 2, 4, 24, 32)
    with pytest.raises(UsageError, match=r"router_aux_loss_coef 0\.1.*no experts"):
        make_recipe(Objective(router_aux_loss_coef=0.1), dense, Compute(), Sample())
    with pytest.raises(ValueError, match=r"objective\.type is dpo: router_aux_loss_coef"):
        Objective(type="dpo", router_z_loss_coef=0.1)
