"""Losses on pairs of completions, chosen over rejected: formulas on numbers per sequence, one loss per pair.

Names as in TRL 1.16; w = chosen, l = rejected. score = log(policy / reference) of a completion, margin = the score of w
less that of l. Everything is in nats and in float32 at least. Means over real pairs, and data, are made elsewhere.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, relu, sigmoid
from jaxtyping import Array, Bool, Float, Int, Real

from train.step import Sums

FIELDS = ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_tokens", "rejected_tokens")
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def wide(x: Float[Array, "*P"]) -> Float[Array, "*P"]:
    """In float32 at least; float64 stays."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@partial(jax.tree_util.register_dataclass, data_fields=FIELDS, meta_fields=())
@dataclass(frozen=True)
class Pairs:
    """Completions' log-probs (sums over tokens) by the policy and by the reference (0 where unused), and lengths."""

    chosen: Float[Array, "*P"]
    rejected: Float[Array, "*P"]
    ref_chosen: Float[Array, "*P"]
    ref_rejected: Float[Array, "*P"]
    chosen_tokens: Real[Array, "*P"]
    rejected_tokens: Real[Array, "*P"]

    @property
    def scores(self) -> tuple[Array, Array]:
        """log(policy / reference) of chosen and of rejected; times beta, the implicit rewards."""
        return wide(self.chosen) - wide(self.ref_chosen), wide(self.rejected) - wide(self.ref_rejected)

    @property
    def margin(self) -> Array:
        """The score of chosen less that of rejected: what DPO and its kin are functions of."""
        chosen, rejected = self.scores
        return chosen - rejected

    @property
    def policy_margin(self) -> Array:
        """The margin as if there were no reference."""
        return wide(self.chosen) - wide(self.rejected)

    @property
    def ref_margin(self) -> Array:
        """The reference's own margin: margin = policy_margin - ref_margin."""
        return wide(self.ref_chosen) - wide(self.ref_rejected)


# Pairs -> Pairs: what a loss is then applied to.


def per_token(pairs: Pairs) -> Pairs:
    """The same with the mean over a completion's tokens in place of each sum (an empty one counts as one token)."""
    chosen, rejected = jnp.maximum(pairs.chosen_tokens, 1), jnp.maximum(pairs.rejected_tokens, 1)
    return Pairs(
        wide(pairs.chosen) / chosen,
        wide(pairs.rejected) / rejected,
        wide(pairs.ref_chosen) / chosen,
        wide(pairs.ref_rejected) / rejected,
        jnp.ones_like(chosen),
        jnp.ones_like(rejected),
    )


def power(log_p: Float[Array, "*P"], k: float) -> Float[Array, "*P"]:
    """(p^k - 1) / k, log p at k = 0; the exponent stops at 80 as in TRL, since exp(89) is no float32."""
    return log_p if k == 0 else jnp.expm1(jnp.minimum(k * log_p, 80.0)) / k


def diverge(pairs: Pairs, f_divergence_type: str, f_alpha_divergence_coef: float = 0.5) -> Pairs:
    """Scores become f'(policy / reference) of another divergence than reverse KL (arXiv 2309.16240).

    Only for losses with `divergence`: elsewhere a partition function remains. Reward metrics keep the plain pairs.
    """
    powers = {"reverse_kl": 0.0, "forward_kl": -1.0, "alpha_divergence": f_alpha_divergence_coef - 1}
    if f_divergence_type == "js_divergence":
        chosen, rejected = (math.log(2) + log_sigmoid(score) for score in pairs.scores)
    elif f_divergence_type in powers:
        chosen, rejected = (power(score, powers[f_divergence_type]) for score in pairs.scores)
    else:
        raise ValueError(f"f_divergence_type = {f_divergence_type!r}, allowed: {', '.join(DIVERGENCES)}")
    zeros = jnp.zeros_like(chosen)
    return replace(pairs, chosen=chosen, rejected=rejected, ref_chosen=zeros, ref_rejected=zeros)


# The losses. log_sigmoid(-z) = log_sigmoid(z) - z collects terms; 1 - sigmoid(z) is written sigmoid(-z): exact far out.


def _smoothed(z: Array, label_smoothing: float) -> Array:
    """Cross entropy of sigmoid(z) with 1 - label_smoothing: -(1 - e) log_sigmoid(z) - e log_sigmoid(-z), collected."""
    return label_smoothing * z - log_sigmoid(z)


def dpo(pairs: Pairs, *, beta: float) -> Float[Array, "*P"]:
    """DPO, loss type `sigmoid` (arXiv 2305.18290)."""
    return -log_sigmoid(beta * pairs.margin)


def sigmoid_norm(pairs: Pairs, *, beta: float) -> Float[Array, "*P"]:
    """DPO on mean log-probs (Tulu 3, arXiv 2411.15124)."""
    return dpo(per_token(pairs), beta=beta)


