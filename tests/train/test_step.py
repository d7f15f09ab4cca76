"""The one step: the same losses however a batch is cut, uneven masks, clipping, decay, donation, one trace."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.schema import Optim
from data.pack import fill_row, pack_window
from model import lora
from model.architecture import Architecture
from model.compute import Compute
from model.transformer import declare, forward, nest
from model.tree import flatten, join, split
from sharding.mesh import make_mesh
from sharding.place import place_batch, replicated
from sharding.rules import make_rules
from train.losses.lm import lm_loss, lm_weights
from train.optim import make_optimizer
from train.state import init_state, shardings_of
from train.step import denominators, make_eval, make_step, split_batch

ARCH = Architecture(96, 32, 2, 8, 2, 4, 48, 64, tie_embeddings=True)
T, STEPS = 32, 20
PATHS = sorted(declare(ARCH))
MESHES = {
    "1": {},
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 8},
    "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
}
# name -> mesh, micro-batches, packed
SLOW = pytest.mark.slow
CUTS = {
    "1": ("1", 1, True),
    "1 micro 4 separate": ("1", 4, False),
    "data": ("data", 1, True),
    "fsdp micro 4": ("fsdp", 4, True),
    "tensor": ("tensor", 1, True),
    "2x2x2 micro 4 separate": ("2x2x2", 4, False),
}


def examples(seed):
    """Sequences of uneven length and masks; every fifth has only its last token trained, some weights are halves."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(50):
        n = int(rng.integers(3, 30))
        weights = rng.choice([0.0, 0.5, 1.0], n, p=[0.5, 0.1, 0.4]) * (i % 5 > 0)
        weights[-1] = 1.0
        made.append({"tokens": rng.integers(0, 96, n).astype(np.int32), "weights": weights.astype(np.float32)})
    return made


def batch_of(made, packed=True):
    """All examples as one batch of 32 rows, or 64 with one example each; the last ones are empty."""
    lengths = [len(e["tokens"]) - 1 for e in made]
    plan = pack_window(lengths, T, 0) if packed else [[i] for i in range(len(made))]
    plan += [[]] * ((32 if packed else 64) - len(plan))
    filled = [fill_row([made[i] for i in row], T) for row in plan]
    return {name: np.stack([row[name] for row in filled]) for name in filled[0]}


def weights_of(seed=0, dtype=np.float32):
    """{path: random array} of ARCH."""
    rng = np.random.default_rng(seed)
    return {
        path: ((path.endswith("scale")) + 0.1 * rng.standard_normal(declare(ARCH)[path].shape)).astype(dtype)
        for path in PATHS
    }


