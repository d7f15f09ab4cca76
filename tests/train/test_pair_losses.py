"""Losses on pairs against the papers' formulas in NumPy: values and gradients, symmetries, extremes, batch columns."""

import inspect
import math
from dataclasses import replace
from functools import partial

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.losses import pairs as formulas
from train.losses.pairs import FIELDS, Pairs, diverge, ld_weights, per_token, reward_metrics, wpo_weight
from train.losses.preference import BETA, LOSSES, Constant, combine

N = 12
LN2 = math.log(2)
PAIRED = {name: loss for name, loss in LOSSES.items() if loss.paired}
BY_RANK = [name for name, loss in PAIRED.items() if loss.score]
EACH = [name for name in PAIRED if name not in BY_RANK]
# constants other than the defaults, where there are any
OTHER = {
    "exo_pair": {"label_smoothing": 0.2},
    "robust": {"label_smoothing": 0.3},
    "cdpo": {"label_smoothing": 0.1},
    "aot": {"label_smoothing": 0.2},
    "aot_unpaired": {"label_smoothing": 0.2},
    "discopop": {"discopop_tau": 0.7},
    "bco_pair": {"delta": np.linspace(-1, 1, N)},
    "cpo": {"label_smoothing": 0.25},
    "simpo": {"simpo_gamma": 1.4, "label_smoothing": 0.1},
    "alphapo": {"alpha": 0.25, "simpo_gamma": 0.3, "label_smoothing": 0.1},
}
CASES = [(name, {}) for name in PAIRED] + list(OTHER.items()) + [("alphapo", {"alpha": -0.5})]


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


# The oracle: the papers' formulas in NumPy. They take complex numbers, whose imaginary part is a derivative.


def lsig(z):
    return -np.log1p(np.exp(-z))


def sig(z):
    return 1 / (1 + np.exp(-z))


def bce(z, e):
    return -(1 - e) * lsig(z) - e * lsig(-z)


def on_margin(name, d, beta, label_smoothing=0.0, discopop_tau=0.05):
    """Losses of a score margin d."""
    z, e = beta * d, label_smoothing
    if name == "sigmoid":
        return -np.log(sig(z))
    if name == "hinge":
        return np.where(z.real < 1, 1 - z, 0)
    if name == "ipo":
        return (d - 1 / (2 * beta)) ** 2
    if name == "exo_pair":
        e = label_smoothing or 1e-3
        return sig(z) * np.log(sig(z) / (1 - e)) + sig(-z) * np.log(sig(-z) / e)
    if name == "robust":
        return ((1 - e) * -lsig(z) - e * -lsig(-z)) / (1 - 2 * e)
    if name == "cdpo":
        return bce(z, e)
    assert name == "discopop"
    return (1 - sig(z / discopop_tau)) * np.log(1 + np.exp(-z)) + sig(z / discopop_tau) * np.exp(-z)


def oracle(name, p, beta, delta=0.0, simpo_gamma=0.5, alpha=0.0, **constants):
    """The losses of pairs p = {field: array}; those by rank in the order of ranks."""
    w, l = p["chosen"] - p["ref_chosen"], p["rejected"] - p["ref_rejected"]  # noqa: E741
    n, m = p["chosen_tokens"], p["rejected_tokens"]
    e = constants.get("label_smoothing", 0.0)
    mean_w, mean_l = p["chosen"] / n, p["rejected"] / m
    if name in ("sigmoid_norm", "ipo"):
        return on_margin("sigmoid" if name == "sigmoid_norm" else "ipo", w / n - l / m, beta)
    if name == "ipo_sum":
        return on_margin("ipo", w - l, beta)
    if name == "nca_pair":
        return -np.log(sig(beta * w)) - np.log(sig(-beta * w)) / 2 - np.log(sig(-beta * l)) / 2
    if name == "bco_pair":
        return -np.log(sig(beta * w - delta)) - np.log(sig(-(beta * l - delta)))
    if name == "sppo_hard":
        return (w - 1 / beta * (1 - 0.5)) ** 2 + (l - 1 / beta * (0 - 0.5)) ** 2
    if name == "apo_zero":
        return -sig(beta * w) + sig(beta * l) + 1
    if name == "apo_down":
        return sig(beta * w) - sig(beta * (w - l)) + 1
    if name == "aot":
        ours, theirs = p["chosen"] - p["rejected"], p["ref_chosen"] - p["ref_rejected"]
        return bce(beta * (np.sort(ours) - np.sort(theirs)), e)
    if name == "aot_unpaired":
        return bce(beta * (np.sort(w) - np.sort(l)), e)
    if name == "cpo":
        return bce(beta * (p["chosen"] - p["rejected"]), e)
    if name in ("simpo", "alphapo"):
        r = [a if alpha == 0 else (1 - np.exp(a) ** -alpha) / alpha for a in (mean_w, mean_l)]
        return bce(beta * (r[0] - r[1]) - simpo_gamma, e)
    if name == "orpo":
        odds = [np.exp(a) / (1 - np.exp(a)) for a in (mean_w, mean_l)]
        return -beta * np.log(sig(np.log(odds[0] / odds[1])))
    return on_margin(name, w - l, beta, **constants)


