"""Losses of learning by reward: the formulas by hand; and how a batch is cut is of no account, on whole models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.objective import Objective
from configs.sample import Sample
from model.compute import Compute
from model.transformer import nest
from model.tree import flatten, split
from sharding.mesh import make_mesh
from sharding.place import place_batch
from sharding.rules import make_rules
from tests.golden.policy import batch_of, samples
from tests.train.test_step import ARCH, MESHES, weights_of
from train.losses import packed, policy
from train.recipes import make_recipe
from train.step import denominators, split_batch, with_columns

RATIO, LOGPS = jnp.array([0.5, 0.9, 1.0, 1.15, 2.5]), jnp.array([-1.0, -0.2, -3.0, -0.5, -2.0])
UP, DOWN = jnp.full(5, 2.0), jnp.full(5, -2.0)


@pytest.mark.parametrize(
    ("function", "constants", "gains", "losses"),
    [
        (policy.clipped, {"epsilon": 0.2, "epsilon_high": 0.3}, [0.5, 0.9, 1, 1.15, 1.3], [0.8, 0.9, 1, 1.15, 2.5]),
        (
            policy.clipped, {"epsilon": 0.2, "epsilon_high": 0.1, "delta": 1.5},
            [0.5, 0.9, 1, 1.1, 1.1], [0.8, 0.9, 1, 1.15, 1.5],
        ),
        (policy.cispo, {"epsilon_high": 1.1}, [-0.5, -0.18, -3, -0.55, -2.2], [-0.5, -0.18, -3, -0.55, -2.2]),
    ],
)  # fmt: skip
def test_clipped_and_cispo(function, constants, gains, losses):
    np.testing.assert_allclose(function(RATIO, UP, LOGPS, **constants), -2 * np.array(gains), rtol=1e-6)
    np.testing.assert_allclose(function(RATIO, DOWN, LOGPS, **constants), 2 * np.array(losses), rtol=1e-6)


def test_sapo_and_vespo():
    numbers, w = {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 2.0}, np.asarray(RATIO, np.float64)
    gate = lambda tau: 4 / tau / (1 + np.exp(-tau * (w - 1)))  # noqa: E731
    np.testing.assert_allclose(policy.sapo(RATIO, UP, LOGPS, **numbers), -2 * gate(1), rtol=1e-6)
    np.testing.assert_allclose(policy.sapo(RATIO, DOWN, LOGPS, **numbers), 2 * gate(2), rtol=1e-6)
    numbers = {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0}
    want = -2 * w**2 * np.exp(3 * (1 - w)) * np.asarray(LOGPS)
    np.testing.assert_allclose(policy.vespo(RATIO, UP, LOGPS, **numbers), want, rtol=1e-6)
    np.testing.assert_allclose(policy.vespo_weight(RATIO, DOWN, **numbers), w**3 * np.exp(2 * (1 - w)), rtol=1e-6)


def test_gradients_at_ratio_one_are_the_policy_gradient():
    """On policy every loss but luspo's sum is -A grad log p of each token."""
    logps = jnp.array([-1.0, -2.0])
    for name, row in policy.POLICY_LOSSES.items():
        numbers = {key: getattr(Objective(), key) for key in row.constants} | (
            {"epsilon_high": 5.0} if "epsilon_high" in row.constants else {}
        )

        def loss(logps, row=row, numbers=numbers):
            ratio = jnp.exp(logps - jax.lax.stop_gradient(logps))
            return row.function(ratio, jnp.array([3.0, -2.0]), logps, **numbers).sum()

        np.testing.assert_allclose(jax.grad(loss)(logps), [-3.0, 2.0], rtol=1e-6, err_msg=name)


def test_kl_estimates_are_right_on_average():
    """Over samples of p, k1 and k3 average to KL(p, q); times the ratio, their gradients to its gradient, and so does
    k2's by itself."""
    with jax.enable_x64(True):
        logits, q = jnp.array([0.3, -1.0, 0.8]), jax.nn.log_softmax(jnp.array([-0.2, 0.1, 0.4]))

        def mean(logits, name, corrected):
            p = jax.nn.log_softmax(logits)
            ratio = jnp.exp(p - jax.lax.stop_gradient(p)) if corrected else 1.0
            return (jnp.exp(jax.lax.stop_gradient(p)) * ratio * policy.KL[name](q - p)).sum()

        def kl(logits):
            p = jax.nn.log_softmax(logits)
            return (jnp.exp(p) * (p - q)).sum()

        for name, corrected in (("k1", True), ("k3", True), ("k2", False)):
            np.testing.assert_allclose(jax.grad(mean)(logits, name, corrected), jax.grad(kl)(logits), atol=1e-12)
        for name in ("k1", "k3"):
            np.testing.assert_allclose(mean(logits, name, True), kl(logits), atol=1e-12)


