"""Advantages: the definitions written out group by group, and what holds for any rewards."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from train.advantage import (
    are_flat,
    make_advantages,
    reward_metrics,
)

REWARDS = np.array([[1.0, 0.2], [0.0, np.nan], [np.nan, np.nan], [1.0, 0.9], [0.5, 0.5], [0.5, 0.5], [0.0, 0.1]])
GROUPS = np.array([7, 3, 7, 7, 4, 4, 3])  # uneven, out of order
WEIGHTS, LENGTHS = (1.0, 0.5), (2, 1, 3, 1, 2, 1, 4)
TOTAL = np.array([1.1, 0.0, np.nan, 1.45, 0.75, 0.75, 0.05])


def single(rewards=REWARDS, groups=GROUPS, lengths=LENGTHS, log_ratios=None, counted=None, weights=WEIGHTS, **options):
    """An advantage of each completion, whose tokens have the same."""
    made = make_advantages(rewards, weights, groups, lengths, log_ratios, counted, **options)
    assert [len(one) for one in made] == list(lengths)
    assert all((one == one[0]).all() for one in made)
    return np.array([one[0] for one in made])


def spread(values):
    return np.std(values, ddof=1) + 1e-4


def test_group_and_its_scales():
    apart = np.array([1.1 - 1.275, 0.0 - 0.025, 0.0, 1.45 - 1.275, 0.0, 0.0, 0.05 - 0.025])
    np.testing.assert_allclose(single(scale_rewards="none"), apart, atol=1e-12)
    known = TOTAL[~np.isnan(TOTAL)]
    np.testing.assert_allclose(single(scale_rewards="batch"), apart / spread(known), atol=1e-12)
    scale = {7: spread([1.1, 1.45]), 3: spread([0.0, 0.05]), 4: 1e-4}
    np.testing.assert_allclose(single(), apart / [scale[g] for g in GROUPS], atol=1e-12)


def test_normalize_then_sum():
    first = np.array([0, 0, np.nan, 0, 0, 0, 0])  # 1, 1; 0, 0; 0.5, 0.5: no group differs
    low, high = (0.2 - 0.55) / spread([0.2, 0.9]), (0.9 - 0.55) / spread([0.2, 0.9])
    second = np.array([low, 0, np.nan, high, 0, 0, 0])  # 0.1 is alone in its group
    both = first + 0.5 * second
    known = both[~np.isnan(both)]
    want = np.nan_to_num((both - known.mean()) / spread(known))
    np.testing.assert_allclose(single(multi_objective_aggregation="normalize_then_sum"), want, atol=1e-12)


def test_leave_one_out_with_the_kl_in_the_reward():
    ratios = [np.linspace(-1, 1, n) + i for i, n in enumerate(LENGTHS)]
    total = np.clip(TOTAL, 0.02, 1.2) - 0.1 * np.array([one.sum() for one in ratios])
    want = np.array([total[0] - total[3], total[1] - total[6], 0, total[3] - total[0]])
    want = np.concatenate([want, [total[4] - total[5], total[5] - total[4], total[6] - total[1]]])
    options = {"log_ratios": ratios, "estimator": "rloo", "kl_coef": 0.1, "reward_clip_range": (0.02, 1.2)}
    np.testing.assert_allclose(single(**options), want, atol=1e-12)
    known = np.delete(want, 2)
    want = (want - known.mean()) / spread(known)
    want[2] = 0
    np.testing.assert_allclose(single(**options, normalize_advantages=True), want, atol=1e-12)
    alone = single(REWARDS[:2], np.array([0, 1]), (1, 1), estimator="rloo")
    np.testing.assert_array_equal(alone, [0, 0])  # nothing to compare with


def test_reinforce():
    np.testing.assert_allclose(single(estimator="reinforce"), np.nan_to_num(TOTAL), atol=1e-12)
    want = np.nan_to_num(TOTAL - np.nanmean(TOTAL))
    np.testing.assert_allclose(single(estimator="reinforce_batch"), want, atol=1e-12)


@pytest.mark.parametrize("baseline", [False, True])
def test_reinforce_plus_plus(baseline):
    """Returns token by token, whitened over the tokens that are learnt from."""
    ratios = [np.linspace(-0.5, 1, n) for n in LENGTHS]
    counted = np.array([True, True, True, False, True, True, True])
    total = TOTAL - (np.array([1.275, 0.025, 0, 1.275, 0.75, 0.75, 0.025]) if baseline else 0)
    plain = [[total[i] - 0.2 * sum(one[t:]) for t in range(len(one))] for i, one in enumerate(ratios)]
    known = np.concatenate([one for i, one in enumerate(plain) if i not in (2, 3)])
    want = [(np.array(one) - known.mean()) / known.std() for one in plain]
    want[2] = np.zeros(3)
    made = make_advantages(
        REWARDS, WEIGHTS, GROUPS, LENGTHS, ratios, counted, kl_coef=0.2,
        estimator="reinforce_plus_plus_baseline" if baseline else "reinforce_plus_plus",
    )  # fmt: skip
    for one, other in zip(made, want, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)


def test_metrics():
    made = reward_metrics(REWARDS, {"right": 1.0, "short": 0.5}, GROUPS)
    first, second, total = REWARDS[[0, 1, 3, 4, 5, 6], 0], REWARDS[[0, 3, 4, 5, 6], 1], np.delete(TOTAL, 2)
    want = {
        "rewards/right/mean": first.mean(), "rewards/right/std": first.std(ddof=1),
        "rewards/short/mean": second.mean(), "rewards/short/std": second.std(ddof=1),
        "reward": total.mean(), "reward_std": total.std(ddof=1), "frac_reward_zero_std": 1 / 3,
    }  # fmt: skip
    assert made == pytest.approx(want, abs=1e-12)
    assert are_flat(TOTAL, GROUPS).tolist() == [False, False, False, False, True, True, False]
    unjudged = np.full((2, 1), np.nan)
    assert reward_metrics(unjudged, {"right": 1.0}, np.array([0, 0])) == {}
    for estimator in ("group", "rloo", "reinforce", "reinforce_plus_plus", "reinforce_plus_plus_baseline"):
        made = make_advantages(unjudged, (1.0,), np.array([0, 0]), (2, 1), estimator=estimator)
        assert [one.tolist() for one in made] == [[0, 0], [0]]


@st.composite
def rollouts(draw):
    """(rewards, weights, groups, lengths) of 1 to 12 completions by 1 to 3 functions; some are not judged."""
    n, f = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    number = st.one_of(st.just(float("nan")), st.integers(-4, 4).map(lambda x: x / 4))
    rewards = draw(arrays.arrays(np.float64, (n, f), elements=number))
    groups = draw(arrays.arrays(np.int64, n, elements=st.integers(0, 3)))
    return rewards, [1.0, 0.5, 2.0][:f], groups, draw(st.lists(st.integers(1, 4), min_size=n, max_size=n))


@given(rollouts(), st.randoms())
@settings(max_examples=150, deadline=None)
def test_what_holds_for_any_rewards(rollout, random):
    rewards, weights, groups, lengths = rollout
    judged = ~np.isnan(rewards).all(1)
    made = {
        (estimator, scale): make_advantages(*rollout, estimator=estimator, scale_rewards=scale)
        for estimator, scale in (
            ("group", "group"), ("group", "batch"), ("group", "none"), ("rloo", "none"), ("reinforce_batch", "none"),
            ("reinforce_plus_plus", "none"), ("reinforce_plus_plus_baseline", "none"),
        )
    }  # fmt: skip
    each = {key: np.array([one[0] for one in value]) for key, value in made.items()}
    for key, values in each.items():
        assert np.isfinite(values).all(), key
        assert (values[~judged] == 0).all(), key
    for (estimator, _), values in each.items():
        if estimator in ("group", "rloo"):  # a prompt's advantages add up to nothing
            for group in np.unique(groups):
                assert abs(values[groups == group].sum()) < 1e-9
    tokens = np.repeat(judged, lengths)
    whole = np.concatenate(made["reinforce_plus_plus", "none"])[tokens]
    if len(whole):
        assert abs(whole.mean()) < 1e-9
        assert whole.var() == pytest.approx(1) or np.ptp(whole) < 1e-9
    # leave-one-out is what is above the mean, times n / (n - 1)
    counts = np.array([(judged & (groups == group)).sum() for group in groups])
    factor = np.where(counts > 1, counts / np.maximum(counts - 1, 1), 0)
    np.testing.assert_allclose(each["rloo", "none"], factor * each["group", "none"], atol=1e-9)
    # the order of completions is of no account
    order = random.sample(range(len(groups)), len(groups))
    for (estimator, scale), values in each.items():
        moved = make_advantages(
            rewards[order], weights, groups[order], [lengths[i] for i in order],
            estimator=estimator, scale_rewards=scale,
        )  # fmt: skip
        np.testing.assert_allclose([one[0] for one in moved], values[order], atol=1e-9)
    # nor is what a group is called, nor a constant that all judged completions get more
    np.testing.assert_allclose(single_of(rewards, weights, 5 - 2 * groups, lengths), each["group", "group"], atol=1e-9)
    if judged.all() and not np.isnan(rewards).any():
        shifted = single_of(rewards + 0.25, weights, groups, lengths)
        np.testing.assert_allclose(shifted, each["group", "group"], atol=1e-9)


def single_of(*rollout):
    return np.array([one[0] for one in make_advantages(*rollout)])