def derivatives(function, p, field):
    """d sum(function(p)) / d p[field], exact to rounding: a step of 1e-30 along the imaginary axis."""
    steps = p[field] + 1e-30j * np.eye(len(p[field]))
    return np.array([function({**p, field: step}).sum().imag / 1e-30 for step in steps])


def numbers(seed=0, apart=4.0):
    """Pairs as {field: array}: a policy within a few nats of its reference."""
    rng = np.random.default_rng(seed)
    p = {"chosen_tokens": rng.integers(1, 20, N), "rejected_tokens": rng.integers(1, 20, N)}
    for side in ("chosen", "rejected"):
        p[f"ref_{side}"] = -rng.uniform(0.1, 3, N) * p[f"{side}_tokens"]
        p[side] = np.minimum(p[f"ref_{side}"] + rng.normal(0, apart, N), -0.05)
    return p


def pairs_of(p, dtype=np.float64):
    return Pairs(**{f: jnp.asarray(p[f], dtype if "tokens" not in f else np.int32) for f in FIELDS})


def arrays(constants):
    return {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in constants.items()}


def loss_of(name, pairs, given, mask=None):
    """The table's loss, its columns made from these pairs."""
    score = LOSSES[name].score
    columns = score(pairs, jnp.ones(pairs.chosen.shape, bool) if mask is None else mask) if score else {}
    return combine(pairs, ((name, 1.0),), {**given, **columns})


def gradient(name, pairs, given, change=lambda pairs: pairs):
    """(losses, gradient of their sum as {field: array})."""
    policy = {f: getattr(pairs, f) for f in FIELDS if "tokens" not in f}
    rest = {f: getattr(pairs, f) for f in FIELDS if "tokens" in f}

    @jax.jit
    def both(policy):
        losses, pull = jax.vjp(lambda x: loss_of(name, change(Pairs(**x, **rest)), given), policy)
        return losses, pull(jnp.ones_like(losses))[0]

    return both(policy)


@pytest.mark.parametrize(("name", "constants"), CASES)
def test_values_and_gradients(name, constants):
    p, beta = numbers(), 0.6 if constants else 0.1
    losses, grads = gradient(name, pairs_of(p), {"beta": beta, **arrays(constants)})
    expected = oracle(name, p, beta, **constants)
    assert losses.dtype == jnp.float64
    if name in BY_RANK:
        np.testing.assert_allclose(losses.sum(), expected.sum(), rtol=1e-13)
    else:
        np.testing.assert_allclose(losses, expected, rtol=1e-12, atol=1e-14)
    for field in ("chosen", "rejected"):
        want = derivatives(lambda q: oracle(name, q, beta, **constants), p, field)
        np.testing.assert_allclose(grads[field], want, rtol=1e-11, atol=1e-14, err_msg=field)
        moves = LOSSES[name].reference and name != "aot"  # its reference arrives sorted, as a column
        np.testing.assert_allclose(grads[f"ref_{field}"], -want * moves, rtol=1e-11, atol=1e-14)


DIVERGED = {
    "forward_kl": lambda t: 1 - 1 / t,
    "js_divergence": lambda t: np.log(2 * t / (1 + t)),
    "alpha_divergence": lambda t: (t ** (0.3 - 1) - 1) / (0.3 - 1),
}


