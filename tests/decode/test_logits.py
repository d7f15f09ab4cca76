"""Processors that look at the logits alone, against sorts in plain NumPy; all processors against the goldens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode import constraints as c
from decode import logits as p
from decode.logits import Context, Custom, Temperature, TopK, TopP, process
from tests.golden.logits import CASES, FILE, ours, same

RUN = jax.jit(process)


def context_for(rows):
    """Rows of one token."""
    ones = jnp.ones(rows, jnp.int32)
    return Context(jnp.zeros((rows, 4), jnp.int32), ones, ones)


def spread(processors, rows):
    """The same with every number repeated for each row."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (rows, *jnp.shape(leaf))), processors)


def softmax(row):
    weights = np.exp(row - row.max())
    return weights / weights.sum()


def at_least(x, keep):
    """x of the keep-th largest."""
    return np.sort(x)[::-1][min(keep, len(x)) - 1]


def until(x, weights, enough):
    """Where x is at least the first value, from the top, with which the weights reach `enough`."""
    for value in sorted(set(x.tolist()), reverse=True):
        if weights[x >= value].sum() >= enough:
            return x >= value
    return np.ones(len(x), bool)


def surprise(row):
    probs = softmax(row)
    some = probs > 0
    return np.where(some, -np.log(np.where(some, probs, 1)), np.inf)


def entropy(row):
    probs, bits = softmax(row), surprise(row)
    return (probs[probs > 0] * bits[probs > 0]).sum()


def top_k(row, k, keep):
    return row >= at_least(row, max(k, keep)) if k > 0 else row == row


def top_p(row, mass, keep):
    if mass >= 1:
        return row == row
    return until(row, softmax(row), max(mass, 1e-300)) | (row >= at_least(row, keep))


def min_p(row, share, keep):
    return (softmax(row) >= share * softmax(row).max()) | (row >= at_least(row, keep))


def typical(row, mass, keep):
    if mass >= 1:
        return row == row
    near = -np.abs(surprise(row) - entropy(row))
    return until(near, softmax(row), max(mass, 1e-300)) | (near >= at_least(near, keep))


def epsilon(row, cutoff, keep):
    return (softmax(row) >= cutoff) | (row >= at_least(row, keep))


def eta(row, cutoff, keep):
    return epsilon(row, min(cutoff, np.sqrt(cutoff) * np.exp(-entropy(row))), keep)


def top_n_sigma(row, n):
    return row >= row.max() - n * np.std(row[np.isfinite(row)]) if n > 0 else row == row


def top_h(row, h):
    if h <= 0:
        return row == row
    best = np.sort(row)[::-1][:100]
    probs, bits = softmax(best), surprise(best)
    terms = np.where(probs > 0, probs * np.where(probs > 0, bits, 0), 0)
    count = max(1, int((np.cumsum(terms) <= h * terms.sum()).sum()))
    return row >= best[count - 1]


# processor, reference, its first number off and on, and how many to keep at the least (none: has no such number)
KEEP = {
    "top_k": (p.TopK, top_k, [0, 1, 2, 7, 40, 5000], [1, 1, 5, 1, 1, 1]),
    "top_p": (p.TopP, top_p, [1.0, 0.9, 0.3, 0.0, 1e-3, 0.6], [1, 1, 1, 1, 9, 5000]),
    "min_p": (p.MinP, min_p, [0.0, 0.1, 0.5, 1.0, 0.9, 0.02], [1, 1, 1, 1, 6, 2]),
    "typical": (p.Typical, typical, [1.0, 0.9, 0.3, 0.0, 0.01, 0.6], [1, 1, 1, 1, 9, 1]),
    "epsilon": (p.EpsilonCutoff, epsilon, [0.0, 0.01, 0.05, 0.99, 0.5, 0.001], [1, 1, 1, 1, 6, 5000]),
    "eta": (p.EtaCutoff, eta, [0.0, 0.01, 0.05, 0.3, 0.9, 0.001], [1, 1, 1, 1, 9, 2]),
    "top_n_sigma": (p.TopNSigma, top_n_sigma, [0.0, 0.5, 1.0, 1.7, 3.0, 100.0], None),
    "top_h": (p.TopH, top_h, [0.0, 0.1, 0.4, 0.7, 1e-6, 0.99], None),
}


