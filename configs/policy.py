"""Learning by reward: values of knobs of the section `objective`, and which of them have no meaning together."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from configs.objective import Objective

PolicyLoss = Literal["dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"]
Advantage = Literal[
    "group", "rloo", "reinforce", "reinforce_batch", "reinforce_plus_plus", "reinforce_plus_plus_baseline"
]
Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
CLIPPED = ("dapo", "grpo", "bnpo", "dr_grpo", "luspo")  # losses that clip the ratio at 1 - epsilon, 1 + epsilon_high
COMPARES = ("group", "rloo", "reinforce_plus_plus_baseline")  # advantages against others of the same prompt


def policy_refusals(given: "Objective") -> Iterator[str]:
    """What is wrong with an objective of type grpo, a sentence each."""
    if len(given.loss_type) != 1 or given.loss_weights:
        yield (
            f"objective.loss_type has {len(given.loss_type)} losses and objective.loss_weights "
            f"{len(given.loss_weights)} numbers: grpo takes one loss, without a weight"
        )
        return
    loss, level, high = given.loss_type[0], given.importance_sampling_level, given.epsilon_high
    if loss == "cispo" and (high is None or high < 1):
        yield (
            f"objective.loss_type is cispo and objective.epsilon_high is {_show(high)}: there it is the greatest ratio "
            "itself, 1 or more (recommended: 5)"
        )
    if given.delta is not None and loss not in CLIPPED:
        yield f"objective.delta is for the losses {', '.join(CLIPPED)}, objective.loss_type is {loss}"
    elif given.delta is not None and given.delta <= 1 + (bound := given.epsilon if high is None else high):
        yield (
            f"objective.delta is {given.delta:g}: it caps the ratio where the advantage is negative, and must be above "
            f"1 + objective.epsilon_high = {1 + bound:g}"
        )
    if loss == "luspo" and level != "sequence":
        yield (
            f"objective.loss_type is luspo and objective.importance_sampling_level is {level}: luspo weighs whole "
            "sequences; set importance_sampling_level=sequence"
        )
    if loss == "vespo" and level != "token":
        yield (
            f"objective.loss_type is vespo and objective.importance_sampling_level is {level}: vespo takes the "
            "sequence's ratio by itself; leave it at token"
        )
    if loss == "vespo" and given.importance_sampling_correction.startswith("sequence"):
        yield (
            f"objective.loss_type is vespo and objective.importance_sampling_correction is "
            f"{given.importance_sampling_correction}: vespo multiplies tokens' ratios; use token_truncate or token_mask"
        )
    low, top = given.importance_sampling_clip_min, given.importance_sampling_clip_max
    if low is not None and top is not None and low > top:
        yield (
            f"objective.importance_sampling_clip_min is {low:g} and objective.importance_sampling_clip_max is "
            f"{top:g}: nothing lies between"
        )
    if given.kl_in_reward and given.beta == 0:
        yield "objective.kl_in_reward is true and objective.beta is 0: nothing would be subtracted; give a beta"
    if given.beta and not given.kl_in_reward and given.kl_estimator == "k1" and not given.use_bias_correction_kl:
        yield (
            "objective.kl_estimator is k1 and objective.use_bias_correction_kl is false: the gradient of k1 alone is "
            "0 on average; set one of the two otherwise, or kl_in_reward=true"
        )
    if given.normalize_advantages and given.advantage not in ("rloo", "reinforce", "reinforce_batch"):
        yield (
            f"objective.normalize_advantages is true and objective.advantage is {given.advantage}, which has a scale "
            "of its own (group: objective.scale_rewards)"
        )
    if given.multi_objective_aggregation == "normalize_then_sum" and given.advantage != "group":
        yield (
            f"objective.multi_objective_aggregation is normalize_then_sum and objective.advantage is "
            f"{given.advantage}: each reward's groups are normalised for advantage=group only"
        )
    if given.multi_objective_aggregation == "normalize_then_sum" and (given.kl_in_reward or given.reward_clip_range):
        yield (
            "objective.multi_objective_aggregation is normalize_then_sum: rewards are never added up before they are "
            "normalised, so objective.kl_in_reward and objective.reward_clip_range have no sum to change"
        )
    if given.reward_clip_range is not None and given.reward_clip_range[0] >= given.reward_clip_range[1]:
        yield (
            f"objective.reward_clip_range is {list(given.reward_clip_range)}: it is the least and the greatest reward"
        )


def _show(value: float | None) -> str:
    return "null" if value is None else f"{value:g}"