@pytest.mark.parametrize("kind", DIVERGED)
@pytest.mark.parametrize("name", [name for name, loss in PAIRED.items() if loss.divergence])
def test_divergences(name, kind):
    p = numbers(1, apart=1.0)
    given = {"beta": 0.2, **OTHER.get(name, {})}

    def expected(q):
        scores = {side: DIVERGED[kind](np.exp(q[side] - q[f"ref_{side}"])) for side in ("chosen", "rejected")}
        return oracle(name, {**q, **scores, "ref_chosen": 0, "ref_rejected": 0}, **given)

    losses, grads = gradient(name, pairs_of(p), given, lambda pairs: diverge(pairs, kind, 0.3))
    np.testing.assert_allclose(losses, expected(p), rtol=1e-11)
    for field in ("chosen", "rejected"):
        np.testing.assert_allclose(grads[field], derivatives(expected, p, field), rtol=1e-9, atol=1e-13)


def test_alpha_divergence_meets_its_limits():
    pairs = pairs_of(numbers())
    np.testing.assert_array_equal(diverge(pairs, "reverse_kl").margin, pairs.margin)
    for alpha, kind in ((1.0, "reverse_kl"), (1 + 1e-9, "reverse_kl"), (0.0, "forward_kl")):
        found, want = diverge(pairs, "alpha_divergence", alpha), diverge(pairs, kind)
        np.testing.assert_allclose(found.chosen, want.chosen, rtol=1e-7)
    with pytest.raises(ValueError, match=r"'kl', allowed: reverse_kl, forward_kl, js_divergence, alpha_divergence"):
        diverge(pairs, "kl")


def zero_pairs():
    """The policy is the reference; without a reference, equal means and equal sums."""
    same = np.linspace(-30, -2, N)
    return pairs_of({f: np.full(N, 7) if "tokens" in f else same for f in FIELDS})


@pytest.mark.parametrize(("name", "constants"), [case for case in CASES if "delta" not in case[1]])
def test_at_zero_margin(name, constants):
    given = {"beta": 2.0 if constants else 0.1, **constants}
    want = np.full(N, LOSSES[name].at_zero(given))
    np.testing.assert_allclose(loss_of(name, zero_pairs(), given), want, rtol=1e-13)
    for kind in formulas.DIVERGENCES if LOSSES[name].divergence else ():
        np.testing.assert_allclose(loss_of(name, diverge(zero_pairs(), kind), given), want, rtol=1e-13)


def test_losses_at_step_0():
    known = {"sigmoid": LN2, "robust": LN2, "aot": LN2, "bco_pair": 2 * LN2, "ipo": 25.0, "hinge": 1.0, "apo_down": 1.0}
    for name, value in known.items():
        assert LOSSES[name].at_zero({"beta": 0.1}) == pytest.approx(value, rel=1e-14)
    assert LOSSES["exo_pair"].at_zero({"beta": 0.1}) == pytest.approx(0.5 * np.log(0.25 / (1e-3 * 0.999)))
    assert LOSSES["simpo"].at_zero({"beta": 9.0, "simpo_gamma": 0.0}) == pytest.approx(LN2)


def swapped(p, sign=1):
    """Chosen and rejected exchanged, and scores negated if sign is -1."""
    other = {"chosen": "rejected", "rejected": "chosen"}
    q = {field: p[field.replace(side, other[side])] for side in other for field in p if side in field}
    if sign == 1:
        return q
    return {**q, **{side: 2 * q[f"ref_{side}"] - q[side] for side in other}}