def draw(kind, vocab, dtype):
    """Six rows; "ties": few values; "removed": most are -inf."""
    rng = np.random.default_rng(vocab)
    x = rng.normal(size=(6, vocab)) * np.asarray([[0.3], [1], [3], [3], [3], [8]])
    if kind == "ties":
        x = np.round(x * 2) / 2 + 0.0
    if kind == "removed":
        x[rng.random(x.shape) < 0.8] = -np.inf
        x[:, vocab // 2] = 0.5
    return x.astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["smooth", "ties", "removed"])
@pytest.mark.parametrize("name", KEEP)
def test_keeps_what_a_sort_keeps_with_other_numbers_in_each_row(name, kind, dtype):
    processor, reference, numbers, keeps = KEEP[name]
    arguments = [numbers] if keeps is None else [numbers, keeps]
    for vocab in (50, 1000):
        with jax.enable_x64(dtype == np.float64):
            x = draw(kind, vocab, dtype)
            whole = (np.int32 if name == "top_k" else dtype, np.int32)
            made = processor(*(jnp.asarray(n, kind) for n, kind in zip(arguments, whole, strict=False)))
            found = np.asarray(RUN((made,), jnp.asarray(x), context_for(6)))
            assert found.dtype == dtype
            for got, row, *number in zip(found, x, *arguments, strict=True):
                kept = reference(row.astype(np.float64), *number)
                assert (got == np.where(kept, row, -np.inf)).all(), (vocab, number)


@pytest.mark.parametrize("name", KEEP)
def test_a_number_for_all_is_as_the_same_in_each_row_and_the_default_is_off(name):
    processor, _, numbers, _ = KEEP[name]
    x = jnp.asarray(draw("removed", 200, np.float32))
    for number in numbers[1:3]:
        one = RUN((processor(number),), x, context_for(6))
        each = RUN(spread((processor(number),), 6), x, context_for(6))
        assert (one == each).all()
    assert (RUN((processor(),), x, context_for(6)) == x).all()


@pytest.mark.parametrize("name", KEEP)
def test_a_row_with_nothing_left_stays_so(name):
    processor, _, numbers, _ = KEEP[name]
    x = jnp.full((6, 50), -jnp.inf)
    number = jnp.asarray(numbers, np.int32 if name == "top_k" else np.float32)
    assert (RUN((processor(number),), x, context_for(6)) == -jnp.inf).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_temperature_divides(dtype):
    with jax.enable_x64(dtype == np.float64):
        x = draw("removed", 50, dtype)
        t = np.asarray([1, 0.5, 2, 0.7, 1e-3, 1.3], dtype)
        found = np.asarray(RUN((Temperature(jnp.asarray(t)),), jnp.asarray(x), context_for(6)))
        np.testing.assert_allclose(found, x / t[:, None], rtol=np.finfo(dtype).eps * 2)
        assert (found[0] == x[0]).all()


def test_ties_stay_together_and_removed_tokens_stay_removed():
    logits = jnp.asarray([[0.0, -0.0, 1.0, -jnp.inf, 0.0, -2.0]])
    assert np.isfinite(TopK(2)(logits)).tolist() == [[True, True, True, False, True, False]]
    assert np.isfinite(TopP(0.5)(logits)).tolist() == [[True, True, True, False, True, False]]
    assert np.isfinite(TopK(6)(logits)).sum() == 5


