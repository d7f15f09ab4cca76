"""The section `objective`: what is learnt, by which losses, held to what."""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, model_validator

from configs.policy import Advantage, Correction, PolicyLoss, policy_refusals
from configs.section import Int, Section, knob, several

PairLoss = Literal[
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "ipo_sum", "exo_pair", "robust", "cdpo", "discopop", "nca_pair",
    "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "cpo", "simpo", "alphapo", "orpo",
]  # fmt: skip
SingleLoss = Literal["kto", "apo_zero_unpaired"]
NEEDS_NO_REFERENCE = ("cpo", "simpo", "alphapo", "orpo")
LOSS_TYPES: dict[str, tuple[str, ...]] = {
    "dpo": get_args(PairLoss),
    "kto": get_args(SingleLoss),
    "grpo": get_args(PolicyLoss),
}


class Objective(Section):
    """What is learnt."""

    type: Literal["sft", "dpo", "kto", "grpo", "reward", "process_reward"] = knob(
        "sft",
        "sft = next token (with plain text: language modelling); dpo = pairs, kto = labelled answers, by the losses of "
        "loss_type; grpo = by reward, on its own samples; reward = a score head, by pairs; process_reward = labels of "
        "steps",
    )
    loss_type: Annotated[tuple[PairLoss | SingleLoss | PolicyLoss, ...], BeforeValidator(several)] = knob(
        (),
        "dpo: loss of a pair (default sigmoid), or several, added; kto: kto or apo_zero_unpaired; grpo: dapo "
        "(default), grpo, bnpo, dr_grpo, cispo, sapo, luspo or vespo",
    )
    loss_weights: Annotated[tuple[float, ...], BeforeValidator(several)] = knob(
        (), "a weight for each of loss_type; none: 1"
    )
    beta: float = knob(
        0.1, "how strongly the policy is held to the reference; grpo: 0, which needs none, unless given", ge=0
    )
    label_smoothing: float | None = knob(
        None,
        "dpo: share of flipped labels (robust, cdpo, exo_pair, aot, cpo, simpo); null: the loss's own",
        "",
        ge=0,
        lt=0.5,
    )
    sft_weight: float = knob(0.0, "dpo: weight of the mean -log p of chosen answers' tokens, added", "a penalty", ge=0)
    sft_tokens: Literal["completion", "sequence"] = knob(
        "completion", "the tokens of sft_weight: the chosen answers', or their prompts' too (ORPO as TRL has it)"
    )
    simpo_gamma: float = knob(0.5, "simpo, alphapo: the margin of rewards to reach", "a margin", ge=0)
    alpha: float = knob(0.0, "alphapo: its exponent; 0 is simpo")
    discopop_tau: float = knob(0.05, "discopop: temperature of the blend", "a temperature", gt=0, le=1)
    bco_baseline: Literal["none", "running"] = knob(
        "none", "bco_pair: subtract the running mean of all rewards (the paper's delta), or nothing as TRL"
    )
    desirable_weight: float = knob(1.0, "kto: weight of desirable answers", "a weight", ge=0)
    undesirable_weight: float = knob(1.0, "kto: weight of undesirable answers", "a weight", ge=0)
    use_weighting: bool = knob(False, "dpo: weigh each pair by how likely the policy is to write it (WPO)")
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = knob(
        "reverse_kl", "dpo: the divergence from the reference"
    )
    f_alpha_divergence_coef: float = knob(0.5, "dpo: alpha of alpha_divergence")
    ld_alpha: float = knob(1.0, "dpo: weight of tokens past the shorter completion (LD-DPO)", "a share", ge=0, le=1)
    reference: Literal["cached", "adapterless", "model", "moving", "none"] = knob(
        "cached",
        "what the policy is compared with: the start (cached = its log-probs computed once and kept on disk, "
        "adapterless = each step without the adapters), another model (reference_model, kept too), or a copy that "
        "follows the policy (moving: TR-DPO)",
    )
    reference_model: str | None = knob(None, "MODEL of reference=model; its tokens must be the policy's")
    ref_model_mixup_alpha: float = knob(0.6, "moving: the policy's share when the copy follows", "a share", gt=0, le=1)
    ref_model_sync_steps: Int = knob(512, "moving: steps from one such update to the next", "a count", ge=1)
    num_labels: Int = knob(1, "reward: heads of an ensemble; the reward is their mean", "a head scores", ge=1)
    center_rewards_coefficient: float = knob(
        0.0, "reward: weight of the squared sum of a pair's rewards, which keeps them around 0", "a penalty", ge=0
    )
    advantage: Advantage = knob(
        "group",
        "grpo: a reward against its prompt's mean (group), the mean of the prompt's others (rloo), nothing (reinforce) "
        "or the batch's mean (reinforce_batch); reinforce_plus_plus: returns of tokens, whitened; ..._baseline: of "
        "rewards against their prompt's mean",
    )
    scale_rewards: Literal["group", "batch", "none"] = knob(
        "group", "advantage=group: divide by the standard deviation of the prompt's rewards, or of the batch's"
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = knob(
        "sum_then_normalize", "grpo, several rewards: add them first, or normalise each one first (GDPO)"
    )
    normalize_advantages: bool = knob(False, "rloo, reinforce, reinforce_batch: mean 0, deviation 1 over the batch")
    reward_clip_range: Annotated[tuple[float, float], BeforeValidator(several)] | None = knob(
        None, "grpo: least and greatest reward of a completion, before any KL is subtracted"
    )
    importance_sampling_level: Literal["token", "sequence", "sequence_sum"] = knob(
        "token", "grpo: the ratio of policies is a token's, the sequence's mean (GSPO), or the sequence's (RLOO)"
    )
    epsilon: float = knob(0.2, "grpo: the ratio counts down to 1 - epsilon", "a ratio is not negative", gt=0, le=1)
    epsilon_high: float | None = knob(None, "grpo: and up to 1 + this; null = epsilon; cispo: up to this", gt=0)
    delta: float | None = knob(None, "grpo: greatest ratio where the advantage is negative; null = any", gt=1)
    sapo_temperature_pos: float = knob(1.0, "sapo: steepness where the advantage is positive", gt=0)
    sapo_temperature_neg: float = knob(1.05, "sapo: and elsewhere", gt=0)
    vespo_k_pos: float = knob(2.0, "vespo: power of the sequence's ratio, advantage not negative", ge=0)
    vespo_lambda_pos: float = knob(3.0, "vespo: its decay", "without it great ratios rule", gt=0)
    vespo_k_neg: float = knob(3.0, "vespo: power, advantage negative", ge=0)
    vespo_lambda_neg: float = knob(2.0, "vespo: its decay", "without it great ratios rule", gt=0)
    kl_estimator: Literal["k1", "k2", "k3"] = knob("k3", "grpo: how beta's KL of a token is estimated")
    use_bias_correction_kl: bool = knob(True, "grpo: times the ratio, so that the KL's gradient is unbiased (k1, k3)")
    kl_in_reward: bool = knob(False, "grpo: beta times k1 is subtracted from rewards instead, as RLOO does")
    entropy_coef: float = knob(0.0, "grpo: weight of the mean entropy of tokens, a bonus", "a bonus", ge=0)
    top_entropy_quantile: float = knob(
        1.0, "grpo: learn from this share of tokens alone, those of greatest entropy", "a share", ge=0, le=1
    )
    mask_truncated_completions: bool = knob(False, "grpo: nothing is learnt from completions that never end")
    off_policy_mask_threshold: float | None = knob(
        None, "grpo: leave out sequences of negative advantage that became less likely by more nats a token", gt=0
    )
    importance_sampling_correction: Correction = knob(
        "none", "grpo: weigh by trainer / sampler, of tokens or sequences, cut off (truncate) or 0 outside (mask)"
    )
    importance_sampling_clip_min: float | None = knob(None, "its least value; null = any", ge=0)
    importance_sampling_clip_max: float | None = knob(3.0, "its greatest value; null = any", gt=0)
    skip_neutral: bool = knob(
        True,
        "grpo: prompts whose completions all have advantage 0 count, but are not computed (without beta and "
        "entropy_coef they have no gradient); what metrics tell of tokens is of the others",
    )
    num_iterations: Int = knob(1, "grpo: times that samples are learnt from", "samples are learnt from", ge=1)
    steps_per_generation: Int = knob(1, "grpo: steps that samples are dealt out to", "a step learns", ge=1)
    loss_chunk: Int = knob(512, "tokens whose logits exist at the same time", "a chunk holds a token", ge=1)
    z_loss: float = knob(0.0, "sft: weight of the squared log-normaliser", "a penalty, not a reward", ge=0)

    router_aux_loss_coef: float | None = knob(
        None,
        "sft: weight of the load-balance loss of a mixture of experts; null: config.json's where it says "
        "output_router_logits, else 0",
        "a penalty",
        ge=0,
    )
    router_z_loss_coef: float = knob(0.0, "sft: weight of the z-loss of the experts' router", "a penalty", ge=0)

    @property
    def terms(self) -> tuple[tuple[str, float], ...]:
        """(loss type, weight)."""
        return tuple(zip(self.loss_type, self.loss_weights or (1.0,) * len(self.loss_type), strict=True))

    @property
    def constants(self) -> dict[str, float]:
        """The numbers of the losses; each takes those that it knows."""
        names = (
            "beta", "label_smoothing", "simpo_gamma", "alpha", "discopop_tau", "desirable_weight", "undesirable_weight",
        )  # fmt: skip
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def skips(self) -> bool:
        """Whether completions without an advantage have no gradient at all, and are not to be computed."""
        in_loss = self.entropy_coef > 0 or (self.beta > 0 and not self.kl_in_reward)
        return self.type == "grpo" and self.skip_neutral and not in_loss

    @property
    def needs_reference(self) -> bool:
        """Whether a loss, or a reward, compares with a reference policy."""
        if self.type == "grpo":
            return self.beta > 0
        return self.type in LOSS_TYPES and any(name not in NEEDS_NO_REFERENCE for name in self.loss_type)

    @model_validator(mode="before")
    @classmethod
    def _name_loss(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("type") not in LOSS_TYPES:
            return given
        own: dict[str, Any] = {"beta": 0.0} if given["type"] == "grpo" else {}
        if not given.get("loss_type"):
            own["loss_type"] = LOSS_TYPES[given["type"]][0]
        return {**own, **{name: value for name, value in given.items() if name != "loss_type" or value}}

    @model_validator(mode="after")
    def _check(self) -> Self:
        allowed = LOSS_TYPES.get(self.type, ())
        if wrong := [name for name in self.loss_type if name not in allowed]:
            raise ValueError(
                f"objective.type is {self.type}, objective.loss_type {wrong[0]}: allowed are "
                f"{', '.join(allowed) or 'none'}"
            )
        if self.type != "sft" and (self.router_aux_loss_coef or self.router_z_loss_coef):
            raise ValueError(
                f"objective.type is {self.type}: router_aux_loss_coef and router_z_loss_coef are for sft, leave out"
            )
        if self.type == "grpo":
            if refused := next(policy_refusals(self), None):
                raise ValueError(refused)
        elif self.beta == 0:
            raise ValueError(
                f"objective.beta is 0 and objective.type is {self.type}: it must be above 0, or the "
                "reference is forgotten"
            )
        if self.loss_weights and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"objective.loss_weights has {len(self.loss_weights)} numbers, objective.loss_type "
                f"{len(self.loss_type)}: give one for each, or none"
            )
        if self.label_smoothing == 0 and "exo_pair" in self.loss_type:
            raise ValueError("objective.label_smoothing is 0, exo_pair needs it above 0: leave it out for 1e-3")
        if self.bco_baseline == "running" and "bco_pair" not in self.loss_type:
            raise ValueError("objective.bco_baseline is running, but no loss of loss_type is bco_pair")
        if self.use_weighting and (wrong := [n for n in self.loss_type if n in ("aot", "aot_unpaired")]):
            raise ValueError(f"objective.use_weighting: {wrong[0]} ties pairs together by rank, a pair has no weight")
        if self.needs_reference and self.reference == "none":
            missing = next(name for name in self.loss_type if name not in NEEDS_NO_REFERENCE)
            raise ValueError(f"objective.reference is none, but the loss {missing} compares with a reference")
        if (self.reference == "model") != (self.reference_model is not None):
            raise ValueError(
                f"objective.reference is {self.reference} and objective.reference_model {self.reference_model}: "
                "reference=model goes with reference_model=MODEL"
            )
        return self