def test_swapping_chosen_and_rejected():
    p, beta = numbers(2), 0.3
    d, pairs, mirror, turned = pairs_of(p).margin, pairs_of(p), pairs_of(swapped(p)), pairs_of(swapped(p, -1))
    odd = {  # loss - loss of the swapped pair
        "sigmoid": -beta * d,
        "sigmoid_norm": -beta * per_token(pairs).margin,
        "robust": -beta * d,
        "cdpo": -beta * d,
        "ipo_sum": -2 * d / beta,
        "ipo": -2 * per_token(pairs).margin / beta,
        "cpo": -beta * pairs.policy_margin,
    }
    for name, want in odd.items():
        found = loss_of(name, pairs, {"beta": beta}) - loss_of(name, mirror, {"beta": beta})
        np.testing.assert_allclose(found, want, rtol=1e-10, err_msg=name)
    for name in ("bco_pair", "sppo_hard", "apo_zero", "sigmoid", "hinge", "ipo_sum", "ipo", "aot_unpaired"):
        found, want = (loss_of(name, x, {"beta": beta}).sum() for x in (turned, pairs))
        np.testing.assert_allclose(found, want, rtol=1e-12, err_msg=name)
    found = loss_of("apo_zero", pairs, {"beta": beta}) + loss_of("apo_zero", mirror, {"beta": beta})
    np.testing.assert_allclose(found, 2.0, rtol=1e-12)


MONOTONE = "sigmoid sigmoid_norm hinge robust bco_pair apo_zero aot aot_unpaired cpo simpo alphapo orpo".split()


@pytest.mark.parametrize("name", MONOTONE)
def test_monotone(name):
    """Never worse with a likelier chosen or a less likely rejected completion."""
    constants = {key: value for key, value in OTHER.get(name, {}).items() if key != "label_smoothing"}
    grads = gradient(name, pairs_of(numbers(7)), {"beta": 0.3, **arrays(constants)})[1]
    assert (grads["chosen"] <= 0).all()
    assert (grads["rejected"] >= 0).all()


def test_minima():
    """Where the gradient of the losses that have a minimum vanishes."""
    beta, e, zero = 0.3, 0.2, jnp.zeros(1)
    scores = {  # name -> scores of chosen and rejected
        "ipo_sum": (0.5 / beta, 0.0),
        "sppo_hard": (0.5 / beta, -0.5 / beta),
        "cdpo": (math.log((1 - e) / e) / beta, 0.0),
        "exo_pair": (math.log((1 - e) / e) / beta, 0.0),
    }
    for name, (chosen, rejected) in scores.items():
        pairs = Pairs(zero + chosen, zero + rejected, zero, zero, zero + 1, zero + 1)
        grads = gradient(name, pairs, {"beta": beta, "label_smoothing": e})[1]
        np.testing.assert_allclose((grads["chosen"], grads["rejected"]), 0, atol=1e-12, err_msg=name)
    pairs = Pairs(zero + LN2 / beta, zero, zero, zero, zero + 1, zero + 1)
    np.testing.assert_allclose(gradient("nca_pair", pairs, {"beta": beta})[1]["chosen"], 0, atol=1e-12)


# Floating point.


@partial(jax.jit, static_argnums=1)
def everything(p, beta):
    """Losses and gradients of all loss types, some of them with f-divergences, as one array.

    Not ipo with f-divergences: the square of exp(80) is no float32 (nor in TRL).
    """
    out = []
    for name, loss in PAIRED.items():
        for kind in formulas.DIVERGENCES if name in ("sigmoid", "exo_pair", "robust", "discopop") else ("reverse_kl",):

            def total(x, name=name, loss=loss, kind=kind):
                pairs = Pairs(**{**p, **x})
                given = {"beta": beta, **arrays(OTHER.get(name, {}))}
                given = {k: v.astype(jnp.float32) if k == "delta" else v for k, v in given.items()}
                return loss_of(name, diverge(pairs, kind) if loss.divergence else pairs, given)

            losses, pull = jax.vjp(total, {side: p[side] for side in ("chosen", "rejected")})
            out += [losses, *pull(jnp.ones_like(losses))[0].values()]
    return jnp.stack(out)


LOGPS = st.floats(-1e6, 0, width=32) | st.floats(-1, 0, width=32) | st.sampled_from([0.0, -1e-8, -1e-38, -88.8, -104])


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    hypothesis.extra.numpy.arrays(np.float32, (4, N), elements=LOGPS),
    hypothesis.extra.numpy.arrays(np.int32, (2, N), elements=st.integers(0, 100_000)),
)
def test_extremes_are_finite_in_float32(logps, tokens):
    p = dict(zip(FIELDS, (*logps, *tokens), strict=True))
    found = everything({field: jnp.asarray(x) for field, x in p.items()}, 3.0)
    assert found.dtype == jnp.float32
    assert np.isfinite(found).all(), np.argwhere(~np.isfinite(found))