# two segments side by side whose branches have one number, one without a prompt's position, one that carries no loss
ROWS = {
    "segments": jnp.array([[1, 1, 1, 1, 2, 2, 3, 3, 0], [1, 1, 1, 1, 1, 1, 1, 0, 0]]),
    "branches": jnp.array([[0, 1, 1, 2, 2, 2, 1, 2, 0], [0, 0, 1, 2, 3, 3, 4, 0, 0]]),
    "weights": jnp.array([[0, 1, 1, 1, 1, 0, 1, 1, 0], [0, 0, 1, 0, 1, 1, 0, 0, 0]], jnp.float32),
}


def test_completions_are_told_apart():
    numbers = policy.sequences_of(ROWS)
    np.testing.assert_array_equal(numbers, [[9, 0, 0, 1, 2, 2, 3, 4, 9], [9, 9, 0, 1, 2, 2, 3, 9, 9]])
    sums = policy.totals(ROWS["weights"] * 3, numbers)
    np.testing.assert_array_equal(sums, [[0, 6, 6, 3, 3, 3, 3, 3, 0], [0, 0, 3, 0, 6, 6, 0, 0, 0]])
    norms = policy.policy_weights(ROWS, max_completion_length=7)
    assert {name: float(x) for name, x in norms.items()} == {
        "tokens": 9, "sequences": 9, "capacity": 63, "entropy": 9,
    }  # fmt: skip


@pytest.mark.parametrize("share", [0.0, 0.2, 0.37, 1.0])
def test_top_entropy_mask(share):
    rng = np.random.default_rng(0)
    entropies, weights = rng.random((3, 17)).astype(np.float32), (rng.random((3, 17)) < 0.7).astype(np.float32)
    bound = np.quantile(entropies[weights > 0], np.float32(1 - share))
    made = policy.top_entropy_mask(jnp.asarray(entropies), jnp.asarray(weights), share)
    np.testing.assert_array_equal(made, (entropies >= bound) * weights)
    assert not policy.top_entropy_mask(jnp.asarray(entropies), jnp.zeros((3, 17)), share).any()


@pytest.mark.parametrize(
    ("mode", "tokens"),
    [
        ("none", [1, 1, 1, 1]),
        ("token_truncate", [0.8, 1.5, 1.2, 1]),
        ("token_mask", [0, 0, 1.2, 1]),
        ("sequence_truncate", [1, 1, 1.2, 1]),
        ("sequence_mask", [1, 1, 1.2, 1]),
    ],
)
def test_correction(mode, tokens):
    log_ratio, numbers = jnp.log(jnp.array([[0.5, 2.0, 1.2, 1.0]])), jnp.array([[0, 0, 1, 4]])
    made = policy.Correction(mode, 0.8, 1.5).ratios(log_ratio, numbers)
    np.testing.assert_allclose(made, [tokens], rtol=1e-6)
    assert policy.Correction(mode).ratios(log_ratio, numbers).shape == (1, 4)  # without bounds


# How a batch is cut.

GIVEN = samples(6, 3, seed=8, vocabulary=96)
COMMON = {"beta": 0.1, "loss_chunk": 32, "epsilon": 0.1}
OBJECTIVES = {
    name: Objective(type="grpo", loss_type=name, **COMMON, **options)
    for name, options in {
        "dapo": {"mask_truncated_completions": True},
        "bnpo": {"entropy_coef": 0.2, "top_entropy_quantile": 0.4},
        "grpo": {"importance_sampling_level": "sequence", "off_policy_mask_threshold": 0.02},
        "dr_grpo": {"importance_sampling_correction": "token_truncate", "importance_sampling_clip_max": 1.1},
        "cispo": {"epsilon_high": 1.1, "importance_sampling_correction": "sequence_mask"},
        "sapo": {"importance_sampling_level": "sequence_sum", "entropy_coef": 0.1},
        "luspo": {"importance_sampling_level": "sequence"},
        "vespo": {"importance_sampling_correction": "token_mask", "kl_estimator": "k2"},
    }.items()
}
SHARES = dict(zip(OBJECTIVES, (1.0, 0.7, -1.3, 0.9, 0.4, -0.6, 0.3, 1.1), strict=True))


def filled(share=True, length=64, rows=1):
    """The samples' batch, with columns that are the same for a sample wherever it lies."""
    rng = np.random.default_rng(4)
    draw = lambda mean, scale: [mean + scale * rng.normal(size=len(one)) for one in GIVEN.completions]  # noqa: E731
    batch = batch_of(GIVEN, [np.full(len(one), one[0]) for one in draw(0, 1)], True, share, length, rows)
    for name in ("old_logprobs", "ref_logprobs"):
        batch[name] = batch_of(GIVEN, draw(-4.6, 0.3), True, share, length, rows)["advantages"]
    batch["sampler_logprobs"] = batch["old_logprobs"] + 0.1 * (batch["sampler_logprobs"] + 5.6)
    return batch


