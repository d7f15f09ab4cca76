"""The table objective -> what it needs. NOTHING else branches on the objective."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from configs.schema import Objective
from model.architecture import Architecture
from model.lora import detach
from model.transformer import Compute
from train.losses import pairwise, reward
from train.losses.lm import lm_loss, lm_weights
from train.losses.preference import LOSSES
from train.step import Batch, Gather, Loss, Score, Weights


@dataclass(frozen=True)
class Recipe:
    """One objective: loss with its constants bound, denominators, columns made before a step."""

    loss: Loss
    weights: Weights
    reference: Callable[[Any, Batch], Any] | None = None  # (params, batch) -> log-probs to keep, where they are
    start: float | None = None  # the loss of a policy that is still its reference
    score: Score | None = None
    gather: Gather | None = None
    outcomes: int | None = None  # that a uniform guess is among; None: the vocabulary


def _sft(objective: Objective, arch: Architecture, compute: Compute) -> Recipe:
    return Recipe(
        partial(lm_loss, arch=arch, compute=compute, chunk=objective.loss_chunk, z_loss=objective.z_loss), lm_weights
    )


def _pairs(objective: Objective, arch: Architecture, compute: Compute) -> Recipe:
    """DPO and its family: objective.loss_type names rows of the table of losses."""
    forward = {"arch": arch, "compute": compute, "chunk": objective.loss_chunk}
    terms, constants = objective.terms, objective.constants
    rows = [LOSSES[name] for name, _ in terms]
    loss = partial(
        pairwise.pair_loss, **forward, terms=terms, constants=constants, sft_weight=objective.sft_weight,
        ld_alpha=objective.ld_alpha, divergence=(objective.f_divergence_type, objective.f_alpha_divergence_coef),
    )  # fmt: skip
    online = objective.reference == "adapterless" and any(row.reference for row in rows)
    ranked = [row.score for row in rows if row.score is not None]

    def score(params: Any, batch: Batch) -> dict[str, Any]:
        made = {}
        if online:
            made["ref_logprobs"] = pairwise.policy_logprobs(detach(params), batch, **forward)
        if ranked:
            made["logprobs"] = pairwise.policy_logprobs(params, batch, **forward)
        return made

    def gather(batch: Batch) -> dict[str, Any]:
        pairs, mask = pairwise.pairs_of(batch["logprobs"], batch, objective.ld_alpha), pairwise.pair_mask(batch)
        return {name: column for make in ranked for name, column in make(pairs, mask).items()}

    keep = partial(pairwise.policy_logprobs, **forward) if objective.needs_reference and not online else None
    start = None
    if all(row.reference for row in rows):
        start = sum(weight * row.at_zero(constants) for row, (_, weight) in zip(rows, terms, strict=True))
    return Recipe(
        loss, pairwise.pair_weights, keep, start, score if online or ranked else None, gather if ranked else None
    )


def _reward(objective: Objective, arch: Architecture, compute: Compute) -> Recipe:
    center = objective.center_rewards_coefficient
    loss = partial(reward.reward_loss, arch=arch, compute=compute, center_rewards_coefficient=center)
    return Recipe(loss, pairwise.pair_weights, outcomes=2)


def _process(objective: Objective, arch: Architecture, compute: Compute) -> Recipe:
    return Recipe(partial(reward.process_loss, arch=arch, compute=compute), reward.step_weights, outcomes=2)


# objective.type -> (kind of examples, what makes the recipe)
RECIPES: dict[str, tuple[str, Callable[[Objective, Architecture, Compute], Recipe]]] = {
    "sft": ("lm", _sft),
    "dpo": ("pair", _pairs),
    "reward": ("reward", _reward),
    "process_reward": ("steps", _process),
}
# objective.type -> (scores, whether of tokens), for those that train a score head instead of a language model
SCORES: dict[str, Callable[[Objective], tuple[int, bool]]] = {
    "reward": lambda objective: (objective.num_labels, False),
    "process_reward": lambda objective: (2, True),
}


def kind_of(objective: Objective) -> str:
    """The kind of examples that an objective trains on."""
    return RECIPES[objective.type][0]


def scores_of(objective: Objective) -> tuple[int, bool] | None:
    """How many scores the objective's model gives and whether of tokens; None: it is a language model."""
    return SCORES[objective.type](objective) if objective.type in SCORES else None


def make_recipe(objective: Objective, arch: Architecture, compute: Compute) -> Recipe:
    """The row of the table for this objective."""
    return RECIPES[objective.type][1](objective, arch, compute)
