"""The loss of pairs: token log-probs of packed rows to numbers per completion, to one loss a pair."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from model.architecture import Architecture
from model.head import head_of, token_logprobs
from model.transformer import Compute, forward
from train.losses.pairs import Pairs, diverge, ld_weights, per_token, reward_metrics
from train.losses.preference import LOSSES, combine
from train.step import Batch, Norms, Sums


def by_branch(
    values: Float[Array, "B T"], segments: Int[Array, "B T"], branches: Int[Array, "B T"], count: int = 2
) -> Float[Array, "B S {count}"]:
    """Sums over each of a segment's `count` branches, which have a token each: so S = T / count is enough."""
    B, T = values.shape
    S = T // count
    at = jnp.where(branches > 0, (segments - 1) * count + branches - 1, S * count)
    rows = jnp.arange(B)[:, None]
    return jnp.zeros((B, S * count), values.dtype).at[rows, at].add(values, mode="drop").reshape(B, S, count)


def pair_mask(batch: Batch) -> Bool[Array, "B S"]:
    """Which places hold a pair."""
    return by_branch(batch["weights"], batch["segments"], batch["branches"]).min(-1) > 0


def pair_weights(batch: Batch) -> Norms:
    """The denominators: pairs, and tokens of chosen completions (for a likelihood term)."""
    chosen = jnp.where(batch["branches"] == 1, batch["weights"], 0)
    return {"pairs": pair_mask(batch).sum(dtype=chosen.dtype), "chosen_tokens": chosen.sum()}


def policy_logprobs(
    params: Any, batch: Batch, *, arch: Architecture, compute: Compute, chunk: int
) -> Float[Array, "B T"]:
    """log p of every target, in nats."""
    hidden = forward(
        arch, compute, params, batch["tokens"], batch["positions"], batch["segments"], batch.get("branches")
    )
    return token_logprobs(hidden, head_of(arch, params), batch["targets"], chunk)


def pairs_of(logprobs: Float[Array, "B T"], batch: Batch, ld_alpha: float = 1.0) -> Pairs:
    """Completions' sums, the policy's and (from the column ref_logprobs, else 0) the reference's, [B, S]."""
    segments, branches, weights = batch["segments"], batch["branches"], batch["weights"]
    counts = by_branch(weights, segments, branches)
    if ld_alpha != 1:
        least = jnp.take_along_axis(counts.min(-1), jnp.maximum(segments - 1, 0), axis=1)
        # positions in the completion: weights before this one in its branch
        weights = ld_weights(weights, _place(batch), least.astype(jnp.int32), ld_alpha)
    sums = by_branch(logprobs * weights, segments, branches)
    reference = batch.get("ref_logprobs")
    ref = jnp.zeros_like(sums) if reference is None else by_branch(reference * weights, segments, branches)
    return Pairs(sums[..., 0], sums[..., 1], ref[..., 0], ref[..., 1], counts[..., 0], counts[..., 1])


def _place(batch: Batch) -> Int[Array, "B T"]:
    """The number of each token in its completion, from 0."""
    learnt = (batch["weights"] > 0).astype(jnp.int32)
    before = jnp.cumsum(learnt, axis=1) - learnt
    new = (batch["branches"] != jnp.roll(batch["branches"], 1, axis=1)).at[:, 0].set(True)
    start = jnp.where(new, before, 0)
    return before - jnp.maximum.accumulate(start, axis=1)


def pair_loss(
    params: Any,
    batch: Batch,
    norms: Norms,
    *,
    arch: Architecture,
    compute: Compute,
    terms: Sequence[tuple[str, float]],
    constants: Mapping[str, float],
    sft_weight: float = 0.0,
    ld_alpha: float = 1.0,
    divergence: tuple[str, float] = ("reverse_kl", 0.5),
    chunk: int = 512,
) -> tuple[Float[Array, ""], Sums]:
    """Mean over pairs of the weighted losses `terms`, and sft_weight * mean -log p of chosen tokens, in nats."""
    logprobs = policy_logprobs(params, batch, arch=arch, compute=compute, chunk=chunk)
    pairs, mask = pairs_of(logprobs, batch, ld_alpha), pair_mask(batch)
    compared = pairs if divergence[0] == "reverse_kl" else diverge(pairs, *divergence)
    losses = jnp.where(mask, combine(compared, terms, {**constants, **_columns(batch, terms)}), 0)
    total, count = losses.sum(), mask.sum(dtype=losses.dtype)
    chosen = jnp.where(batch["branches"] == 1, batch["weights"], 0)
    likelihood = -(logprobs * chosen).sum()
    objective = total / norms["pairs"]
    if sft_weight:
        objective += sft_weight * likelihood / norms["chosen_tokens"]
    means = all(LOSSES[name].token_means for name, _ in terms)
    metrics = reward_metrics(per_token(pairs) if means else pairs, mask, beta=constants["beta"])
    return objective, {"loss": (total, count), "nll_loss": (likelihood, chosen.sum()), **metrics}


def _columns(batch: Batch, terms: Sequence[tuple[str, float]]) -> dict[str, Array]:
    names = {column for name, _ in terms for column in LOSSES[name].columns}
    return {name: batch[name] for name in names if name in batch}
