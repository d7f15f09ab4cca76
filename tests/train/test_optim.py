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
from train.optim import averaged, make_optimizer, make_schedule

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


@pytest.mark.parametrize(
    ("shape", "rates"),
    [
        ("linear", {0: 0.0, 2: 1.0, 14: 1.0, 15: 1.0, 18: 0.1 + 0.9 * 0.4, 20: 0.1}),
        ("sqrt", {15: 1.0, 18: 0.1 + 0.9 * (1 - 0.6**0.5), 20: 0.1}),
        ("cosine", {15: 1.0, 20: 0.1}),
    ],
)
def test_warmup_stable_decay(shape, rates):
    optim = Optim(
        schedule="wsd", learning_rate=1.0, warmup_steps=2, decay_ratio=0.25, decay_shape=shape, final_ratio=0.1
    )
    schedule = make_schedule(optim, 20)
    for step, rate in rates.items():
        assert float(schedule(step)) == pytest.approx(rate, abs=1e-6), step


def test_inverse_square_root():
    schedule = make_schedule(Optim(schedule="inverse_sqrt", learning_rate=1.0, warmup_steps=4), 100)
    assert [float(schedule(step)) for step in (2, 4, 16, 64)] == pytest.approx([0.5, 1.0, 0.5, 0.25])


AXES = {path: declared.axes for path, declared in declare(ARCH).items()}


def updates_of(optim, params, grads, axes=AXES, steps=1):
    """The last of `steps` updates with the same gradients."""
    tx = make_optimizer(optim, 10, params, axes)

    @jax.jit
    def run(params, grads):
        state = tx.init(params)
        for _ in range(steps):
            updates, state = tx.update(grads, state, params)
        return updates, state

    return run(params, grads)


def random_tree(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return nest({path: jnp.asarray(rng.normal(size=d.shape), dtype) for path, d in declare(ARCH).items()})


def test_muon_orthogonalises_each_layers_matrices():
    """Every matrix of every layer by itself: its update has singular values near 1, times 0.2 sqrt(longer side)."""
    optim = Optim(name="muon", learning_rate=1.0, schedule="constant", weight_decay=0.0)
    params, grads = random_tree(0), random_tree(1)
    updates, _ = updates_of(optim, params, grads)
    adam, _ = updates_of(Optim(learning_rate=1.0, schedule="constant"), params, grads)
    flat, plain = flatten(updates), flatten(adam)
    sides = {"q": (1, 2), "k": (1, 2), "v": (1, 2), "o": (2, 1), "gate": (1, 1), "up": (1, 1), "down": (1, 1)}
    for path, update in flat.items():
        part = path.split("/")[-2]
        if path.startswith("layers/") and part in sides and path.endswith("weight"):
            for layer in np.asarray(update):
                rows = int(np.prod(layer.shape[: sides[part][0]]))
                matrix = layer.reshape(rows, -1)
                values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * max(matrix.shape) ** 0.5)
                assert (values > 0.5).all(), path
                assert (values < 1.4).all(), path
        else:
            np.testing.assert_allclose(update, plain[path], rtol=1e-6, err_msg=path)


def test_muon_of_one_layer_is_that_of_a_plain_matrix():
    from optax.contrib import muon

    optim = Optim(name="muon", learning_rate=0.1, schedule="constant", weight_decay=0.3)
    params, grads = random_tree(0), random_tree(1)
    updates, _ = updates_of(optim, params, grads, steps=3)
    pick = lambda tree: {"w": flatten(tree)["layers/mlp/gate/weight"][1]}  # noqa: E731
    tx = muon(0.1, weight_decay=0.3, consistent_rms=0.2)
    state = tx.init(pick(params))
    for _ in range(3):
        alone, state = tx.update(pick(grads), state, pick(params))
    np.testing.assert_allclose(pick(updates)["w"], alone["w"], atol=1e-5)


def test_muon_needs_a_matrix():
    with pytest.raises(UsageError, match="no weight that is trained is a matrix of a layer"):
        make_optimizer(Optim(name="muon"), 10, {"norm": {"scale": jnp.ones(3)}}, AXES)


def test_adafactor_keeps_rows_and_columns_of_whole_matrices():
    """Heads are no axis of their own: q [L, D, N, H] is factored as [L, D, N H]."""
    shapes = {"layers/attn/q/weight": (2, 256, 4, 64)}
    params = nest({path: jnp.ones(shape) for path, shape in shapes.items()})
    axes = {"layers/attn/q/weight": ("layers", "embed", "heads", "head_dim")}
    _, state = updates_of(Optim(name="adafactor", learning_rate=0.1), params, params, axes)
    sizes = sorted(leaf.size for path, leaf in flatten(state).items() if "weight" in path and leaf.size > 1)
    assert sizes == [2 * 256, 2 * 256]


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_rates_by_pattern(name):
    params, grads = random_tree(0), random_tree(1)
    common = {"name": name, "learning_rate": 0.1, "schedule": "constant", "weight_decay": 0.1}
    plain, _ = updates_of(Optim(**common), params, grads)
    some, _ = updates_of(Optim(**common, rates={"*": 2.0, "embed/*": 0.5, "*norm*": 0.0}), params, grads)
    for path, update in flatten(some).items():
        factor = 0.0 if "norm" in path else 0.5 if path.startswith("embed") else 2.0
        np.testing.assert_allclose(update, factor * flatten(plain)[path], rtol=1e-6, atol=1e-9, err_msg=path)
    with pytest.raises(UsageError, match=r"optim.rates: pattern 'x\*' matches no weight"):
        make_optimizer(Optim(rates={"x*": 1.0}), 10, params)


def test_the_average_of_the_weights():
    """Against the plain recurrence; the first steps forget the start faster."""
    optim = Optim(learning_rate=0.1, schedule="constant", ema_decay=0.5)
    tx = make_optimizer(optim, 10, {"weight": jnp.ones(3)})
    params, mean = {"weight": jnp.ones(3)}, np.ones(3)
    state = tx.init(params)
    for step in range(6):
        updates, state = tx.update({"weight": jnp.arange(3.0) + step}, state, params)
        params = {"weight": params["weight"] + updates["weight"]}
        decay = min(0.5, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * np.asarray(params["weight"])
    np.testing.assert_allclose(averaged(params, state)["weight"], mean, rtol=1e-6)
    assert averaged(params, state)["weight"].dtype == params["weight"].dtype
    plain = make_optimizer(Optim(), 10, params)
    assert averaged(params, plain.init(params)) is params


def test_schedule_free_against_its_formulas():
    """arXiv 2405.15682, two steps of one number: z by the base optimizer, x its average, y between them."""
    optim = Optim(name="schedule_free", schedule="constant", learning_rate=0.1, b1=0.9, b2=0.99, eps=1e-8)
    tx = make_optimizer(optim, 10, {"weight": jnp.array([2.0])})
    y, state = {"weight": jnp.array([2.0])}, tx.init({"weight": jnp.array([2.0])})
    x = z = 2.0
    v = 0.0
    for t, g in enumerate((0.5, -0.25), 1):
        updates, state = tx.update({"weight": jnp.array([g])}, state, y)
        y = {"weight": y["weight"] + updates["weight"]}
        v = 0.99 * v + 0.01 * g * g
        z -= 0.1 * g / ((v / (1 - 0.99**t)) ** 0.5 + 1e-8)
        x = (1 - 1 / t) * x + z / t
        assert float(y["weight"][0]) == pytest.approx(0.9 * x + 0.1 * z, rel=1e-5)
        assert float(averaged(y, state)["weight"][0]) == pytest.approx(x, rel=1e-5)
