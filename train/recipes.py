"""The table objective -> what it needs. NOTHING else branches on the objective."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from configs.schema import Objective
from model.architecture import Architecture
from model.transformer import Compute
from train.losses.lm import lm_loss, lm_weights
from train.step import Loss, Weights


@dataclass(frozen=True)
class Recipe:
    """One objective: the loss with its constants bound, and its denominators."""

    loss: Loss
    weights: Weights


def _sft(objective: Objective, arch: Architecture, compute: Compute) -> Recipe:
    return Recipe(
        partial(lm_loss, arch=arch, compute=compute, chunk=objective.loss_chunk, z_loss=objective.z_loss), lm_weights
    )


RECIPES: dict[str, Callable[[Objective, Architecture, Compute], Recipe]] = {"sft": _sft}


def make_recipe(objective: Objective, arch: Architecture, compute: Compute) -> Recipe:
    """The row of the table for this objective."""
    return RECIPES[objective.type](objective, arch, compute)