def hinge(pairs: Pairs, *, beta: float) -> Float[Array, "*P"]:
    """SLiC's hinge, with RSO's normalisation (arXiv 2305.10425, 2309.06657)."""
    return relu(1 - beta * pairs.margin)


def ipo_sum(pairs: Pairs, *, beta: float) -> Float[Array, "*P"]:
    """IPO, equation 17, as printed: beta is its tau (arXiv 2310.12036)."""
    return (pairs.margin - 1 / (2 * beta)) ** 2


def ipo(pairs: Pairs, *, beta: float) -> Float[Array, "*P"]:
    """IPO on mean log-probs, as its authors ran it, says TRL (arXiv 2310.12036)."""
    return ipo_sum(per_token(pairs), beta=beta)


def exo_pair(pairs: Pairs, *, beta: float, label_smoothing: float = 1e-3) -> Float[Array, "*P"]:
    """EXO for pairs, reverse KL to (1 - e, e) (arXiv 2402.00856, equation 16); e is the paper's, TRL's 0 is no loss."""
    z = beta * pairs.margin
    won, lost = log_sigmoid(z), log_sigmoid(-z)
    return jnp.exp(won) * (won - math.log1p(-label_smoothing)) + jnp.exp(lost) * (lost - math.log(label_smoothing))


def nca_pair(pairs: Pairs, *, beta: float) -> Float[Array, "*P"]:
    """NCA for pairs (arXiv 2402.05369)."""
    chosen, rejected = (beta * score for score in pairs.scores)
    return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


