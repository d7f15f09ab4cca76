"""The table objective -> what it needs. NOTHING else branches on the objective."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from configs.errors import UsageError
from configs.objective import Objective
from configs.sample import Sample
from model.architecture import Architecture
from model.compute import Compute
from model.lora import detach
from train.advantage import make_advantages
from train.losses import packed, pairwise, policy, reward
from train.losses.lm import lm_loss, lm_weights
from train.losses.preference import LOSSES
from train.losses.unpaired import kto_columns
from train.step import NOTHING, Batch, Columns, Loss, Tree, Weights, real


@dataclass(frozen=True)
class Alarm:
    """What to say once, when the mean of a metric over many steps is above a bound."""

    metric: str
    above: float
    text: str


@dataclass(frozen=True)
class Recipe:
    """One objective: loss with its constants bound, denominators, columns made before a step."""

    loss: Loss
    weights: Weights
    reference: Callable[..., Any] | None = None  # (params, batch, arch=...) -> log-probs to keep, where they are
    start: float | None = None  # the loss of a policy that is still its reference
    columns: Columns = NOTHING
    alarms: tuple[Alarm, ...] = ()
    advantages: Callable[..., Any] | None = None  # rewards -> advantages (train/advantage.py make_advantages)
    outcomes: int | None = None  # that a uniform guess would be among
    learns: Callable[[Batch], Any] = real  # positions that can have a gradient


def _sft(objective: Objective, arch: Architecture, compute: Compute, sample: Sample) -> Recipe:
    balance, z = objective.router_aux_loss_coef, objective.router_z_loss_coef
    if arch.experts is None and (balance or z):
        raise UsageError(
            f"objective.router_aux_loss_coef {balance}, objective.router_z_loss_coef {z}: this model has no experts, "
            "they must be 0 or left out"
        )
    if balance is None:
        balance = arch.experts.aux_loss_coef if arch.experts else 0.0
    loss = partial(
        lm_loss, arch=arch, compute=compute, chunk=objective.loss_chunk, z_loss=objective.z_loss, router=(balance, z)
    )
    return Recipe(loss, lm_weights, outcomes=arch.vocab_size)


BOTH_FELL = Alarm(
    "rewards/both_fell",
    0.6,
    "in most pairs both answers have become less likely than under the reference: the policy moves away from what it "
    "should say, too; what helps: objective.sft_weight=0.2 or more, loss_type=apo_zero or ipo, a lower "
    "optim.learning_rate, a higher objective.beta",
)


def _pairs(objective: Objective, arch: Architecture, compute: Compute, sample: Sample) -> Recipe:
    """DPO and its family: objective.loss_type names rows of the table of losses."""
    terms, constants = objective.terms, objective.constants
    rows = [LOSSES[name] for name, _ in terms]
    loss = partial(
        pairwise.pair_loss, arch=arch, compute=compute, chunk=objective.loss_chunk, terms=terms, constants=constants,
        sft_weight=objective.sft_weight, sft_tokens=objective.sft_tokens, ld_alpha=objective.ld_alpha,
        divergence=(objective.f_divergence_type, objective.f_alpha_divergence_coef),
        use_weighting=objective.use_weighting,
    )  # fmt: skip
    makers = [row.score for row in rows if row.score is not None]

    def gather(carried: Tree, batch: Batch) -> tuple[dict[str, Any], Tree]:
        pairs, mask = packed.pairs_of(batch["logprobs"], batch, objective.ld_alpha), packed.pair_mask(batch)
        made = {name: column for make in makers for name, column in make(pairs, mask).items()}
        if "rewards" in carried:
            rewards = objective.beta * jnp.stack(pairs.scores)
            count = carried["rewards"]["count"] + 2 * mask.sum()
            mean = carried["rewards"]["mean"]
            mean += jnp.where(mask, rewards - mean, 0).sum() / jnp.maximum(count, 1)
            made["delta"] = jnp.full(mask.shape, mean)
            carried = {**carried, "rewards": {"mean": mean, "count": count}}
        return made, carried

    start = None if objective.use_weighting else _start(objective)
    columns = _columns(objective, arch, compute, gather if makers or objective.bco_baseline == "running" else None)
    reference, alarms = _kept(objective, arch, compute), (BOTH_FELL,) if objective.needs_reference else ()
    return Recipe(loss, packed.pair_weights, reference, start, columns, alarms)


def _kto(objective: Objective, arch: Architecture, compute: Compute, sample: Sample) -> Recipe:
    """KTO and APO-zero on single completions."""
    terms, constants = objective.terms, objective.constants
    estimates = any("z0" in LOSSES[name].columns for name, _ in terms)
    branches = 2 if estimates else 1
    loss = partial(
        pairwise.single_loss, arch=arch, compute=compute, chunk=objective.loss_chunk, terms=terms,
        constants=constants, branches=branches,
    )  # fmt: skip

    def gather(carried: Tree, batch: Batch) -> tuple[dict[str, Any], Tree]:
        _, other = packed.singles_of(batch["logprobs"], batch)
        assert other is not None
        return kto_columns(other.logps, other.ref_logps, packed.single_mask(batch)), carried

    weights, columns = partial(packed.single_weights, count=branches), gather if estimates else None
    start = _start(objective) if objective.desirable_weight == objective.undesirable_weight == 1 else None
    reference = _kept(objective, arch, compute)
    return Recipe(loss, weights, reference, start, _columns(objective, arch, compute, columns))


def _start(objective: Objective) -> float | None:
    """The loss where the policy still is its reference, if it must be that."""
    rows = [LOSSES[name] for name in objective.loss_type]
    if objective.reference == "model" or not all(row.reference for row in rows):
        return None
    return sum(
        weight * row.at_zero(objective.constants) for row, (_, weight) in zip(rows, objective.terms, strict=True)
    )


def _kept(objective: Objective, arch: Architecture, compute: Compute) -> Callable[..., Any] | None:
    """What makes the log-probs that are computed once, if the reference never changes."""
    if not objective.needs_reference or objective.reference not in ("cached", "model"):
        return None
    return partial(packed.policy_logprobs, arch=arch, compute=compute, chunk=objective.loss_chunk)


def _columns(objective: Objective, arch: Architecture, compute: Compute, gather: Any) -> Columns:
    """Log-probs before each step: of a reference that is at hand only then, and of the policy for `gather`."""
    logprobs = partial(packed.policy_logprobs, arch=arch, compute=compute, chunk=objective.loss_chunk)
    moving = objective.needs_reference and objective.reference == "moving"
    online = moving or (objective.needs_reference and objective.reference == "adapterless")

    def score(params: Tree, reference: Tree, batch: Batch) -> dict[str, Any]:
        made = {}
        if online:
            made["ref_logprobs"] = logprobs(detach(params) if reference is None else reference, batch)
        if gather is not None:
            made["logprobs"] = logprobs(params, batch)
        return made

    def start(params: Tree) -> Tree:
        carried: dict[str, Tree] = {}
        if moving:
            carried["reference"] = jax.tree.map(jnp.copy, params)
        if objective.bco_baseline == "running":
            zero = jnp.zeros((), jnp.promote_types(compute.dtype, jnp.float32))
            carried["rewards"] = {"mean": zero, "count": zero}
        return carried

    following = partial(_follow, objective) if moving else None
    return Columns(score if online or gather is not None else None, gather, start, following)


def _follow(objective: Objective, carried: Tree, params: Tree, step: Any) -> Tree:
    """TR-DPO (arXiv 2404.09656): now and then the reference takes a step towards the policy."""
    new = objective.ref_model_mixup_alpha

    def mixed(reference: Tree) -> Tree:
        return jax.tree.map(lambda r, p: ((1 - new) * r + new * p).astype(r.dtype), reference, params)

    due = step % objective.ref_model_sync_steps == 0
    return {**carried, "reference": jax.lax.cond(due, mixed, lambda reference: reference, carried["reference"])}


def _reward(objective: Objective, arch: Architecture, compute: Compute, sample: Sample) -> Recipe:
    center = objective.center_rewards_coefficient
    loss = partial(reward.reward_loss, arch=arch, compute=compute, center_rewards_coefficient=center)
    return Recipe(loss, packed.pair_weights, outcomes=2)


def _process(objective: Objective, arch: Architecture, compute: Compute, sample: Sample) -> Recipe:
    return Recipe(partial(reward.process_loss, arch=arch, compute=compute), reward.step_weights, outcomes=2)


NOTHING_TO_LEARN = Alarm(
    "frac_reward_zero_std",
    0.9,
    "for most prompts all completions have one and the same score, so that nothing is learnt from them; what helps: "
    "prompts that are neither too hard nor too easy, sample.max_gen_batches=4, more sample.num_generations, a higher "
    "sample.temperature, a reward with more grades",
)


def _grpo(objective: Objective, arch: Architecture, compute: Compute, sample: Sample) -> Recipe:
    """GRPO and its family: samples with their advantages."""
    name, share = objective.loss_type[0], objective.top_entropy_quantile
    numbers = {name: getattr(objective, name) for name in policy.POLICY_LOSSES[name].constants}
    if numbers.get("epsilon_high", 0) is None:
        numbers["epsilon_high"] = objective.epsilon
    model = {"arch": arch, "compute": compute, "chunk": objective.loss_chunk, "temperature": sample.temperature}
    loss = partial(
        policy.policy_loss, **model, loss_type=name, constants=numbers, max_completion_length=sample.max_new_tokens,
        importance_sampling_level=objective.importance_sampling_level,
        correction=policy.Correction(
            objective.importance_sampling_correction, objective.importance_sampling_clip_min,
            objective.importance_sampling_clip_max,
        ),
        off_policy_mask_threshold=objective.off_policy_mask_threshold,
        beta=0.0 if objective.kl_in_reward else objective.beta, kl_estimator=objective.kl_estimator,
        use_bias_correction_kl=objective.use_bias_correction_kl, entropy_coef=objective.entropy_coef,
    )  # fmt: skip

    def score(params: Tree, reference: Tree, batch: Batch) -> dict[str, Any]:
        return {"entropies": packed.policy_logprobs_and("entropy", params, batch, **model)[1]}

    def gather(carried: Tree, batch: Batch) -> tuple[dict[str, Any], Tree]:
        return {"entropy_mask": policy.top_entropy_mask(batch["entropies"], batch["weights"], share)}, carried

    advantages = partial(
        make_advantages, estimator=objective.advantage, scale_rewards=objective.scale_rewards,
        multi_objective_aggregation=objective.multi_objective_aggregation,
        normalize_advantages=objective.normalize_advantages, reward_clip_range=objective.reward_clip_range,
        kl_coef=objective.beta if objective.kl_in_reward else 0.0,
    )  # fmt: skip
    weights = partial(policy.policy_weights, max_completion_length=sample.max_new_tokens)
    masked, moving = share < 1, objective.needs_reference and objective.reference == "moving"
    columns = Columns(
        score if masked else None, gather if masked else None,
        (lambda params: {"reference": jax.tree.map(jnp.copy, params)}) if moving else None,
        partial(_follow, objective) if moving else None,
    )  # fmt: skip
    learns = policy.learns if objective.skips else real
    return Recipe(loss, weights, columns=columns, learns=learns, alarms=(NOTHING_TO_LEARN,), advantages=advantages)


def _unpaired(objective: Objective) -> str:
    """Only KTO's z0 needs another example's completion."""
    return "unpaired" if any("z0" in LOSSES[name].columns for name in objective.loss_type) else "unpaired_plain"


@dataclass(frozen=True)
class Row:
    """What makes an objective's recipe; its kind of examples; the score head of its model, if it is no language model:
    (scores, whether of tokens)."""

    make: Callable[[Objective, Architecture, Compute, Sample], Recipe]
    kind: Callable[[Objective], str]
    scores: Callable[[Objective], tuple[int, bool] | None] = lambda _: None


RECIPES = {
    "sft": Row(_sft, lambda _: "lm"),
    "dpo": Row(_pairs, lambda _: "pair"),
    "kto": Row(_kto, _unpaired),
    "grpo": Row(_grpo, lambda _: "rollout"),
    "reward": Row(_reward, lambda _: "reward", lambda objective: (objective.num_labels, False)),
    "process_reward": Row(_process, lambda _: "steps", lambda _: (2, True)),
}


SAMPLE = Sample()


def kind_of(objective: Objective) -> str:
    """The kind of examples that an objective trains on."""
    return RECIPES[objective.type].kind(objective)


def scores_of(objective: Objective) -> tuple[int, bool] | None:
    """How many scores the objective's model gives and whether of tokens; None: it is a language model."""
    return RECIPES[objective.type].scores(objective)


def make_recipe(objective: Objective, arch: Architecture, compute: Compute, sample: Sample = SAMPLE) -> Recipe:
    """The row of the table for this objective; sample: how the completions are made that it learns from, if it does."""
    return RECIPES[objective.type].make(objective, arch, compute, sample)
