"""KTO as a whole: loss and gradients from packed rows, however they are cut, are those of the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import sigmoid

from configs.errors import UsageError
from configs.load import load
from configs.objective import Objective
from data.pack import fill_row, pack_window
from data.pairs import join_pair
from model.compute import Compute
from model.tree import flatten, split
from sharding.mesh import make_mesh
from sharding.place import place_batch
from sharding.rules import make_rules
from tests.train.test_dpo import pair, policies, sides, totals
from tests.train.test_step import ARCH, MESHES
from train.recipes import make_recipe
from train.step import denominators, split_batch, with_columns

T, N = 40, 9
LABELS = [True, False, False, True, True, False, True, True, False]
OBJECTIVE = Objective(
    type="kto", beta=0.3, desirable_weight=1.2, undesirable_weight=0.7, reference="adapterless", loss_chunk=16
)


def examples():
    """Prompt, completion, and the completion of the example before."""
    own = [pair(seed) for seed in range(N)]
    return [(own[i][0], own[i][1], own[i - 1][1], LABELS[i]) for i in range(N)]


def batch_of(rows=8):
    made = []
    for prompt, completion, other, label in examples():
        columns = join_pair(*sides(prompt, completion, other), len(prompt))
        made.append({**columns, "desirable": np.full(len(columns["tokens"]), label, np.float32)})
    plan = pack_window([len(e["tokens"]) for e in made], T, 0)
    assert len(plan) <= rows
    more = ("branches", "desirable")
    filled = [fill_row([made[i] for i in row], T, more=more) for row in plan + [[]] * (rows - len(plan))]
    return {name: np.stack([row[name] for row in filled]) for name in filled[0]}


def plain(params, reference, dtype):
    """Equation 7 of the paper, with z0 from the completions of the examples before; no gradient through z0."""

    def scores(of):
        rows = [(example[0], example[of]) for example in examples()]
        return totals(params, rows, dtype) - totals(reference, rows, dtype)

    z0 = jnp.maximum(scores(2).mean(), 0)
    above = 0.3 * (scores(1) - jax.lax.stop_gradient(z0))
    losses = jnp.where(np.asarray(LABELS), 1.2 * (1 - sigmoid(above)), 0.7 * (1 - sigmoid(-above)))
    return losses.mean(), z0


@pytest.mark.parametrize(
    ("sign", "pieces"),
    [(1, 4), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 1), (-1, 4), (-1, 1)))],
)
def test_loss_and_gradients_are_the_papers(pieces, sign):
    with jax.enable_x64(True):
        base, policy = policies(np.float64)
        if sign < 0:  # on one side of 0 z0 is cut off
            policy = jax.tree_util.tree_map_with_path(lambda p, x: -x if str(p[-1]) == ".b" else x, policy)
        recipe = make_recipe(OBJECTIVE, ARCH, Compute(jnp.float64, "reference"))
        batch = {name: jnp.asarray(column) for name, column in batch_of().items()}

        def ours(policy):
            whole, _ = with_columns(recipe.columns, *split(policy, lambda _: True), {}, batch, pieces)
            norms, parts = denominators(recipe.weights, whole), split_batch(whole, pieces)
            found = [recipe.loss(policy, jax.tree.map(lambda x: x[i], parts), norms) for i in range(pieces)]  # noqa: B023
            return sum(loss for loss, _ in found), jax.tree.map(lambda *x: sum(x), *(sums for _, sums in found))

        (got, sums), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(policy)
        (want, z0), expected = jax.jit(jax.value_and_grad(lambda p: plain(p, base, jnp.float64), has_aux=True))(policy)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    metrics = {name: np.asarray(total) / np.asarray(weight) for name, (total, weight) in sums.items()}
    np.testing.assert_allclose(metrics["z0"], z0, rtol=0, atol=1e-12)
    np.testing.assert_allclose(metrics["desirable"], np.mean(LABELS))
    np.testing.assert_allclose(metrics["loss"], got, rtol=0, atol=1e-12)
    expected = flatten(expected)
    for path, value in flatten(grads).items():
        np.testing.assert_allclose(value, expected[path], rtol=0, atol=1e-9, err_msg=path)


def test_z0_is_positive_in_one_of_the_cases():
    """Else the test above would prove nothing of it."""
    found = []
    for sign in (1, -1):
        base, policy = policies(np.float32)
        policy = jax.tree_util.tree_map_with_path(lambda p, x: sign * x if str(p[-1]) == ".b" else x, policy)  # noqa: B023
        found.append(float(plain(policy, base, jnp.float32)[1]))
    assert max(found) > 0.01
    assert min(found) == 0


@pytest.mark.parametrize("loss_type", ["kto", pytest.param("apo_zero_unpaired", marks=pytest.mark.slow)])
def test_a_mesh_changes_nothing(loss_type):
    _, policy = policies(np.float32)
    objective = OBJECTIVE.model_copy(update={"loss_type": (loss_type,)})
    batch = batch_of()
    if loss_type == "apo_zero_unpaired":  # its examples have no second branch
        batch["segments"] = np.where(batch["branches"] == 2, 0, batch["segments"])

    def value(mesh, pieces):
        rules, grid = make_rules("fsdp", {}), make_mesh(MESHES[mesh], jax.devices()[: 1 if mesh == "1" else 8])
        recipe = make_recipe(objective, ARCH, Compute(jnp.float32, "reference", rules=rules))

        def loss(policy, batch):
            whole, _ = with_columns(recipe.columns, *split(policy, lambda _: True), {}, batch, pieces)
            return recipe.loss(policy, whole, denominators(recipe.weights, whole))[0]

        with jax.set_mesh(grid):
            return jax.jit(jax.value_and_grad(loss))(policy, place_batch(batch, grid, rules))

    (want, expected), (got, found) = value("1", 1), value("2x2x2", 2)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    norm = lambda tree: float(jnp.sqrt(sum((x**2).sum() for x in jax.tree.leaves(tree))))  # noqa: E731
    difference = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), found, expected)
    assert norm(difference) < 2e-5 * norm(expected)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("objective.loss_type=sigmoid",), "type is kto, objective.loss_type sigmoid"),
        (("objective.type=dpo", "objective.loss_type=kto"), "type is dpo, objective.loss_type kto"),
        (("objective.desirable_weight=-1",), "desirable_weight"),
        (("objective.reference=none",), "kto compares with a reference"),
        (("objective.reference=model",), "goes with reference_model=MODEL"),
    ],
)
def test_contradictions_are_refused(more, words):
    with pytest.raises(UsageError, match=words):
        load("dpo", ["model.source=x", "data.train=y", "objective.type=kto", *more])
