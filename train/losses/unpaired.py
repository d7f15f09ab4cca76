"""Losses on single completions that are labelled desirable or not: KTO and kin, one loss per completion.

Names as in TRL 1.16, conventions as in train/losses/pairs.py. Means over real completions are made elsewhere.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.nn import sigmoid
from jaxtyping import Array, Bool, Float

from train.losses.pairs import wide
from train.step import Sums


@partial(jax.tree_util.register_dataclass, data_fields=("logps", "ref_logps", "desirable"), meta_fields=())
@dataclass(frozen=True)
class Unpaired:
    """Log-probs of whole completions (sums over tokens), by the policy and by the reference, and their labels."""

    logps: Float[Array, "*P"]
    ref_logps: Float[Array, "*P"]
    desirable: Bool[Array, "*P"]

    @property
    def score(self) -> Array:
        """log(policy / reference); times beta, the implicit reward."""
        return wide(self.logps) - wide(self.ref_logps)


def kto(
    examples: Unpaired,
    *,
    beta: float,
    z0: Float[Array, "*P"] | float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Array, "*P"]:
    """KTO (arXiv 2402.01306, equation 7): rewards on the good side of z0 (`kto_columns`), which gets no gradient."""
    above = beta * (examples.score - jax.lax.stop_gradient(z0))
    good, bad = desirable_weight * sigmoid(-above), undesirable_weight * sigmoid(above)
    return jnp.where(examples.desirable, good, bad)


def apo_zero_unpaired(
    examples: Unpaired, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Float[Array, "*P"]:
    """APO-zero without pairs (arXiv 2408.06266, equation 7): KTO with z0 = 0, so no mismatched completions."""
    return kto(examples, beta=beta, z0=0.0, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)


def kto_columns(
    logps: Float[Array, "*P"], ref_logps: Float[Array, "*P"], mask: Bool[Array, "*P"]
) -> dict[str, Float[Array, "*P"]]:
    """KTO's column: the estimate of KL(policy, reference) from all prompts of a batch, each with another's completion.

    The mean over the mask, at least 0; the same for every completion of the batch.
    """
    score = wide(logps) - wide(ref_logps)
    mean = jnp.where(mask, score, 0).sum() / jnp.maximum(mask.sum(), 1)
    return {"z0": jnp.full_like(score, jnp.maximum(mean, 0))}


def reward_metrics(examples: Unpaired, mask: Bool[Array, "*P"], *, beta: float) -> Sums:
    """TRL's metrics over real completions, as (sum, weight); chosen = desirable.

    TRL's rewards/margins is the difference of the first two averages, which has no weight of its own.
    """
    reward, logps = beta * examples.score, wide(examples.logps)
    sums: dict[str, tuple[Array, Array]] = {}
    for side, real in (("chosen", mask & examples.desirable), ("rejected", mask & ~examples.desirable)):
        count = real.sum(dtype=reward.dtype)
        sums[f"rewards/{side}"] = (jnp.where(real, reward, 0).sum(), count)
        sums[f"logps/{side}"] = (jnp.where(real, logps, 0).sum(), count)
    return sums
