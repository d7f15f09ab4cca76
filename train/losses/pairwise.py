"""Learning from preferences: the losses of packed pairs, and of packed single completions with a label."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from model.architecture import Architecture
from model.compute import Compute
from train.losses import packed, unpaired
from train.losses.pairs import diverge, per_token, reward_metrics
from train.losses.preference import LOSSES, combine
from train.step import Batch, Norms, Sums

Terms = Sequence[tuple[str, float]]


def pair_loss(
    params: Any,
    batch: Batch,
    norms: Norms,
    *,
    arch: Architecture,
    compute: Compute,
    terms: Terms,
    constants: Mapping[str, float],
    sft_weight: float = 0.0,
    sft_tokens: str = "completion",
    ld_alpha: float = 1.0,
    divergence: tuple[str, float] = ("reverse_kl", 0.5),
    use_weighting: bool = False,
    chunk: int = 512,
) -> tuple[Float[Array, ""], Sums]:
    """Mean over pairs of the weighted losses `terms`, and sft_weight * mean -log p of chosen completions' tokens (their
    prompts' too if sft_tokens is "sequence"), in nats. use_weighting: each pair's losses times its WPO weight."""
    weights = packed.likelihood_weights(batch, sft_tokens)
    forward = {"arch": arch, "compute": compute, "chunk": chunk, "where": (weights > 0) | (batch["weights"] > 0)}
    if use_weighting:
        logprobs, squares = packed.policy_logprobs_and("squares", params, batch, **forward)
        pair_weights = packed.pair_wpo_weights(logprobs, squares, batch)
    else:
        logprobs, pair_weights = packed.policy_logprobs(params, batch, **forward), 1.0
    pairs, mask = packed.pairs_of(logprobs, batch, ld_alpha), packed.pair_mask(batch)
    compared = pairs if divergence[0] == "reverse_kl" else diverge(pairs, *divergence)
    losses = pair_weights * combine(compared, terms, {**constants, **_columns(batch, terms)})
    losses = jnp.where(mask, losses, 0)
    total, count = losses.sum(), mask.sum(dtype=losses.dtype)
    likelihood = -(logprobs * weights).sum()
    objective = total / norms["pairs"]
    if sft_weight:
        objective += sft_weight * likelihood / norms[sft_tokens]
    seen = per_token(pairs) if all(LOSSES[name].token_means for name, _ in terms) else pairs
    metrics = {
        "loss": (total, count),
        "nll_loss": (likelihood, weights.sum()),
        **reward_metrics(seen, mask, beta=constants["beta"]),
        **packed.drift(logprobs, batch, jnp.where(batch["branches"] > 0, batch["weights"], 0)),
        "length/chosen": (jnp.where(mask, pairs.chosen_tokens, 0).sum(), count),
        "length/rejected": (jnp.where(mask, pairs.rejected_tokens, 0).sum(), count),
    }
    for name, score in zip(("chosen", "rejected"), seen.scores, strict=True):
        metrics[f"rewards/{name}_histogram"] = packed.histogram(constants["beta"] * score, mask)
    if "ref_logprobs" in batch:
        fell = (pairs.scores[0] < 0) & (pairs.scores[1] < 0) & mask
        metrics["rewards/both_fell"] = (fell.sum(dtype=losses.dtype), count)
    return objective, metrics


def single_loss(
    params: Any,
    batch: Batch,
    norms: Norms,
    *,
    arch: Architecture,
    compute: Compute,
    terms: Terms,
    constants: Mapping[str, float],
    branches: int = 2,
    chunk: int = 512,
) -> tuple[Float[Array, ""], Sums]:
    """Mean over labelled completions of the weighted losses `terms`; z0, if they need it, is a column."""
    logprobs = packed.policy_logprobs(params, batch, arch=arch, compute=compute, chunk=chunk)
    (examples, _), mask = packed.singles_of(logprobs, batch, branches), packed.single_mask(batch, branches)
    losses = jnp.where(mask, combine(examples, terms, {**constants, **_columns(batch, terms)}), 0)
    total, count = losses.sum(), mask.sum(dtype=losses.dtype)
    beta = constants["beta"]
    metrics = {
        "loss": (total, count),
        **unpaired.reward_metrics(examples, mask, beta=beta),
        **packed.drift(logprobs, batch, jnp.where(batch["branches"] == 1, batch["weights"], 0)),
        "desirable": ((mask & examples.desirable).sum(dtype=losses.dtype), count),
    }
    for name, side in (("chosen", mask & examples.desirable), ("rejected", mask & ~examples.desirable)):
        metrics[f"rewards/{name}_histogram"] = packed.histogram(beta * examples.score, side)
    if "z0" in batch:
        metrics["z0"] = (jnp.where(mask, batch["z0"], 0).sum(), count)
    return total / norms["completions"], metrics


def _columns(batch: Batch, terms: Terms) -> dict[str, Array]:
    names = {column for name, _ in terms for column in LOSSES[name].columns}
    return {name: batch[name] for name in names if name in batch}