def robust(pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Float[Array, "*P"]:
    """Robust DPO: unbiased if a share label_smoothing < 1/2 of the labels is flipped (arXiv 2403.00409)."""
    z = beta * pairs.margin  # ((1 - e) (-log_sigmoid(z)) - e (-log_sigmoid(-z))) / (1 - 2e), collected
    return -log_sigmoid(z) - label_smoothing / (1 - 2 * label_smoothing) * z


def cdpo(pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Float[Array, "*P"]:
    """Conservative DPO: label smoothing (Mitchell 2023, 'A note on DPO with noisy preferences')."""
    return _smoothed(beta * pairs.margin, label_smoothing)


def bco_pair(pairs: Pairs, *, beta: float, delta: Float[Array, "*P"] | float = 0.0) -> Float[Array, "*P"]:
    """BCO (arXiv 2404.04656); delta: the running mean of all rewards, beta included (TRL has none)."""
    chosen, rejected = pairs.scores
    return -log_sigmoid(beta * chosen - delta) - log_sigmoid(delta - beta * rejected)


def sppo_hard(pairs: Pairs, *, beta: float) -> Float[Array, "*P"]:
    """SPPO with win probabilities 1 and 0 (arXiv 2405.00675, equation 4.7)."""
    chosen, rejected = pairs.scores
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def aot(
    pairs: Pairs, *, beta: float, matched_ref: Float[Array, "*P"], label_smoothing: float = 0.0
) -> Float[Array, "*P"]:
    """AOT, paired (arXiv 2406.05882): margins, less reference margins of the same rank (`aot_columns`)."""
    return _smoothed(beta * (pairs.policy_margin - matched_ref), label_smoothing)


def aot_unpaired(
    pairs: Pairs,
    *,
    beta: float,
    matched_rejected: Float[Array, "*P"],
    matched_chosen: Float[Array, "*P"],
    label_smoothing: float = 0.0,
) -> Float[Array, "*P"]:
    """AOT, unpaired (arXiv 2406.05882): scores of chosen, less scores of rejected of the same rank.

    A loss belongs to two pairs, perhaps in two micro-batches: each carries half of its value and its own gradient.
    """
    chosen, rejected = pairs.scores
    both = _smoothed(beta * (chosen - matched_rejected), label_smoothing)
    both += _smoothed(beta * (matched_chosen - rejected), label_smoothing)
    return both - jax.lax.stop_gradient(both) / 2


def apo_zero(pairs: Pairs, *, beta: float) -> Float[Array, "*P"]:
    """APO-zero: chosen up, rejected down (arXiv 2408.06266, equation 7)."""
    chosen, rejected = pairs.scores
    return sigmoid(-beta * chosen) + sigmoid(beta * rejected)


def apo_down(pairs: Pairs, *, beta: float) -> Float[Array, "*P"]:
    """APO-down: both down, rejected more (arXiv 2408.06266, equation 8)."""
    return sigmoid(beta * pairs.scores[0]) + sigmoid(-beta * pairs.margin)


def discopop(pairs: Pairs, *, beta: float, discopop_tau: float = 0.05) -> Float[Array, "*P"]:
    """DiscoPOP: logistic and exponential loss, blended (arXiv 2406.08414, equation 5)."""
    z = beta * pairs.margin
    g = z / discopop_tau
    # exp(-z) times sigmoid(g) in one exponent: apart they are infinity times 0 where z << 0
    return -sigmoid(-g) * log_sigmoid(z) + jnp.exp(log_sigmoid(g) - z)


# Without a reference.


def cpo(pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Float[Array, "*P"]:
    """CPO's preference term (arXiv 2401.08417)."""
    return _smoothed(beta * pairs.policy_margin, label_smoothing)


def alphapo(
    pairs: Pairs, *, beta: float, simpo_gamma: float = 0.5, alpha: float = 0.0, label_smoothing: float = 0.0
) -> Float[Array, "*P"]:
    """AlphaPO: SimPO with rewards (1 - p^-alpha) / alpha, log p at 0; p of the mean log-prob (arXiv 2501.03884)."""
    means = per_token(pairs)
    z = beta * (power(means.chosen, -alpha) - power(means.rejected, -alpha)) - simpo_gamma
    return _smoothed(z, label_smoothing)


def simpo(pairs: Pairs, *, beta: float, simpo_gamma: float = 0.5, label_smoothing: float = 0.0) -> Float[Array, "*P"]:
    """SimPO (arXiv 2405.14734, with beta from 2 to 10); simpo_gamma is a margin of rewards, after beta."""
    return alphapo(pairs, beta=beta, simpo_gamma=simpo_gamma, label_smoothing=label_smoothing)


def _log_odds(log_p: Array) -> Array:
    """log(p / (1 - p)) of log p <= 0; p = 1 counts as the next p below, finer than a mean of log-probs can tell."""
    log_p = jnp.minimum(log_p, -(jnp.finfo(log_p.dtype).eps ** 2))
    return log_p - jnp.log(-jnp.expm1(log_p))


def orpo(pairs: Pairs, *, beta: float) -> Float[Array, "*P"]:
    """ORPO's odds-ratio term, beta included (the paper's lambda), of mean log-probs (arXiv 2403.07691)."""
    means = per_token(pairs)
    return -beta * log_sigmoid(_log_odds(means.chosen) - _log_odds(means.rejected))


# Columns: what must be known of the whole batch, or of single tokens, before pairs are cut into micro-batches.


def _match(x: Array, y: Array, mask: Array) -> Array:
    """For each real x the real y of the same rank, no gradient; 0 where the mask is false."""
    flat = [jnp.ravel(a) for a in (x, y, mask)]
    order_x, order_y = (jnp.lexsort((a, ~flat[2])) for a in flat[:2])  # the real ones come first in both
    matched = jnp.zeros_like(flat[1]).at[order_x].set(flat[1][order_y])
    return jax.lax.stop_gradient(jnp.where(flat[2], matched, 0).reshape(x.shape))


def aot_columns(pairs: Pairs, mask: Bool[Array, "*P"]) -> dict[str, Float[Array, "*P"]]:
    """`aot`'s column from all pairs of a batch, under the policy as it is now."""
    return {"matched_ref": _match(pairs.policy_margin, pairs.ref_margin, mask)}


def aot_unpaired_columns(pairs: Pairs, mask: Bool[Array, "*P"]) -> dict[str, Float[Array, "*P"]]:
    """`aot_unpaired`'s columns from all pairs of a batch, under the policy as it is now."""
    chosen, rejected = pairs.scores
    return {"matched_rejected": _match(chosen, rejected, mask), "matched_chosen": _match(rejected, chosen, mask)}


def ld_weights(
    weights: Float[Array, "*T"], position: Int[Array, "*#T"], shared: Int[Array, "*#T"], ld_alpha: float
) -> Float[Array, "*T"]:
    """LD-DPO's token weights (arXiv 2409.06411): tokens past the shorter completion's length count ld_alpha.

    position: from 0 in the completion; shared: the lesser of the pair's lengths. Meant for the reference's sums too.
    """
    return jnp.where(position < shared, weights, ld_alpha * weights)


def wpo_weight(
    logprobs: Float[Array, "*P"], log_sum_squares: Float[Array, "*P"], tokens: Real[Array, "*P"]
) -> Float[Array, "*P"]:
    """WPO's weight of a completion (arXiv 2406.11827); a pair's loss is multiplied by both of its weights.

    From sums over its tokens: log p of the token, and log of the sum of p^2 over the vocabulary (policy, no gradient).
    """
    return jax.lax.stop_gradient(jnp.exp((wide(logprobs) - wide(log_sum_squares)) / jnp.maximum(tokens, 1)))


def reward_metrics(pairs: Pairs, mask: Bool[Array, "*P"], *, beta: float) -> Sums:
    """TRL's metrics over real pairs, as (sum, weight); `per_token(pairs)` where the loss type has `token_means`."""
    chosen, rejected = (beta * score for score in pairs.scores)
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": chosen > rejected,
        "logps/chosen": wide(pairs.chosen),
        "logps/rejected": wide(pairs.rejected),
    }
    count = mask.sum(dtype=chosen.dtype)
    return {name: (jnp.where(mask, x, 0).sum(dtype=chosen.dtype), count) for name, x in values.items()}
