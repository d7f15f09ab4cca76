"""Learning by reward finds the best policy where it is known: a bandit for each of two prompts, an arm for each token.

Completions are one token, drawn from the policy by jax.random; all goes through the one step.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.objective import Objective
from model.architecture import Architecture
from model.compute import Compute
from model.head import head_of, logits
from model.transformer import declare, forward, nest
from model.tree import split
from tests.golden.policy import row_of
from train.recipes import make_recipe
from train.state import State
from train.step import make_step

ARCH = Architecture(12, 16, 1, 2, 1, 8, 32, 64, tie_embeddings=True)
COMPUTE = Compute(jnp.float32, "reference")
PROMPTS, ARMS = ([3, 5, 4], [6, 2]), 12
DRAWS = 64  # so many that no arm is long unseen
REWARDS = np.stack([np.linspace(0, 1, ARMS), np.linspace(1, 0, ARMS) ** 2])


def weights_of(seed):
    rng = np.random.default_rng(seed)
    return nest(
        {
            path: jnp.asarray(path.endswith("scale") + 0.1 * rng.standard_normal(d.shape), jnp.float32)
            for path, d in declare(ARCH).items()
        }
    )


@jax.jit
def policy_of(params):
    """log p of every arm after each prompt, [prompts, arms]."""
    size = max(map(len, PROMPTS))
    tokens = jnp.array([prompt + [0] * (size - len(prompt)) for prompt in PROMPTS])
    where = jnp.broadcast_to(jnp.arange(size), tokens.shape)
    said = logits(forward(ARCH, COMPUTE, params, tokens, where, where * 0 + 1), head_of(ARCH, params))
    last = jnp.array([len(prompt) - 1 for prompt in PROMPTS])
    return jax.nn.log_softmax(said[jnp.arange(len(PROMPTS)), last])


@partial(jax.jit, static_argnums=2)
def draw(key, logps, count):
    """Arms of each prompt, [prompts, count]."""
    return jax.random.categorical(key, logps, shape=(count, len(logps))).T


def batch_of(arms, advantages, reference):
    """A row for each prompt, with its draws side by side."""
    rows = []
    for prompt, drawn, values, ref in zip(PROMPTS, arms, advantages, reference, strict=True):
        before, count = len(prompt) - 1, len(drawn)
        after = lambda x, before=before: np.concatenate([np.zeros(before), x])  # noqa: E731
        columns = {
            "tokens": [*prompt[:-1], *prompt[-1:] * count], "targets": [*prompt[1:], *drawn],
            "positions": [*range(before), *[before] * count], "branches": [*[0] * before, *range(1, count + 1)],
        }  # fmt: skip
        floats = {"weights": np.ones(count), "advantages": values, "ref_logprobs": ref}
        row = {name: np.array(column, np.int32) for name, column in columns.items()}
        rows.append(row_of([row | {name: after(x).astype(np.float32) for name, x in floats.items()}], count + 2))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@cache
def step_of(objective, steps):
    """A step of a loss and its optimizer; compiled once for all algorithms that have it."""
    recipe = make_recipe(objective, ARCH, COMPUTE)
    tx = optax.adam(optax.linear_schedule(0.03, 0.0, steps))
    return make_step(recipe.loss, recipe.weights, tx), tx


def learn(seed, steps, loss, **options):
    """log p of every arm before and after training. loss: what the step depends on, options: the advantages."""
    loss = {"type": "grpo", "loss_chunk": 256, **loss}
    (step, tx), objective = step_of(Objective(**loss), steps), Objective(**{**loss, **options})
    advantages_of = make_recipe(objective, ARCH, COMPUTE).advantages
    assert advantages_of is not None
    trainable, frozen = split(weights_of(seed), lambda _: True)
    state, start = State(jnp.zeros((), jnp.int32), trainable, tx.init(trainable)), policy_of(trainable)
    groups, lengths = np.repeat(np.arange(len(PROMPTS)), DRAWS), [1] * (DRAWS * len(PROMPTS))
    for key in jax.random.split(jax.random.key(seed), steps):
        now = policy_of(state.params)
        arms = np.asarray(draw(key, now, DRAWS))
        drawn = lambda x, arms=arms: np.take_along_axis(np.asarray(x, np.float64), arms, 1)  # noqa: E731
        ratios = list((drawn(now) - drawn(start)).reshape(-1, 1))
        made = advantages_of(drawn(REWARDS).reshape(-1, 1), (1.0,), groups, lengths, ratios)
        batch = batch_of(arms, np.concatenate(made).reshape(arms.shape), drawn(start))
        state, _ = step(state, frozen, batch)
    return np.asarray(start, np.float64), np.asarray(policy_of(state.params), np.float64)


GRPO, SEQUENCE = {"loss_type": ("grpo",)}, {"loss_type": ("grpo",), "importance_sampling_level": "sequence_sum"}
ALGORITHMS = {
    "grpo": (GRPO, {}),
    "dr_grpo": ({"loss_type": ("dr_grpo",)}, {"scale_rewards": "none"}),
    "rloo": (SEQUENCE, {"advantage": "rloo"}),
    "reinforce++": (GRPO, {"advantage": "reinforce_plus_plus"}),
    "reinforce++ baseline": (GRPO, {"advantage": "reinforce_plus_plus_baseline"}),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("dr_grpo", "reinforce++ baseline") else ())
        for name in ALGORITHMS
    ],
)
def test_the_best_arm_is_found(name):
    """From no preference to the best arm of each prompt within 80 steps, on three seeds."""
    loss, options = ALGORITHMS[name]
    for seed in range(3):
        start, end = ((np.exp(x) * REWARDS).sum(1) for x in learn(seed, 80, loss, **options))
        print(f"{name}, seed {seed}: reward {start} -> {end}")
        assert (start < 0.7).all()
        assert (end > 0.98).all()


BETA = 0.3
KL = {
    "in the reward": (SEQUENCE, {"advantage": "rloo", "kl_in_reward": True, "beta": BETA}),
    "k3": ({**GRPO, "beta": BETA}, {"scale_rewards": "none"}),
    "k1": ({**GRPO, "beta": BETA, "kl_estimator": "k1"}, {"scale_rewards": "none"}),
    "k2": ({**GRPO, "beta": BETA, "kl_estimator": "k2", "use_bias_correction_kl": False}, {"scale_rewards": "none"}),
}


@pytest.mark.parametrize(
    "where", ["in the reward", *(pytest.param(k, marks=pytest.mark.slow) for k in ("k3", "k1", "k2"))]
)
def test_the_best_policy_under_a_kl(where):
    """pi(arm) = reference(arm) exp(reward(arm) / beta) / Z, whichever way the KL is taken."""
    loss, options = KL[where]
    start, end = learn(0, 80 if where == "in the reward" else 150, loss, **options)
    best = np.exp(start + REWARDS / BETA)
    best /= best.sum(1, keepdims=True)
    away, reached = (np.abs(np.exp(x) - best).sum(1) / 2 for x in (start, end))
    print(f"{where}: {away} -> {reached} from the best policy")
    assert (away > 0.3).all()
    assert (reached < 0.05).all()
