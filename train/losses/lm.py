"""The language-model loss: pretraining, continued pretraining and SFT are this; they differ in the weights column."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from model.architecture import Architecture
from model.compute import Compute
from model.head import cross_entropy, head_of
from model.moe import balance_loss, largest_load
from model.moe import z_loss as router_z_loss
from model.transformer import forward, forward_routed
from train.step import Batch, Norms, Sums


def lm_weights(batch: Batch) -> Norms:
    """The one denominator: how many tokens carry loss (their summed weights)."""
    return {"tokens": batch["weights"].sum()}


def lm_loss(
    params: Any,
    batch: Batch,
    norms: Norms,
    *,
    arch: Architecture,
    compute: Compute,
    chunk: int = 512,
    z_loss: float = 0.0,
    router: tuple[float, float] = (0.0, 0.0),
) -> tuple[Float[Array, ""], Sums]:
    """Mean of -log p(target) in nats over the whole batch (TRL's SFTTrainer; z-loss: PaLM, arXiv 2204.02311).

    router: of a mixture of experts, the weights of the load-balance and the z-loss of its routers, which are those of
    each micro-batch, averaged by the tokens that carry loss.
    """
    rows = batch["tokens"], batch["positions"], batch["segments"]
    if arch.experts is None:
        hidden, seen = forward(arch, compute, params, *rows), None
    else:
        hidden, seen = forward_routed(arch, compute, params, *rows)
    head = head_of(arch, params, compute.rules)
    total, correct = cross_entropy(hidden, head, batch["targets"], batch["weights"], chunk, z_loss)
    weight = batch["weights"].sum()
    sums = {"loss": (total, weight), "token_accuracy": (correct, weight)}
    if seen is not None:
        balance, z = balance_loss(seen), router_z_loss(seen)
        total += weight * (router[0] * balance + router[1] * z)
        load = largest_load(seen), jnp.ones_like(weight)
        sums |= {"aux_loss": (balance * weight, weight), "router_z_loss": (z * weight, weight), "expert_load/max": load}
    return total / norms["tokens"], sums
