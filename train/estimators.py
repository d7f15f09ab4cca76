"""What fewer samples of a prompt would have given, without bias, from all that there are."""

from collections import Counter
from collections.abc import Hashable, Sequence
from math import comb, log

import numpy as np
from jaxtyping import Bool, Float, Num


def sizes(samples: int) -> list[int]:
    """1, 2, 4, ... and the number of samples itself."""
    return [2**i for i in range((samples - 1).bit_length())] + [samples] if samples else []


def pass_at_k(passed: Bool[np.ndarray, " K"], k: int) -> float:
    """The chance that one of k samples passes: 1 - C(K - c, k) / C(K, k) (Chen et al. 2021, arXiv 2107.03374)."""
    total = _subsets(len(passed), k)
    return 1 - comb(len(passed) - int(passed.sum()), k) / total


def best_of_n(scores: Num[np.ndarray, " K"], n: int) -> float:
    """The expected highest score of n samples: the i-th lowest of K is the highest of C(i - 1, n - 1) subsets."""
    total = _subsets(len(scores), n)
    return sum(comb(i, n - 1) / total * float(score) for i, score in enumerate(np.sort(scores)))


def majority_at_k(answers: Sequence[Hashable | None], passed: Bool[np.ndarray, " K"], k: int) -> float:
    """The chance that the commonest answer of k samples passes; of equally common ones any may stand for them.

    None is no answer: such a sample has no vote. Where one answer has both passed and not, its share counts.
    """
    total = _subsets(len(answers), k)
    counts = Counter(answers)
    silent, result = counts.pop(None, 0), 0.0
    for answer, count in counts.items():
        share = float(np.mean([ok for one, ok in zip(answers, passed, strict=True) if one == answer]))
        others = [other for one, other in counts.items() if one != answer]
        for votes in range(1, min(count, k) + 1) if share else ():
            # ways[ties][n]: to choose n other samples of which no answer has more votes, and `ties` have as many
            ways = {0: [comb(silent, n) for n in range(k - votes + 1)]}
            for other in others:
                ways = _add_answer(ways, other, votes)
            chosen = sum(ways[ties][k - votes] / (ties + 1) for ties in ways)
            result += share * comb(count, votes) * chosen / total
    return result


def _add_answer(ways: dict[int, list[int]], count: int, votes: int) -> dict[int, list[int]]:
    """The ways with one more answer among the others: `count` samples, at most `votes` of them chosen."""
    found: dict[int, list[int]] = {}
    for ties, before in ways.items():
        for more in range(min(count, votes) + 1):
            row = found.setdefault(ties + (more == votes), [0] * len(before))
            for n in range(len(before) - more):
                row[n + more] += before[n] * comb(count, more)
    return found


def best_of_k_policy(policy: Float[np.ndarray, " V"], scores: Num[np.ndarray, " V"], k: int) -> Float[np.ndarray, " V"]:
    """The distribution of the best of k draws; of draws with equal scores any may be taken."""
    below = np.array([policy[scores < score].sum() for score in scores])
    level = np.array([policy[scores == score].sum() for score in scores])
    return policy / level * ((below + level) ** k - below**k)


def kl_bound(k: int) -> float:
    """Nats that the best of k samples is away from the policy, at most: log k - (k - 1) / k (arXiv 2401.01879)."""
    return log(k) - (k - 1) / k


def _subsets(samples: int, k: int) -> int:
    if not 1 <= k <= samples:
        raise ValueError(f"of {samples} samples {k} cannot be drawn: allowed are 1 to {samples}")
    return comb(samples, k)