def evaluate(monkeypatch, batch, pieces=1, mesh="1", dtype=jnp.float64):
    """({loss type: (value, metrics)}, gradients of all of them, weighed): one program for all loss types."""
    rules, grid = make_rules("fsdp", {}), make_mesh(MESHES[mesh], jax.devices()[: 1 if mesh == "1" else 8])
    compute = Compute(dtype, "reference", rules=rules)
    recipes = {name: make_recipe(one, ARCH, compute, Sample(max_new_tokens=11)) for name, one in OBJECTIVES.items()}
    params = nest({path: jnp.asarray(x) for path, x in weights_of(dtype=np.dtype(dtype)).items()})
    trainable, frozen = split(params, lambda _: True)
    plain, seen = packed.policy_logprobs_and, {}

    def once(statistic, params, batch, **options):  # the model is of no loss type
        key = id(batch["tokens"])
        if key not in seen:
            seen[key] = batch["tokens"], plain(statistic, params, batch, **{**options, "learn": True})
        return seen[key][1]

    monkeypatch.setattr(packed, "policy_logprobs_and", once)

    def losses(trainable, batch):
        whole, more = {}, {}
        for name, recipe in recipes.items():
            whole[name], _ = with_columns(recipe.columns, trainable, frozen, {}, batch, pieces)
            more[name] = {key: x for key, x in whole[name].items() if key not in batch}
        norms = {name: denominators(recipe.weights, whole[name]) for name, recipe in recipes.items()}

        def piece(columns):
            part, more = columns
            return {
                name: recipe.loss(trainable, {**part, **more[name]}, norms[name]) for name, recipe in recipes.items()
            }

        found = jax.lax.map(
            piece, (split_batch(batch, pieces), {name: split_batch(x, pieces) for name, x in more.items()})
        )
        return sum(SHARES[name] * value.sum() for name, (value, _) in found.items()), found

    with jax.set_mesh(grid):
        batch = {name: x.astype(dtype) if x.dtype.kind == "f" else x for name, x in batch.items()}
        placed = place_batch(batch, grid, rules)
        (_, found), grads = jax.jit(jax.value_and_grad(losses, has_aux=True))(trainable, placed)
    made = {}
    for name, (value, sums) in found.items():
        ends = {"/min": np.min, "/max": np.max}
        metrics = {
            key: float(ends[key[-4:]](x) if key[-4:] in ends else x.sum() / w.sum()) for key, (x, w) in sums.items()
        }
        made[name] = float(value.sum()), metrics
    return made, {path: np.asarray(g) for path, g in flatten(grads).items()}


@pytest.fixture(scope="module")
def apart():
    """Every completion alone in a row, on one device, in one piece."""
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        return evaluate(patch, filled(share=False, length=20))


CUTS = [(2, "2x2x2"), *(pytest.param(pieces, "1", marks=pytest.mark.slow) for pieces in (1, 4))]


@pytest.mark.parametrize(("pieces", "mesh"), CUTS)
def test_it_is_of_no_account_how_a_batch_is_cut(monkeypatch, apart, pieces, mesh):
    """Shared prompts, several completions in a row, micro-batches, a mesh: values, metrics, gradients."""
    with jax.enable_x64(True):
        batch = filled(length=64, rows=8)
        assert len(np.unique(batch["segments"])) > 2
        found, grads = evaluate(monkeypatch, batch, pieces, mesh)
    for name, (value, metrics) in apart[0].items():
        assert found[name][0] == pytest.approx(value, abs=1e-10), name
        assert found[name][1].keys() == metrics.keys()
        for key, number in metrics.items():
            assert found[name][1][key] == pytest.approx(number, abs=1e-10), (name, key)
    for path, g in apart[1].items():
        np.testing.assert_allclose(grads[path], g, rtol=0, atol=1e-10, err_msg=path)
    assert apart[0]["cispo"][1]["sampler_gap/mean"] > 0
    assert apart[0]["grpo"][1]["off_policy_masked"] > 0
    assert 0 < apart[0]["dapo"][1]["clip_ratio/low_mean"] < 1


def test_nothing_to_learn_is_a_gradient_of_zero(monkeypatch):
    """All completions without an end, and left out; and rows that are empty."""
    with jax.enable_x64(True):
        batch = filled(length=64, rows=8)
        found, grads = evaluate(monkeypatch, {**batch, "weights": 0 * batch["weights"]}, 2, "2x2x2")
    assert all(value == 0 for value, _ in found.values())
    assert all((g == 0).all() for g in grads.values())
