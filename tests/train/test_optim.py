"""Schedules as in transformers, decay only where it is asked for, moments wide enough."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.errors import UsageError
from configs.schema import Optim
from model.architecture import Architecture
from model.transformer import declare, nest
from model.tree import flatten
from train.optim import make_optimizer, make_schedule

ARCH = Architecture(16, 8, 2, 2, 1, 4, 8, 64, attention_bias=True, qk_norm=True)
LINEAR = {"schedule": "linear", "learning_rate": 1.0}


@pytest.mark.parametrize(
    ("optim", "steps", "values"),
    [
        # updates done -> rate; the update after the last (steps) would have the final one
        ({"schedule": "constant", "learning_rate": 0.5}, 10, {0: 0.5, 9: 0.5, 10: 0.5}),
        (LINEAR, 10, {0: 1.0, 5: 0.5, 9: 0.1, 10: 0.0}),
        ({**LINEAR, "final_ratio": 0.2}, 10, {0: 1.0, 5: 0.6, 10: 0.2}),
        ({**LINEAR, "warmup_steps": 4}, 12, {0: 0.0, 1: 0.25, 4: 1.0, 8: 0.5, 11: 0.125, 12: 0.0}),
        ({**LINEAR, "warmup_ratio": 0.25}, 10, {0: 0.0, 1: 1 / 3, 3: 1.0, 10: 0.0}),  # ceil(2.5)
        ({**LINEAR, "warmup_ratio": 1.0}, 4, {0: 0.0, 3: 0.75}),
        ({**LINEAR, "warmup_steps": 20}, 4, {0: 0.0, 3: 0.15}),  # longer than the run
        ({**LINEAR, "schedule": "cosine"}, 8, {0: 1.0, 2: 0.5 + 0.5 * 2**-0.5, 4: 0.5, 8: 0.0}),
        (
            {**LINEAR, "schedule": "cosine", "warmup_steps": 2, "final_ratio": 0.1},
            10,
            {1: 0.5, 2: 1.0, 6: 0.55, 10: 0.1},
        ),
        ({**LINEAR, "schedule": "constant", "warmup_steps": 2}, 10, {0: 0.0, 1: 0.5, 2: 1.0, 10: 1.0}),
        (LINEAR, 1, {0: 1.0}),
    ],
)
def test_schedules(optim, steps, values):
    schedule = make_schedule(Optim(**optim), steps)
    for step, rate in values.items():
        assert float(schedule(step)) == pytest.approx(rate, abs=1e-6), step


def tree(dtype=np.float32, value=1.0):
    return nest({path: jnp.asarray(np.full(d.shape, value), dtype) for path, d in declare(ARCH).items()})


@pytest.mark.parametrize(
    ("patterns", "decays"),
    [
        (None, lambda path: "weight" in path),  # the default: no norm, no bias
        (("*",), lambda path: True),
        (("layers/mlp/*", "*bias"), lambda path: "mlp/" in path or "bias" in path),
    ],
)
def test_decay_only_where_it_is_asked_for(patterns, decays):
    optim = Optim(weight_decay=0.5, learning_rate=0.1, schedule="constant")
    optim = optim if patterns is None else optim.model_copy(update={"decay_patterns": patterns})
    params = tree()
    tx = make_optimizer(optim, 10, params)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(lambda p: tx.update(zero, tx.init(p), p))(params)
    for path, update in flatten(updates).items():
        np.testing.assert_allclose(update, -0.05 if decays(path) else 0.0, rtol=1e-6, err_msg=path)


def test_a_pattern_without_a_weight_is_an_error():
    with pytest.raises(UsageError, match=r"optim.decay_patterns: pattern '\*kernel\*' matches no weight"):
        make_optimizer(Optim(weight_decay=0.1, decay_patterns=("*kernel*",)), 10, tree())
    make_optimizer(Optim(decay_patterns=("*kernel*",)), 10, tree())  # nothing decays, so nothing is looked for


@pytest.mark.parametrize("params", ["float32", "bfloat16"])
@pytest.mark.parametrize("first", ["float32", "bfloat16"])
def test_moments_are_float32_unless_the_first_is_wanted_smaller(params, first):
    weights = tree(jnp.dtype(params))
    tx = make_optimizer(Optim(state_dtype=first), 10, weights)
    state = jax.eval_shape(tx.init, weights)
    kinds = {"mu": set(), "nu": set()}
    for path, leaf in flatten(state).items():
        for name in kinds:
            if f"{name}/" in path:
                kinds[name].add(str(leaf.dtype))
    assert kinds == {"mu": {first}, "nu": {"float32"}}
    updates, after = jax.eval_shape(tx.update, weights, state, weights)
    assert {str(x.dtype) for x in jax.tree.leaves(updates)} == {"float32"}
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)


def test_adamw_by_hand():
    """Two updates of one number against the formulas of arXiv 1711.05101."""
    optim = Optim(learning_rate=0.1, schedule="constant", weight_decay=0.01, b1=0.8, b2=0.9, eps=1e-3)
    params = {"weight": jnp.array([2.0])}
    tx = make_optimizer(optim, 10, params)
    state, w, m, v = tx.init(params), 2.0, 0.0, 0.0
    for t, g in enumerate((0.5, -0.25), 1):
        updates, state = tx.update({"weight": jnp.array([g])}, state, {"weight": jnp.array([w])})
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        step = -0.1 * (m / (1 - 0.8**t) / ((v / (1 - 0.9**t)) ** 0.5 + 1e-3) + 0.01 * w)
        assert float(updates["weight"][0]) == pytest.approx(step, rel=1e-5)
        w += step
