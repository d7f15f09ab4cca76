"""Preference losses learn the policy that theory names: Bradley-Terry preferences, complete, on a small discrete model.

Wins are whole numbers: of completions with rewards log k, i beats j k_i times, and j beats i k_j times. So the mean
over these pairs is the expectation, exactly.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.objective import Objective
from configs.schema import Data
from data.pack import fill_row
from data.pairs import fit_pair, join_pair
from model.architecture import Architecture
from model.compute import Compute
from model.transformer import declare, nest
from model.tree import split
from train.losses import packed
from train.recipes import make_recipe
from train.state import State
from train.step import make_step

ARCH = Architecture(16, 16, 1, 2, 1, 8, 32, 64, tie_embeddings=True)
COMPUTE = Compute(jnp.float64, "reference")
T, BETA = 8, 0.5
PROMPTS = [[3, 5, 4], [6]]
COMPLETIONS = [[7], [8, 9], [10, 11, 9]]  # none begins another
WINS = [[1, 2, 4], [5, 1, 2]]  # exp(reward) of each completion after each prompt
GAMES = [
    (p, i, j)
    for p, wins in enumerate(WINS)
    for i, count in enumerate(wins)
    for j in range(len(COMPLETIONS))
    if i != j
    for _ in range(count)
]


def batch_of(games):
    """A row for each (prompt, winner, loser)."""
    rows = []
    for p, *played in games:
        sides = []
        for tokens in (COMPLETIONS[i] for i in played):
            weights = np.repeat([0.0, 1.0], [len(PROMPTS[p]), len(tokens)])
            sides.append({"tokens": np.asarray([*PROMPTS[p], *tokens], np.int32), "weights": weights})
        pair, _ = fit_pair((sides[0], sides[1]), Data(train=("x",), max_length=T))
        rows.append(fill_row([pair], T, more=("branches",)))
    return {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}


def labelled(labels):
    """A row for each (prompt, completion, whether it is desirable), and behind it another prompt's completion."""
    rows = []
    for at, (p, i, desirable) in enumerate(labels):
        sides = []
        for tokens in (COMPLETIONS[i], COMPLETIONS[labels[at - 1][1]]):
            weights = np.repeat([0.0, 1.0], [len(PROMPTS[p]), len(tokens)])
            sides.append({"tokens": np.asarray([*PROMPTS[p], *tokens], np.int32), "weights": weights})
        columns = join_pair(sides[0], sides[1], len(PROMPTS[p]))
        columns["desirable"] = np.full(len(columns["tokens"]), desirable, np.float32)
        rows.append(fill_row([columns], T, more=("branches", "desirable")))
    return {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}


def learn(games=GAMES, make=batch_of, steps=250, **objective):
    """log p [prompts, completions] of all completions after training, and of the reference, which it starts as."""
    rng = np.random.default_rng(0)
    params = nest(
        {
            path: jnp.asarray(path.endswith("scale") + 0.3 * rng.standard_normal(d.shape))
            for path, d in declare(ARCH).items()
        }
    )
    recipe = make_recipe(Objective(**{"type": "dpo", "beta": BETA, **objective}), ARCH, COMPUTE)
    batch = make(games)
    score = jax.jit(lambda p: packed.policy_logprobs(p, batch, arch=ARCH, compute=COMPUTE, chunk=64))
    reference = score(params)
    batch |= {"weights": batch["weights"].astype(jnp.float64), "ref_logprobs": reference}
    tx = optax.adam(optax.cosine_decay_schedule(0.02, steps))
    step = make_step(recipe.loss, recipe.weights, tx, columns=recipe.columns)
    trainable, frozen = split(params, lambda path: True)
    state = State(jnp.zeros((), jnp.int32), trainable, tx.init(trainable))
    for _ in range(steps):
        state, _ = step(state, frozen, batch)
    pairs = packed.pairs_of(score(state.params), batch)
    found = np.zeros((2, len(PROMPTS), len(COMPLETIONS)))
    for game, ours, theirs in zip(games, pairs.chosen[:, 0], pairs.ref_chosen[:, 0], strict=True):
        found[:, game[0], game[1]] = ours, theirs
    return found


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def test_dpo_reaches_the_best_policy():
    """Among the completions, pi(y|x) = ref(y|x) exp(r(y) / beta) / Z: equations 4 and 6 of arXiv 2305.18290."""
    policy, reference = learn()
    best = softmax(reference + np.log(WINS) / BETA)
    np.testing.assert_allclose(softmax(policy), best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss_type", [pytest.param("ipo_sum", marks=pytest.mark.slow), "ipo"])
def test_ipo_reaches_its_optimum(loss_type):
    """Least squares: score differences to (2 p - 1) / (2 beta), each as often as it was played (arXiv 2310.12036)."""
    policy, reference = learn(loss_type=(loss_type,))
    lengths = [len(tokens) for tokens in COMPLETIONS] if loss_type == "ipo" else 1
    found = (policy - reference) / lengths
    for p, wins in enumerate(WINS):
        played = [(i, j) for i in range(len(wins)) for j in range(i)]
        count = np.asarray([wins[i] + wins[j] for i, j in played])
        sides = np.asarray([np.eye(len(wins))[i] - np.eye(len(wins))[j] for i, j in played])
        target = np.asarray([wins[i] - wins[j] for i, j in played]) / count / (2 * BETA)
        root = np.sqrt(count)
        want = np.linalg.lstsq(sides * root[:, None], target * root, rcond=None)[0]  # its mean is 0
        np.testing.assert_allclose(found[p] - found[p].mean(), want, rtol=0, atol=1e-6)


def test_kto_keeps_what_most_find_desirable():
    """The expected loss is monotone in each score, in the majority's sense: what most labels call desirable stays, the
    rest dies out, however loud the minority."""
    share = [[3, 1, 4], [1, 4, 0]]  # desirable ones of 5 labels
    labels = [(p, i, k < count) for k in range(5) for i in range(3) for p, count in enumerate(row[i] for row in share)]
    policy, reference = learn(labels, labelled, 600, type="kto")
    found = softmax(policy)
    liked = np.asarray(share) > 2
    assert softmax(reference)[~liked].max() > 0.5
    assert found[~liked].max() < 1e-3
    assert found[1, 1] > 0.99
