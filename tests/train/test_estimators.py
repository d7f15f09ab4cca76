"""Estimators from K samples: against every subset, closed forms, and a policy that can be counted out."""

from itertools import combinations, product
from math import exp

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from train.estimators import best_of_k_policy, best_of_n, kl_bound, majority_at_k, pass_at_k, sizes


@st.composite
def samples(draw):
    """(scores, answers, k) of up to six samples; some answers are missing."""
    count = draw(st.integers(1, 6))
    scores = draw(arrays(np.float64, count, elements=st.sampled_from([-1.0, 0.0, 0.5, 2.0])))
    return (
        scores,
        draw(st.lists(st.sampled_from([None, *"abc"]), min_size=count, max_size=count)),
        draw(st.integers(1, count)),
    )


def majority(answers, passed):
    """The chance that a vote passes, when every one of the commonest answers is as likely to stand."""
    votes = [one for one in answers if one is not None]
    top = max(map(votes.count, votes), default=0)
    chosen = [one for one in dict.fromkeys(votes) if votes.count(one) == top]
    return sum(passed[one] for one in chosen) / max(1, len(chosen))


@given(samples())
def test_mean_over_all_subsets(drawn):
    scores, answers, k = drawn
    subsets = [list(one) for one in combinations(range(len(scores)), k)]
    passed = scores >= 0.5
    assert best_of_n(scores, k) == pytest.approx(np.mean([scores[one].max() for one in subsets]), abs=1e-9)
    assert pass_at_k(passed, k) == pytest.approx(np.mean([passed[one].any() for one in subsets]), abs=1e-9)
    share = {a: np.mean([ok for b, ok in zip(answers, passed, strict=True) if a == b]) for a in answers}
    due = np.mean([majority([answers[i] for i in one], share) for one in subsets])
    assert majority_at_k(answers, passed, k) == pytest.approx(due, abs=1e-9)


@given(st.integers(1, 60), st.data())
def test_closed_forms(count, data):
    """Ranks: n of 1..K have the expected highest (K + 1) n / (n + 1); passes: one minus the product of Chen et al."""
    n, right = data.draw(st.integers(1, count)), data.draw(st.integers(0, count))
    assert best_of_n(np.random.permutation(count) + 1, n) == pytest.approx((count + 1) * n / (n + 1), rel=1e-9)
    passed = np.arange(count) < right
    due = 1.0 if count - right < n else 1 - np.prod(1 - n / np.arange(count - right + 1, count + 1))
    assert pass_at_k(passed, n) == pytest.approx(due, abs=1e-9)
    assert majority_at_k(["right" if ok else i for i, ok in enumerate(passed)], passed, 1) == pytest.approx(
        right / count, abs=1e-9
    )


def test_unbiased():
    """The mean over every outcome of 4 draws is the truth about 2 of them."""
    policy, scores = np.array([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 3.0])
    due = float(best_of_k_policy(policy, scores, 2) @ scores)
    outcomes = list(product(range(3), repeat=4))
    mean = sum(policy[list(one)].prod() * best_of_n(scores[list(one)], 2) for one in outcomes)
    assert mean == pytest.approx(due, abs=1e-9)


@pytest.mark.parametrize("k", [1, 2, 4, 16])
def test_the_best_of_k_is_within_the_bound_of_the_policy(k):
    """Measured on 40,000 draws of K, and counted out: KL(best of K || policy) <= log K - (K - 1) / K."""
    rng = np.random.default_rng(0)
    policy, scores = rng.dirichlet(np.ones(12)), rng.integers(0, 8, 12).astype(float)
    exact = best_of_k_policy(policy, scores, k)
    assert exact.sum() == pytest.approx(1, abs=1e-9)
    draws = rng.choice(12, (40_000, k), p=policy)
    best = np.take_along_axis(draws, scores[draws].argmax(1)[:, None], 1)[:, 0]
    measured = np.bincount(best, minlength=12) / len(best)
    np.testing.assert_allclose(measured, exact, atol=5 * np.sqrt(0.25 / len(best)))
    for found in (measured, exact):
        some = found > 0
        kl = float((found[some] * np.log(found[some] / policy[some])).sum())
        # of draws 2 N KL(measured || exact) has a chi-squared distribution (11 degrees): above 33 once in 2,000 times
        assert kl <= kl_bound(k) + (33 / (2 * len(best)) if found is measured else 1e-12)
    fine = np.full(2000, 1 / 2000)
    tight = best_of_k_policy(fine, np.arange(2000.0), k)
    assert float((tight * np.log(tight / fine)).sum()) == pytest.approx(kl_bound(k), abs=0.01), "reached in the limit"


def test_sizes():
    assert [sizes(n) for n in (0, 1, 2, 6, 8)] == [[], [1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]
    with pytest.raises(ValueError, match="of 3 samples 4 cannot be drawn"):
        pass_at_k(np.ones(3, bool), 4)
    assert kl_bound(1) == 0 < exp(-kl_bound(2)) < 1
