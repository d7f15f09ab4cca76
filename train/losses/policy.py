"""Learning by reward: GRPO and its family, on packed rows of a policy's own samples.

First the formulas, on tokens: `ratio` is policy / old policy (of the token, or of its sequence), `logps` log-probs.
Then what binds them to rows: completions are the branches 1, 2, ... of segments, as many as there are.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float, Int

from model.architecture import Architecture
from model.compute import Compute
from train.losses import packed
from train.losses.pairs import wide
from train.step import Batch, Norms, Sums

Values = Float[Array, "*T"]


def clipped(
    ratio: Values, advantages: Values, logps: Values, *, epsilon: float, epsilon_high: float, delta: float | None = None
) -> Values:
    """-min(min(ratio, delta) A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A): arXiv 1707.06347; delta: 2505.07291."""
    capped = ratio if delta is None else jnp.minimum(ratio, delta)
    return -jnp.minimum(capped * advantages, jnp.clip(ratio, 1 - epsilon, 1 + epsilon_high) * advantages)


def cispo(ratio: Values, advantages: Values, logps: Values, *, epsilon_high: float) -> Values:
    """-sg(min(ratio, epsilon_high)) A log p: the weight is cut off, no token's gradient is (arXiv 2506.13585)."""
    return -stop_gradient(jnp.minimum(ratio, epsilon_high)) * advantages * logps


def sapo(
    ratio: Values, advantages: Values, logps: Values, *, sapo_temperature_pos: float, sapo_temperature_neg: float
) -> Values:
    """-(4 / tau) sigmoid(tau (ratio - 1)) A, tau by the sign of A: a soft gate (arXiv 2511.20347)."""
    tau = jnp.where(advantages > 0, sapo_temperature_pos, sapo_temperature_neg).astype(ratio.dtype)
    return -4 / tau * jax.nn.sigmoid(tau * (ratio - 1)) * advantages


def vespo_weight(
    ratio: Values,
    advantages: Values,
    *,
    vespo_k_pos: float,
    vespo_lambda_pos: float,
    vespo_k_neg: float,
    vespo_lambda_neg: float,
) -> Values:
    """ratio^k exp(lambda (1 - ratio)) of a sequence's ratio: 1 at 1, small far from it (arXiv 2602.10693)."""
    k = jnp.where(advantages >= 0, vespo_k_pos, vespo_k_neg).astype(ratio.dtype)
    decay = jnp.where(advantages >= 0, vespo_lambda_pos, vespo_lambda_neg).astype(ratio.dtype)
    return jnp.exp(k * jnp.log(ratio) + decay * (1 - ratio))


def vespo(ratio: Values, advantages: Values, logps: Values, **constants: float) -> Values:
    """-sg(vespo_weight) A log p."""
    return -stop_gradient(vespo_weight(ratio, advantages, **constants)) * advantages * logps


# log(reference / policy) of a token -> an estimate of KL(policy, reference) (Schulman, "Approximating KL Divergence")
KL: dict[str, Callable[[Array], Array]] = {
    "k1": lambda u: -u,
    "k2": lambda u: u**2 / 2,
    "k3": lambda u: jnp.expm1(u) - u,
}


@dataclass(frozen=True)
class PolicyLoss:
    """A loss type: its function of (ratio, advantages, logps); the constants it takes; what the sum over tokens is
    divided by, and whether a token counts 1 / the tokens of its completion."""

    function: Callable[..., Array]
    constants: tuple[str, ...]
    norm: str
    means: bool = False


_CLIP = ("epsilon", "epsilon_high", "delta")
_GATE = ("sapo_temperature_pos", "sapo_temperature_neg")
_GAMMA = ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
POLICY_LOSSES: dict[str, PolicyLoss] = {
    "dapo": PolicyLoss(clipped, _CLIP, "tokens"),
    "bnpo": PolicyLoss(clipped, _CLIP, "tokens"),  # TRL's has a mean for each micro-batch
    "grpo": PolicyLoss(clipped, _CLIP, "sequences", means=True),
    "dr_grpo": PolicyLoss(clipped, _CLIP, "capacity"),
    "luspo": PolicyLoss(clipped, _CLIP, "sequences"),
    "cispo": PolicyLoss(cispo, ("epsilon_high",), "tokens"),
    "sapo": PolicyLoss(sapo, _GATE, "sequences", means=True),
    "vespo": PolicyLoss(vespo, _GAMMA, "tokens"),
}


# Rows.