def adapters_of(seed=1, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = lora.adapter_shapes(declare(ARCH), lora.target_paths(PATHS, "all-linear"), 4)
    return {p: tuple(0.1 * rng.standard_normal(d.shape).astype(dtype) for d in ab) for p, ab in shapes.items()}


@dataclass
class Setting:
    """A step and what it runs on."""

    mesh: Any
    rules: Any
    step: Any
    state: Any
    frozen: Any

    def run(self, batch):
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.step(self.state, self.frozen, place_batch(batch, self.mesh, self.rules))
            return {name: float(value) for name, value in metrics.items()}


def make(mesh="1", microbatches=1, method="full", dtype=np.float32, steps=STEPS, loss=None, **optim):
    rules = make_rules("fsdp", {"kv_heads": None} if MESHES[mesh].get("tensor") == 8 else {})
    grid = make_mesh(MESHES[mesh], jax.devices()[: 1 if mesh == "1" else 8])
    where = lora.sharding_of(ARCH, grid, rules)
    place = lambda path, x: jax.make_array_from_callback(x.shape, where(path, x.shape), x.__getitem__)  # noqa: E731
    params = nest({path: place(path, x) for path, x in weights_of(dtype=dtype).items()})
    if method == "lora":
        pairs = {p: (place(f"{p}/a", a), place(f"{p}/b", b)) for p, (a, b) in adapters_of(dtype=dtype).items()}
        params = lora.attach(params, pairs, 0.5)
    trainable, frozen = split(params, (lambda p: p.endswith(("/a", "/b"))) if method == "lora" else lambda p: True)
    settings = Optim(**{"learning_rate": 1e-3, "schedule": "constant", "weight_decay": 0.1, **optim})
    with jax.set_mesh(grid):
        tx = make_optimizer(settings, steps, trainable)
        state = init_state(trainable, tx, grid)
        compute = Compute(jnp.dtype(dtype), "reference", "full", rules=rules)
        loss = loss or partial(lm_loss, arch=ARCH, compute=compute, chunk=256)
        step = make_step(loss, lm_weights, tx, microbatches, settings.max_grad_norm, shardings_of(state))
    return Setting(grid, rules, step, state, frozen)


def curve(cut, method="full", dtype=np.float32, steps=STEPS):
    """Losses and gradient norms of a run, and its last weights."""
    mesh, microbatches, packed = CUTS[cut] if isinstance(cut, str) else cut
    setting = make(mesh, microbatches, method, dtype, steps)
    batches = [batch_of(examples(seed), packed) for seed in range(3)]
    rows = [setting.run(batches[i % 3]) for i in range(steps)]
    assert setting.step._cache_size() == 1, "traced more than once in a run"
    last = {path: np.asarray(x) for path, x in flatten(setting.state.params).items()}
    assert int(setting.state.step) == steps
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}, last


@pytest.fixture(scope="module")
def single():
    """The curve of one device, one micro-batch, packed."""
    made = {}

    def get(method="full"):
        if method not in made:
            made[method] = curve("1", method)
        return made[method]

    return get


def compare(found, expected, tolerance, weights_tolerance):
    (rows, last), (want, want_last) = found, expected
    for name in ("loss", "objective", "token_accuracy"):
        np.testing.assert_allclose(rows[name], want[name], rtol=tolerance, err_msg=name)
    np.testing.assert_allclose(rows["grad_norm"], want["grad_norm"], rtol=10 * tolerance)
    for name in ("tokens", "context"):
        np.testing.assert_array_equal(rows[name], want[name])
    for path, leaf in want_last.items():
        apart = np.linalg.norm(last[path] - leaf) / np.linalg.norm(leaf)
        assert apart < max(weights_tolerance, 1e-8), (path, apart)
    return max(abs(rows["loss"] / want["loss"] - 1))


def test_the_loss_falls(single):
    losses = single()[0]["loss"]
    assert losses[-1] < 0.98 * losses[0]


@pytest.mark.parametrize(
    "cut", [pytest.param(name, marks=SLOW if CUTS[name][1] == 1 else ()) for name in CUTS if name != "1"]
)
def test_the_loss_curve_does_not_depend_on_the_cut(cut, single):
    compare(curve(cut), single(), 1e-5, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["2x2x2 micro 4 separate"])
def test_the_loss_curve_of_adapters_does_not_depend_on_the_cut(cut, single):
    compare(curve(cut, "lora"), single("lora"), 1e-5, 1e-3)


