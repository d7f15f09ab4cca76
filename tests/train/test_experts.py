"""Training with experts: over a mesh as on one device, in micro-batches as at once, and what the knobs refuse."""

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from configs.errors import UsageError
from configs.objective import Objective
from configs.sample import Sample
from model.architecture import Architecture, Experts
from model.compute import Compute
from model.transformer import init
from model.tree import flatten
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