def sequences_of(batch: Batch) -> Int[Array, "B T"]:
    """The number, in its row, of the completion that each position belongs to; T for those of none."""
    segments, branches = batch["segments"], batch["branches"]
    before = [jnp.pad(x[:, :-1], ((0, 0), (1, 0)), constant_values=-1) for x in (segments, branches)]
    inside = (segments > 0) & (branches > 0)
    starts = inside & ((segments != before[0]) | (branches != before[1]))
    return jnp.where(inside, jnp.cumsum(starts, axis=1) - 1, segments.shape[1])


def totals(values: Float[Array, "B T"], numbers: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """The sum over each position's completion, at each of its positions; 0 outside."""

    def row(values: Array, numbers: Array) -> Array:
        sums = jnp.zeros(len(values) + 1, values.dtype).at[numbers].add(values)
        return sums.at[len(values)].set(0)[numbers]

    return jax.vmap(row)(values, numbers)


def learns(batch: Batch) -> Bool[Array, "*B T"]:
    """Positions with a gradient, where nothing but advantages makes one."""
    return (batch["advantages"] != 0) & (batch["weights"] > 0)


def policy_weights(batch: Batch, *, max_completion_length: int = 1) -> Norms:
    """The denominators: tokens; sequences, with those of which no token counts; capacity, the tokens that they might
    have had; entropy, the tokens of the entropy bonus."""
    weights, numbers = batch["weights"], sequences_of(batch)
    first = jnp.pad(numbers[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts = (numbers < numbers.shape[1]) & (numbers != first)
    sequences = starts.sum(dtype=weights.dtype)
    return {
        "tokens": weights.sum(),
        "sequences": sequences,
        "capacity": sequences * max_completion_length,
        "entropy": (weights * batch.get("entropy_mask", 1.0)).sum(),
    }


def top_entropy_mask(entropies: Float[Array, "B T"], weights: Float[Array, "B T"], share: float) -> Float[Array, "B T"]:
    """1 at the tokens with a weight whose entropy is at or above the quantile 1 - share of them all (linear between
    two), else 0: arXiv 2506.01939."""
    counts = weights > 0
    ordered = jnp.sort(jnp.where(counts, entropies, jnp.inf), axis=None)
    rank = (1 - share) * jnp.maximum(counts.sum() - 1, 0).astype(ordered.dtype)
    low, high = ordered[jnp.floor(rank).astype(jnp.int32)], ordered[jnp.ceil(rank).astype(jnp.int32)]
    between = rank - jnp.floor(rank)
    bound = jnp.where(between == 0, low, low + between * (high - low))
    return (counts & (entropies >= bound)).astype(weights.dtype)


@dataclass(frozen=True)
class Correction:
    """How much a completion counts that another sampler than the trainer has written: trainer / sampler of its tokens
    or of all of it, cut off at low and high ("..._truncate"), or 0 outside ("..._mask")."""

    mode: str = "none"
    low: float | None = None
    high: float | None = None

    def ratios(self, log_ratio: Float[Array, "B T"], numbers: Int[Array, "B T"]) -> Float[Array, "B T"]:
        """At every position; from log(trainer / sampler) of tokens and the numbers of their completions."""
        if self.mode == "none":
            return jnp.ones_like(log_ratio)
        level, kind = self.mode.split("_")
        ratio = jnp.exp(totals(log_ratio, numbers) if level == "sequence" else log_ratio)
        cut = jnp.clip(ratio, self.low, self.high)
        return cut if kind == "truncate" else jnp.where(ratio == cut, ratio, 0)


VESPO_LOW, VESPO_HIGH = math.log(1e-8), 20.0  # a log-ratio beyond counts as this


def policy_loss(
    params: Any,
    batch: Batch,
    norms: Norms,
    *,
    arch: Architecture,
    compute: Compute,
    loss_type: str,
    constants: Mapping[str, Any],
    chunk: int = 512,
    temperature: float = 1.0,
    max_completion_length: int = 1,
    importance_sampling_level: str = "token",
    correction: Correction = Correction(),
    off_policy_mask_threshold: float | None = None,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    use_bias_correction_kl: bool = True,
    entropy_coef: float = 0.0,
) -> tuple[Float[Array, ""], Sums]:
    """The loss of `loss_type`, with its constants, of completions with advantages; + beta KL - entropy_coef entropy.

    In nats, log-probs at the sampling temperature. Columns: advantages; old_logprobs, ref_logprobs, sampler_logprobs
    and entropy_mask if there are such. What a mask leaves out stays in the denominators. The extremes of the ratio are
    those beyond 1.
    """
    logps, entropies = packed.policy_logprobs_and(
        "entropy", params, batch, arch=arch, compute=compute, chunk=chunk, temperature=temperature,
        learn=entropy_coef > 0,
    )  # fmt: skip
    row, weights, numbers = POLICY_LOSSES[loss_type], wide(batch["weights"]), sequences_of(batch)
    advantages, mask = wide(batch["advantages"]), batch.get("entropy_mask", jnp.ones_like(weights))
    old = stop_gradient(logps) if "old_logprobs" not in batch else batch["old_logprobs"]
    sampler = batch.get("sampler_logprobs", old)
    means = weights / jnp.maximum(totals(weights, numbers), 1)  # sums with these are means over a completion's tokens

    corrected = correction.ratios((old - sampler) * weights, numbers)
    moved = (logps - old) * weights
    if importance_sampling_level == "token":
        ratio, shares = jnp.exp(moved), weights
    else:  # shares: a completion counts once, in metrics
        each = means if importance_sampling_level == "sequence" else weights
        ratio, shares = jnp.exp(totals((logps - old) * each, numbers)), means
    if loss_type == "vespo":  # the ratio of the whole sequence to its sampler
        moved = jnp.clip(moved, -VESPO_HIGH, VESPO_HIGH) + jnp.clip(jnp.log(corrected), VESPO_LOW, VESPO_HIGH) * weights
        used, shares = jnp.exp(jnp.clip(totals(moved, numbers), VESPO_LOW, VESPO_HIGH)), means
        losses = row.function(used, advantages, logps, **constants)
    else:
        used = ratio
        losses = row.function(used, advantages, logps, **constants) * corrected
    metrics: dict[str, Any] = clip_metrics(loss_type, used, advantages, shares, constants)
    if off_policy_mask_threshold is not None:
        fell = totals(stop_gradient(sampler - logps) * means, numbers)  # KL(sampler, policy) of a token
        left_out = (advantages < 0) & (fell > off_policy_mask_threshold)
        losses = jnp.where(left_out, 0, losses)
        metrics["off_policy_masked"] = ((left_out * means).sum(), means.sum())
    losses = losses * mask
    if "ref_logprobs" in batch:
        kl = KL[kl_estimator]((batch["ref_logprobs"] - logps) * weights)
        kl = kl * ratio if use_bias_correction_kl else kl
        losses = losses + beta * kl
        metrics["kl"] = ((kl * weights).sum(), weights.sum())
    total = (losses * (means if row.means else weights)).sum()
    objective = total / norms[row.norm]
    if entropy_coef:
        objective -= entropy_coef * (entropies * mask * weights).sum() / norms["entropy"]
    counts = policy_weights(batch, max_completion_length=max_completion_length)
    metrics |= {
        "loss": (total, counts[row.norm]),
        "entropy": ((entropies * weights).sum(), weights.sum()),
        "ratio/mean": ((ratio * shares).sum(), shares.sum()),
        **extremes("ratio", jnp.where(weights > 0, ratio, 1), 1.0),
    }
    if "sampler_logprobs" in batch:
        gap = jnp.abs(old - sampler) * weights
        metrics |= {"sampler_gap/mean": (gap.sum(), weights.sum()), "sampler_gap/max": extremes("", gap, 0.0)["/max"]}
    return objective, metrics


def extremes(name: str, values: Float[Array, "B T"], still: float) -> dict[str, tuple[Array, Array]]:
    """The least and the greatest value, as far as they lie below and above `still`."""
    one = jnp.ones((), values.dtype)
    return {f"{name}/min": (values.min(initial=still), one), f"{name}/max": (values.max(initial=still), one)}


def clip_metrics(
    loss_type: str,
    ratio: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    shares: Float[Array, "B T"],
    constants: Mapping[str, Any],
) -> dict[str, tuple[Array, Array]]:
    """How much of the tokens (or completions) the loss holds back, by TRL's names."""
    mean = lambda x: ((x * shares).sum(), shares.sum())  # noqa: E731
    function = POLICY_LOSSES[loss_type].function
    if function is clipped:
        low = (ratio < 1 - constants["epsilon"]) & (advantages < 0)
        high = (ratio > 1 + constants["epsilon_high"]) & (advantages > 0)
        named = {"low": low, "high": high, "region": low | high}
        return {f"clip_ratio/{name}_mean": mean(x) for name, x in named.items()}
    if function is cispo:
        return {"cispo_clip_ratio": mean((ratio > constants["epsilon_high"]) & (advantages > 0))}
    if function is vespo:
        return {"vespo/phi_seq_mean": mean(vespo_weight(ratio, advantages, **constants))}
    return {}