@pytest.mark.slow
def test_the_loss_curve_in_float64():
    with jax.enable_x64(True):
        expected = curve("1", "full", np.float64, 100)
        compare(curve("2x2x2 micro 4 separate", "full", np.float64, 100), expected, 1e-10, 1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_loss_curve_of_every_cut(method):
    """In float64; the tests above compare some in float32."""
    steps, tolerance = 30, 1e-10
    cuts = [(mesh, n, packed) for mesh in MESHES for n in (1, 4) for packed in (True, False)]
    with jax.enable_x64(True):
        expected = curve("1", method, np.float64, steps)
        for mesh, n, packed in cuts:
            if mesh in ("1", "2x2x2") or packed == (n == 1):
                found = curve((mesh, n, packed), method, np.float64, steps)
                far = compare(found, expected, tolerance, 100 * tolerance)
                print(f"{method}, mesh {mesh}, {n} micro-batches, packed {packed}: losses {far:.1e} apart")


def by_hand(setting, batch):
    """Loss and gradient written down naively: all logits at once, one device, no chunks, no micro-batches."""
    compute = Compute(jnp.float32, "reference")

    def loss(trainable, frozen):
        params = join(trainable, frozen)
        hidden = forward(ARCH, compute, params, batch["tokens"], batch["positions"], batch["segments"])
        logp = jax.nn.log_softmax(hidden @ params["embed"]["weight"].T)
        chosen = jnp.take_along_axis(logp, batch["targets"][..., None], -1)[..., 0]
        return -(chosen * batch["weights"]).sum() / batch["weights"].sum()

    batch = jax.tree.map(jnp.asarray, batch)
    value, grads = jax.jit(jax.value_and_grad(loss))(setting.state.params, setting.frozen)
    return float(value), {path: np.asarray(g) for path, g in flatten(grads).items()}


def gradient_of(setting, batch):
    """The gradient that a step of plain SGD with rate 1 took, and its metrics."""
    before = {path: np.asarray(x) for path, x in flatten(setting.state.params).items()}
    metrics = setting.run(batch)
    return metrics, {path: before[path] - np.asarray(x) for path, x in flatten(setting.state.params).items()}


def with_sgd(setting, microbatches):
    """The setting with gradient descent of rate 1 and no clipping."""
    tx = optax.sgd(1.0)
    setting.state = init_state(setting.state.params, tx, setting.mesh)
    loss = partial(lm_loss, arch=ARCH, compute=Compute(jnp.float32, "reference", rules=setting.rules), chunk=256)
    setting.step = make_step(loss, lm_weights, tx, microbatches, None, shardings_of(setting.state))
    return setting


@pytest.mark.parametrize("method", ["full", "lora"])
def test_uneven_masks_and_a_micro_batch_without_a_trained_token(method):
    """The gradient is that of the plain mean over all trained tokens, however they fall on the micro-batches."""
    batch = batch_of(examples(7))
    batch["weights"][1::4] = 0  # split_batch deals the rows out: this is the second of four micro-batches
    batch["weights"][2::4, 3:] = 0
    batch["weights"][3::4] *= 3
    setting = with_sgd(make(method=method), 4)
    loss, grads = by_hand(setting, batch)
    metrics, found = gradient_of(setting, batch)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-6)
    assert metrics["objective"] == pytest.approx(loss, rel=1e-6)
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert found.keys() == grads.keys()
    for path, g in grads.items():
        assert np.linalg.norm(found[path] - g) < 2e-5 * np.linalg.norm(g), path
    # nothing to learn in the whole batch: no gradient, no NaN
    nothing = {**batch, "weights": np.zeros_like(batch["weights"])}
    metrics, found = gradient_of(setting, nothing)
    assert (metrics["loss"], metrics["objective"], metrics["grad_norm"]) == (0, 0, 0)
    assert not any(g.any() for g in found.values())
    assert setting.step._cache_size() == 1


def test_the_optimizer_survives_a_batch_without_a_trained_token():
    setting = make()
    batch = batch_of(examples(3))
    rows = [setting.run({**batch, "weights": batch["weights"] * (i != 1)}) for i in range(3)]
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert rows[1]["loss"] == 0
    assert rows[2]["loss"] < rows[0]["loss"]


def test_the_state_is_donated_and_frozen_weights_are_not():
    setting = make(method="lora")
    state = jax.tree.leaves(setting.state)
    frozen = {path: np.asarray(x).copy() for path, x in flatten(setting.frozen).items()}
    setting.run(batch_of(examples(0)))
    assert all(x.is_deleted() for x in state)
    for path, x in flatten(setting.frozen).items():
        assert not x.is_deleted()
        np.testing.assert_array_equal(x, frozen[path])
    assert all(not leaf.is_deleted() for leaf in jax.tree.leaves(setting.state))


# What follows needs no transformer: a table of weights and losses that can be written down.