def test_the_first_processor_comes_first_and_half_precision_becomes_single():
    x = jnp.asarray(draw("smooth", 40, np.float32)).astype(jnp.bfloat16)
    chain = (Temperature(0.5), TopK(3), TopP(0.9))
    found = RUN(chain, x, context_for(6))
    assert found.dtype == jnp.float32
    assert (found == TopP(0.9)(TopK(3)(x.astype(jnp.float32) / 0.5))).all()
    assert (process((), x, context_for(6)) == x.astype(jnp.float32)).all()


def test_numbers_are_traced_not_compiled_in():
    traces = []

    @jax.jit
    def run(chain, logits):
        traces.append(1)
        return process(chain, logits, context_for(2))

    x = jnp.asarray(draw("smooth", 40, np.float32))[:2]
    for temperature, k, mass in ((0.5, 3, 0.9), (0.7, 9, 0.2)):
        chain = (Temperature(temperature), TopK(k), TopP(mass))
        by_hand = TopP(mass)(TopK(k)(x / temperature))
        assert (np.isfinite(run(chain, x)) == np.isfinite(by_hand)).all()
    assert len(traces) == 1


def test_no_two_kinds_are_one_to_jit():
    # jax.tree_util.register_dataclass makes them so
    kinds = [value for module in (p, c) for value in vars(module).values() if dataclasses.is_dataclass(value)]
    kinds = [kind for kind in dict.fromkeys(kinds) if kind is not Context]
    assert len(kinds) > 20
    names = [[field.name for field in dataclasses.fields(kind)] for kind in kinds]
    made = [kind(*(abs if n == "function" else 1 for n in ns)) for kind, ns in zip(kinds, names, strict=True)]
    structures = [jax.tree.structure((one,)) for one in made]
    for i, one in enumerate(structures):
        assert one not in structures[:i]
        assert jax.tree.unflatten(one, jax.tree.leaves(made[i])) == (made[i],)
    # static fields tell too
    assert jax.tree.structure(Custom(abs)) != jax.tree.structure(Custom(max))


def test_one_row_of_spread_processors_can_be_set():
    chain = spread((Temperature(1.0), TopK(0)), 6)
    chain = jax.tree.map(lambda leaf, new: leaf.at[2].set(new), chain, (Temperature(0.5), TopK(2)))
    x = jnp.asarray(draw("smooth", 40, np.float32))
    found = RUN(chain, x, context_for(6))
    assert (found[jnp.asarray([0, 1, 3, 4, 5])] == x[jnp.asarray([0, 1, 3, 4, 5])]).all()
    assert (found[2] == TopK(2)(x[2:3] / 0.5)[0]).all()


def forbid_the_last(logits, context):
    """What a user may write: no token twice in a row."""
    last = jnp.take_along_axis(context.tokens, context.length[:, None] - 1, axis=1)
    return jnp.where(jnp.arange(logits.shape[1])[None] == last, -jnp.inf, logits)


def test_a_function_of_your_own_is_traced_once():
    traces = []

    def function(logits, context):
        traces.append(1)
        return forbid_the_last(logits, context)

    run = jax.jit(process)
    x = jnp.asarray(draw("smooth", 10, np.float32))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 10, (6, 8)), jnp.int32)
    for length in (3, 5):
        lengths = jnp.asarray([length] * 5 + [1], jnp.int32)
        context = Context(tokens, jnp.ones(6, jnp.int32), lengths)
        found = np.asarray(run((Temperature(0.5), Custom(function), TopK(0)), x, context))
        expected = np.array(x / 0.5)
        expected[np.arange(6), tokens[np.arange(6), lengths - 1]] = -np.inf
        assert (found == expected).all()
    assert len(traces) == 1


@pytest.mark.parametrize("name", CASES)
def test_as_transformers_once_made_it(name):
    with np.load(FILE) as golden:
        for length in sorted(int(key.split("/")[1]) for key in golden.files if key.startswith("logits/")):
            found = ours(name, golden[f"logits/{length}"], golden[f"tokens/{length}"], length)
            same(found, golden[f"{name}/{length}"], 2e-6)
