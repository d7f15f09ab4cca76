"""From rewards to advantages: on the host, in float64, over all completions of a rollout at once.

Completions are rows; `groups` says which are of one prompt (any integers, in any order, as many of each as there are).
A reward that is NaN was not judged; a completion that no reward judged has advantage 0 and stays out of every mean.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

EPSILON = 1e-4  # added to standard deviations, as TRL does
FLOOR = 1e-8  # the variance of whitened tokens is at least this, as OpenRLHF has it

Rewards = Float[np.ndarray, "N"]
Groups = Int[np.ndarray, "N"]


def make_advantages(
    rewards: Float[np.ndarray, "N F"],
    weights: Sequence[float],
    groups: Groups,
    lengths: Sequence[int],
    log_ratios: Sequence[np.ndarray] | None = None,
    counted: Bool[np.ndarray, "N"] | None = None,
    *,
    estimator: str = "group",
    scale_rewards: str = "group",
    multi_objective_aggregation: str = "sum_then_normalize",
    normalize_advantages: bool = False,
    reward_clip_range: tuple[float, float] | None = None,
    kl_coef: float = 0.0,
) -> list[np.ndarray]:
    """The advantages of each completion's tokens: all the same, but for estimators with returns of tokens.

    rewards: by F functions, which have weights; lengths: tokens of completions. kl_coef * log_ratios, log(sampling
    policy / reference) of each token, is subtracted from the reward (k1). counted: completions that are learnt from:
    the others stay out where tokens are whitened.
    """
    total = add_rewards(rewards, weights)
    if reward_clip_range is not None:
        total = np.clip(total, *reward_clip_range)
    penalties = [np.zeros(length) for length in lengths]
    if kl_coef:
        assert log_ratios is not None
        penalties = [kl_coef * np.asarray(one, np.float64) for one in log_ratios]
    if estimator in TOKEN_ESTIMATORS:
        total = TOKEN_ESTIMATORS[estimator](total, groups)
        judged = ~np.isnan(total)
        tokens = [returns(reward, one) for reward, one in zip(np.nan_to_num(total), penalties, strict=True)]
        tokens = whiten(tokens, judged if counted is None else judged & counted)
        return [one if known else np.zeros_like(one) for one, known in zip(tokens, judged, strict=True)]
    total = total - np.array([one.sum() for one in penalties])
    if multi_objective_aggregation == "normalize_then_sum":
        each = [scaled(centred(one, groups), deviations(one, groups)) for one in rewards.T]
        found = standardised(add_rewards(np.stack(each, 1), weights))
    else:
        found = ESTIMATORS[estimator](total, groups)
        if estimator == "group" and scale_rewards != "none":
            found = scaled(found, deviations(total, groups if scale_rewards == "group" else np.zeros_like(groups)))
        if normalize_advantages:
            found = standardised(found)
    return [np.full(length, value) for length, value in zip(lengths, np.nan_to_num(found), strict=True)]


def add_rewards(rewards: Float[np.ndarray, "N F"], weights: Sequence[float]) -> Rewards:
    """The weighted sum over functions that judged; NaN where none did."""
    total = np.where(np.isnan(rewards), 0, rewards) @ np.asarray(weights, np.float64)
    return np.where(np.isnan(rewards).all(1), np.nan, total)


def _sums(values: Rewards, groups: Groups) -> tuple[Rewards, Rewards]:
    """(sum over a row's group, how many of it are judged), for every row."""
    _, index = np.unique(groups, return_inverse=True)
    known = ~np.isnan(values)
    total, count = (np.bincount(index, x).astype(np.float64)[index] for x in (np.where(known, values, 0), known))
    return total, count


def means(values: Rewards, groups: Groups) -> Rewards:
    """The mean of each row's group; NaN where none of it is judged."""
    total, count = _sums(values, groups)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def deviations(values: Rewards, groups: Groups) -> Rewards:
    """The standard deviation in each row's group, with Bessel's correction; 0 for fewer than two."""
    squares, count = _sums((values - means(values, groups)) ** 2, groups)
    return np.sqrt(np.divide(squares, count - 1, out=np.zeros_like(squares), where=count > 1))


def centred(values: Rewards, groups: Groups) -> Rewards:
    """What is above the group's mean (GRPO, arXiv 2402.03300)."""
    return values - means(values, groups)


def leave_one_out(values: Rewards, groups: Groups) -> Rewards:
    """What is above the mean of the group's others (RLOO, arXiv 2402.14740); NaN if there are none."""
    total, count = _sums(values, groups)
    return values - np.divide(total - values, count - 1, out=np.full_like(total, np.nan), where=count > 1)


def scaled(values: Rewards, deviation: Rewards) -> Rewards:
    """Divided by a standard deviation, which may be 0."""
    return values / (deviation + EPSILON)


def standardised(values: Rewards) -> Rewards:
    """Mean 0 and standard deviation 1 over all rows."""
    everyone = np.zeros(len(values), np.int64)
    return scaled(centred(values, everyone), deviations(values, everyone))


def returns(reward: float, penalties: Float[np.ndarray, "T"]) -> Float[np.ndarray, "T"]:
    """What is still to come at each token, undiscounted: the reward after the last, less the penalties from it on."""
    return reward - np.cumsum(penalties[::-1])[::-1]


def whiten(tokens: Sequence[np.ndarray], counted: Bool[np.ndarray, "N"]) -> list[np.ndarray]:
    """Mean 0 and variance 1 over all tokens of the rows that are counted (REINFORCE++, arXiv 2501.03262)."""
    every = np.concatenate([one for one, counts in zip(tokens, counted, strict=True) if counts] or [np.zeros(1)])
    mean, scale = every.mean(), np.sqrt(max(every.var(), FLOOR))
    return [(one - mean) / scale for one in tokens]


ESTIMATORS: dict[str, Callable[[Rewards, Groups], Rewards]] = {
    "group": centred,
    "rloo": leave_one_out,
    "reinforce": lambda values, groups: values,
    "reinforce_batch": lambda values, groups: centred(values, np.zeros_like(groups)),
}
TOKEN_ESTIMATORS: dict[str, Callable[[Rewards, Groups], Rewards]] = {
    "reinforce_plus_plus": lambda values, groups: values,
    "reinforce_plus_plus_baseline": centred,
}


def are_flat(totals: Rewards, groups: Groups) -> Bool[np.ndarray, "N"]:
    """Which rows are of a group that says nothing: no two of its rewards differ."""
    return deviations(totals, groups) <= FLOOR


def reward_metrics(rewards: Float[np.ndarray, "N F"], weights: Mapping[str, float], groups: Groups) -> dict[str, float]:
    """Mean and standard deviation of each named reward and of their sum, over what was judged; the share of groups
    whose rewards do not differ, of those that have any. TRL's names."""
    total = add_rewards(rewards, list(weights.values()))
    named = {f"rewards/{name}/": one for name, one in zip(weights, rewards.T, strict=True)}
    made: dict[str, float] = {}
    for name, values in {**named, "reward": total}.items():
        known = values[~np.isnan(values)]
        if len(known):
            mean, std = (f"{name}mean", f"{name}std") if name.endswith("/") else (name, f"{name}_std")
            made |= {mean: float(known.mean()), std: float(known.std(ddof=1)) if len(known) > 1 else 0.0}
    judged = ~np.isnan(total)
    flat = dict(zip(groups[judged].tolist(), are_flat(total[judged], groups[judged]).tolist(), strict=True))
    return {**made, "frac_reward_zero_std": float(np.mean(list(flat.values())))} if flat else made