def toy_weights(batch):
    return {"tokens": batch["weights"].sum(), "rows": (batch["weights"].sum(1) > 0).sum().astype(jnp.float32)}


def toy_loss(params, batch, norms):
    """Two terms with two denominators: one counts tokens, one rows."""
    w = params["w"][batch["tokens"]] - params["offset"]
    tokens = (batch["weights"] * w**2).sum()
    row = ((batch["weights"] * w).sum(1) ** 2).sum()
    rows = (batch["weights"].sum(1) > 0).sum().astype(jnp.float32)
    sums = {"loss": (tokens, batch["weights"].sum()), "rows": (row, rows)}
    return tokens / norms["tokens"] + 0.1 * row / norms["rows"], sums


def toy(tx, microbatches=1, max_grad_norm=None):
    mesh = make_mesh({}, jax.devices()[:1])
    params = {"w": np.linspace(-2, 3, 96, dtype=np.float32), "offset": np.float32(0.5)}
    state = init_state(jax.device_put(params, replicated(mesh)), tx, mesh)
    step = make_step(toy_loss, toy_weights, tx, microbatches, max_grad_norm)
    return Setting(mesh, make_rules(), step, state, {"w": None, "offset": None})


@pytest.mark.parametrize("microbatches", [1, 2, 4, 32])
def test_each_term_has_its_own_denominator(microbatches):
    batch = batch_of(examples(5))
    batch["weights"][3::4] = 0
    setting = toy(optax.sgd(1.0), microbatches)
    w = np.linspace(-2, 3, 96)[batch["tokens"]] - 0.5
    m = batch["weights"].astype(np.float64)
    tokens, rows = (m * w**2).sum() / m.sum(), ((m * w).sum(1) ** 2).sum() / (m.sum(1) > 0).sum()
    found = setting.run(batch)
    assert found["loss"] == pytest.approx(tokens, rel=1e-6)
    assert found["rows"] == pytest.approx(rows, rel=1e-6)
    assert found["objective"] == pytest.approx(tokens + 0.1 * rows, rel=1e-6)
    # how many tokens are real, and how many keys each of them sees
    assert found["tokens"] == sum(len(e["tokens"]) - 1 for e in examples(5))
    assert found["context"] == sum(n * (n + 1) / 2 for n in (len(e["tokens"]) - 1 for e in examples(5)))


def test_every_row_is_in_exactly_one_micro_batch():
    batch = {"tokens": jnp.arange(24).reshape(12, 2)}
    pieces = split_batch(batch, 4)["tokens"]
    assert pieces.shape == (4, 3, 2)
    assert sorted(np.asarray(pieces[..., 0]).ravel()) == list(range(0, 24, 2))
    assert pieces[1, :, 0].tolist() == [2, 10, 18]


def test_a_denominator_of_zero_counts_as_one():
    batch = {"weights": jnp.zeros((2, 3))}
    assert denominators(toy_weights, batch) == {"tokens": 1, "rows": 1}


def test_clipping():
    batch = batch_of(examples(1))
    metrics, whole = gradient_of(toy(optax.sgd(1.0)), batch)
    norm = metrics["grad_norm"]
    assert norm == pytest.approx(np.sqrt(sum((g**2).sum() for g in whole.values())), rel=1e-5)
    for limit in (norm / 10, norm * 2):
        metrics, clipped = gradient_of(toy(optax.sgd(1.0), max_grad_norm=limit), batch)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-6), "the norm reported is that before clipping"
        for path, g in whole.items():
            np.testing.assert_allclose(clipped[path], g * min(1, limit / norm), rtol=1e-4, atol=1e-7)


def test_evaluation_gives_sums_and_weights():
    batch = jax.tree.map(jnp.asarray, batch_of(examples(2)))
    setting = toy(optax.sgd(1.0))
    sums = make_eval(toy_loss, toy_weights)(setting.state, setting.frozen, batch)
    _, expected = toy_loss(setting.state.params, batch, toy_weights(batch))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), sums, expected)
