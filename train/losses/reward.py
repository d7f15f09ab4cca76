"""Reward models: a score at the end of each completion of a pair, or at the end of each step of a process."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Float

from model.architecture import Architecture
from model.compute import Compute
from model.head import scores
from model.transformer import forward
from train.losses.packed import by_branch, pair_mask
from train.step import Batch, Norms, Sums


def bradley_terry(
    chosen: Float[Array, "*P"],
    rejected: Float[Array, "*P"],
    margin: Float[Array, "*P"] | float = 0.0,
    center_rewards_coefficient: float = 0.0,
) -> Float[Array, "*P"]:
    """-log sigmoid(chosen - rejected - margin) + c (chosen + rejected)^2, a pair's (arXiv 2203.02155; margin: Llama 2,
    2307.09288; centering: 2312.09244), as TRL 1.16."""
    loss = -log_sigmoid(chosen - rejected - margin)
    return loss + center_rewards_coefficient * (chosen + rejected) ** 2


def read_scores(params: Any, batch: Batch, *, arch: Architecture, compute: Compute) -> Float[Array, "B T C"]:
    """What the score head says at every position."""
    hidden = forward(
        arch, compute, params, batch["tokens"], batch["positions"], batch["segments"], batch.get("branches")
    )
    return scores(arch, params, hidden)


def reward_loss(
    params: Any,
    batch: Batch,
    norms: Norms,
    *,
    arch: Architecture,
    compute: Compute,
    center_rewards_coefficient: float = 0.0,
) -> tuple[Float[Array, ""], Sums]:
    """Mean over pairs and over heads of the Bradley-Terry loss; metrics are of the heads' mean, as TRL names them.

    Smallest and largest reward are no averages, so they are not here: `purestep eval` tells them.
    """
    segments, branches, weights = batch["segments"], batch["branches"], batch["weights"]

    def at_ends(values: Float[Array, "B T"]) -> Array:
        return by_branch(values * weights, segments, branches)

    read = read_scores(params, batch, arch=arch, compute=compute)
    rewards = jax.vmap(at_ends, in_axes=-1, out_axes=-1)(read)  # [B, S, 2, C]
    chosen, rejected = rewards[:, :, 0], rewards[:, :, 1]
    margin = at_ends(batch["margins"].astype(read.dtype))[..., :1]
    margin = jnp.broadcast_to(margin, chosen.shape)
    mask = pair_mask(batch)
    losses = jnp.where(mask, bradley_terry(chosen, rejected, margin, center_rewards_coefficient).mean(-1), 0)
    count, better, worse = mask.sum(dtype=losses.dtype), chosen.mean(-1), rejected.mean(-1)
    values = {
        "accuracy": better > worse,
        "margin": better - worse,
        "mean_reward": (better + worse) / 2,
        "rewards/chosen": better,
        "rewards/rejected": worse,
    }
    if arch.num_labels > 1:
        values["rewards/spread"] = rewards.std(-1).mean(-1)
    sums = {name: (jnp.where(mask, x, 0).sum(dtype=losses.dtype), count) for name, x in values.items()}
    return losses.sum() / norms["pairs"], {"loss": (losses.sum(), count), **sums}


def step_weights(batch: Batch) -> Norms:
    """The one denominator: labelled steps."""
    return {"steps": batch["weights"].sum()}


def process_loss(
    params: Any, batch: Batch, norms: Norms, *, arch: Architecture, compute: Compute
) -> tuple[Float[Array, ""], Sums]:
    """Mean over steps of the cross-entropy of bad and good, in nats (arXiv 2305.20050; TRL's PRMTrainer)."""
    odds = read_scores(params, batch, arch=arch, compute=compute)[..., 0]
    good, weights = batch["labels"] > 0, batch["weights"].astype(odds.dtype)
    total = -(weights * log_sigmoid(jnp.where(good, odds, -odds))).sum()
    count, right = weights.sum(), (weights * ((odds > 0) == good)).sum()
    return total / norms["steps"], {
        "loss": (total, count),
        "accuracy": (right, count),
        "good_steps": ((weights * good).sum(), count),
    }