@pytest.mark.parametrize(("name", "constants"), CASES)
def test_float32_is_near(name, constants):
    p = numbers(3)
    given = {"beta": 0.3, **{k: jnp.float32(v) if k == "delta" else v for k, v in constants.items()}}
    single = loss_of(name, pairs_of(p, np.float32), given)
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, loss_of(name, pairs_of(p), given), rtol=1e-5, atol=1e-6)
    assert loss_of(name, pairs_of(p, jnp.bfloat16), given).dtype == jnp.float32


@pytest.mark.parametrize("mean", [-1e-12, -1e-7, -1e-3, -0.69, -0.7, -5.0, -20.0, -300.0])
def test_odds_of_near_certain_completions(mean):
    """float32 keeps the odds where 1 - exp(mean) rounds to nothing; log(p / (1 - p)) by a series or by expm1."""
    a, zero = jnp.full(1, mean, jnp.float32), jnp.zeros(1, jnp.float32)
    exact = -np.log(np.expm1(-mean)) if mean > -30 else mean  # of the odds 1 / (exp(-a) - 1)
    pairs = Pairs(a, zero - 1, zero, zero, zero + 1, zero + 1)
    log_odds = exact + np.log(np.expm1(1.0))
    np.testing.assert_allclose(loss_of("orpo", pairs, {"beta": 1.0}), np.logaddexp(0, -log_odds), rtol=2e-5)
    slope = -1 / (1 + np.exp(log_odds)) / -np.expm1(mean)
    grads = gradient("orpo", pairs, {"beta": 1.0})[1]
    np.testing.assert_allclose(grads["chosen"], slope, rtol=2e-5)


# Columns.


@pytest.mark.parametrize("name", BY_RANK)
def test_ranks_of_a_batch_survive_micro_batches_padding_and_order(name):
    p = numbers(4)
    given = {"beta": 0.4, "label_smoothing": 0.1}
    expected = oracle(name, p, **given).sum()
    padded = {f: np.insert(p[f], [0, 5, N], 77.0 if "tokens" not in f else 0) for f in p}
    mask = np.insert(np.ones(N, bool), [0, 5, N], False)
    order = np.random.default_rng(0).permutation(N + 3)
    pairs, mask = pairs_of({f: x[order].reshape(5, 3) for f, x in padded.items()}), jnp.asarray(mask[order])
    columns = LOSSES[name].score(pairs, mask.reshape(5, 3))
    assert set(columns) == set(LOSSES[name].columns)
    assert all((np.asarray(c)[~np.asarray(mask).reshape(5, 3)] == 0).all() for c in columns.values())

    def total(sides, i):
        piece = jax.tree.map(lambda leaf: leaf[i], replace(pairs, **sides))
        losses = combine(piece, ((name, 1.0),), {**given, **{k: c[i] for k, c in columns.items()}})
        return jnp.where(mask.reshape(5, 3)[i], losses, 0).sum()

    sides = {"chosen": pairs.chosen, "rejected": pairs.rejected}
    values, grads = zip(*(jax.value_and_grad(total)(sides, i) for i in range(5)), strict=True)
    assert sum(values) == pytest.approx(expected, rel=1e-13)
    for field in ("chosen", "rejected"):
        found = sum(np.asarray(g[field]) for g in grads).ravel()
        want = np.insert(derivatives(lambda q: oracle(name, q, **given), p, field), [0, 5, N], 0.0)[order]
        np.testing.assert_allclose(found, want, rtol=1e-11)


def test_tokens_past_the_shorter_completion():
    """LD-DPO: with the sums in the paper's two parts."""
    rng = np.random.default_rng(0)
    logps, lengths, alpha = rng.uniform(-3, 0, (2, 9)), (9, 4), 0.3
    position = jnp.arange(9)[None].repeat(2, 0)
    weights = (position < jnp.array(lengths)[:, None]).astype(jnp.float64)
    found = (ld_weights(weights, position, jnp.full((2, 1), 4), alpha) * logps).sum(1)
    np.testing.assert_allclose(found, [logps[0, :4].sum() + alpha * logps[0, 4:].sum(), logps[1, :4].sum()])
    np.testing.assert_array_equal(ld_weights(weights, position, jnp.full((2, 1), 4), 1.0), weights)


