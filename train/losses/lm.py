"""The language-model loss: pretraining, continued pretraining and SFT are this; they differ in the weights column."""

from typing import Any

from jaxtyping import Array, Float

from model.architecture import Architecture
from model.head import cross_entropy, head_of
from model.transformer import Compute, forward
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
) -> tuple[Float[Array, ""], Sums]:
    """Mean of -log p(target) in nats over the whole batch (TRL's SFTTrainer; z-loss: PaLM, arXiv 2204.02311)."""
    hidden = forward(arch, compute, params, batch["tokens"], batch["positions"], batch["segments"])
    total, correct = cross_entropy(hidden, head_of(arch, params), batch["targets"], batch["weights"], chunk, z_loss)
    weight = batch["weights"].sum()
    return total / norms["tokens"], {"loss": (total, weight), "token_accuracy": (correct, weight)}