def test_weights_of_how_likely_the_policy_is_to_say_it():
    """WPO: the geometric mean of p / sum p^2 over the completion's tokens, without a gradient."""
    p, squares = np.array([0.5, 0.2, 0.9]), np.array([0.4, 0.3, 0.85])
    sums = (jnp.log(p).sum()[None], jnp.log(squares).sum()[None], jnp.array([3]))
    np.testing.assert_allclose(wpo_weight(*sums), [np.prod(p / squares) ** (1 / 3)])
    assert jax.grad(lambda x: wpo_weight(x, *sums[1:]).sum())(sums[0]) == 0


# The table.


def test_weighted_sums_take_each_their_own_numbers():
    pairs, delta = pairs_of(numbers(5)), jnp.linspace(-1, 1, N)
    given = {"beta": 0.2, "label_smoothing": 0.1, "delta": delta, "simpo_gamma": 3.0}
    found = combine(pairs, (("sigmoid", 0.8), ("bco_pair", 0.2), ("cdpo", -1.5)), given)
    parts = formulas.dpo(pairs, beta=0.2), formulas.bco_pair(pairs, beta=0.2, delta=delta)
    third = formulas.cdpo(pairs, beta=0.2, label_smoothing=0.1)
    np.testing.assert_allclose(found, 0.8 * parts[0] + 0.2 * parts[1] - 1.5 * third, rtol=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_the_table_says_what_the_functions_take(name):
    loss = LOSSES[name]
    taken = dict(inspect.signature(loss.function).parameters)
    assert next(iter(taken)) == ("pairs" if loss.paired else "examples")
    assert set(list(taken)[1:]) == {"beta", *loss.constants, *loss.columns}
    for key, constant in loss.constants.items():
        assert taken[key].default == constant.default
        assert constant.allows(constant.default)
    assert not (loss.divergence and not loss.reference)


def test_intervals():
    half_open = Constant(0.0, 0.0, 0.5, "[)")
    assert [half_open.allows(x) for x in (-0.1, 0.0, 0.49, 0.5, math.nan)] == [False, True, True, False, False]
    assert [Constant(1.0, 0.0, 1.0, "(]").allows(x) for x in (0.0, 0.5, 1.0, 1.1)] == [False, True, True, False]
    assert (str(half_open), str(BETA)) == ("[0, 0.5)", "(0, inf)")
    assert not BETA.allows(0.0)
    assert not BETA.allows(math.inf)


def test_metrics_count_real_pairs_only():
    p = {f: np.append(x, 0 if "tokens" in f else np.nan) for f, x in numbers(6).items()}
    found = reward_metrics(pairs_of(p), jnp.arange(N + 1) < N, beta=0.1)
    w, l = (0.1 * (p[side] - p[f"ref_{side}"])[:N] for side in ("chosen", "rejected"))  # noqa: E741
    want = {
        "rewards/chosen": w,
        "rewards/rejected": l,
        "rewards/margins": w - l,
        "rewards/accuracies": w > l,
        "logps/chosen": p["chosen"][:N],
        "logps/rejected": p["rejected"][:N],
    }
    assert found.keys() == want.keys()
    for name, (total, weight) in found.items():
        assert weight == N
        np.testing.assert_allclose(total, want[name].sum(), rtol=1e-13, err_msg=name)


def test_pairs_are_a_tree_of_any_shape():
    pairs = pairs_of({f: x.reshape(3, 4) for f, x in numbers().items()})
    flat = jax.tree.map(jnp.ravel, pairs)
    whole = formulas.ipo(pairs, beta=0.1)
    np.testing.assert_allclose(whole.ravel(), formulas.ipo(flat, beta=0.1))
    np.testing.assert_allclose(jax.vmap(lambda x: formulas.ipo(x, beta=0.1))(pairs), whole)
    assert float(formulas.dpo(jax.tree.map(lambda x: x[0, 0], pairs), beta=0.1)) > 0
