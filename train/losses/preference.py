"""The table of preference losses: one row for each loss type, on pairs or on single completions, and their sums."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from jaxtyping import Array, Float

from train.losses import pairs, unpaired
from train.losses.pairs import Pairs
from train.losses.unpaired import Unpaired


@dataclass(frozen=True)
class Constant:
    """A number of a loss: its default, and the interval in which the loss has a meaning; ends like "[)"."""

    default: float
    low: float
    high: float
    ends: str

    def allows(self, value: float) -> bool:
        """Whether the value lies in the interval."""
        above = value >= self.low if self.ends[0] == "[" else value > self.low
        return above and (value <= self.high if self.ends[1] == "]" else value < self.high)

    def __str__(self) -> str:
        return f"{self.ends[0]}{self.low:g}, {self.high:g}{self.ends[1]}"


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss type: its function, and what it needs to know and may be combined with."""

    function: Callable[..., Array]
    zero: float | Callable[[Mapping[str, float]], float]  # at zero margin and weight 1; from the constants, if need be
    paired: bool = True  # on Pairs, else on Unpaired
    reference: bool = True
    divergence: bool = False  # a function of the margin: may take another f-divergence
    weightable: bool = True  # may take weights per pair (WPO): not where ranks tie pairs together
    token_means: bool = False  # knows nothing but mean log-probs: so do its reward metrics
    constants: Mapping[str, Constant] = field(default_factory=dict)  # besides beta
    columns: tuple[str, ...] = ()
    score: Callable[[Pairs, Array], dict[str, Array]] | None = None  # makes the columns from all pairs and their mask

    def numbers(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Of all that is given, what this loss takes."""
        return {name: given[name] for name in ("beta", *self.constants, *self.columns) if name in given}

    def at_zero(self, given: Mapping[str, float]) -> float:
        """The loss at zero margin and weight 1: of every pair at step 0, where the policy starts as the reference."""
        constants = {name: constant.default for name, constant in self.constants.items()}
        return self.zero({**constants, **given}) if callable(self.zero) else self.zero


BETA = Constant(0.1, 0.0, math.inf, "()")
_SMOOTHING = {"label_smoothing": Constant(0.0, 0.0, 0.5, "[)")}
_EPSILON = {"label_smoothing": Constant(1e-3, 0.0, 0.5, "()")}
_TAU = {"discopop_tau": Constant(0.05, 0.0, 1.0, "(]")}
_TARGET = {"simpo_gamma": Constant(0.5, 0.0, math.inf, "[)"), **_SMOOTHING}
_SHAPE = {"alpha": Constant(0.0, -math.inf, math.inf, "()"), **_TARGET}
_WEIGHTS = {name: Constant(1.0, 0.0, math.inf, "[)") for name in ("desirable_weight", "undesirable_weight")}
_LN2 = math.log(2)

_row = PreferenceLoss
_on_margin = partial(PreferenceLoss, divergence=True)
_by_rank = partial(PreferenceLoss, weightable=False, constants=_SMOOTHING)
_free = partial(PreferenceLoss, reference=False)
_single = partial(PreferenceLoss, paired=False, weightable=False, constants=_WEIGHTS)


def _below_target(c: Mapping[str, float]) -> float:
    return math.log1p(math.exp(c["simpo_gamma"])) - c["label_smoothing"] * c["simpo_gamma"]


def _exo(c: Mapping[str, float]) -> float:
    return -_LN2 - 0.5 * math.log(c["label_smoothing"] * (1 - c["label_smoothing"]))


LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": _on_margin(pairs.dpo, _LN2),
    "sigmoid_norm": _on_margin(pairs.sigmoid_norm, _LN2),
    "hinge": _on_margin(pairs.hinge, 1.0),
    "ipo": _on_margin(pairs.ipo, lambda c: 0.25 / c["beta"] ** 2),
    "ipo_sum": _on_margin(pairs.ipo_sum, lambda c: 0.25 / c["beta"] ** 2),
    "exo_pair": _on_margin(pairs.exo_pair, _exo, constants=_EPSILON),
    "robust": _on_margin(pairs.robust, _LN2, constants=_SMOOTHING),
    "cdpo": _on_margin(pairs.cdpo, _LN2, constants=_SMOOTHING),
    "discopop": _on_margin(pairs.discopop, 0.5 * _LN2 + 0.5, constants=_TAU),
    "nca_pair": _row(pairs.nca_pair, 2 * _LN2),
    "bco_pair": _row(pairs.bco_pair, 2 * _LN2, columns=("delta",)),
    "sppo_hard": _row(pairs.sppo_hard, lambda c: 0.5 / c["beta"] ** 2),
    "apo_zero": _row(pairs.apo_zero, 1.0),
    "apo_down": _row(pairs.apo_down, 1.0),
    "aot": _by_rank(pairs.aot, _LN2, columns=("matched_ref",), score=pairs.aot_columns),
    "aot_unpaired": _by_rank(
        pairs.aot_unpaired, _LN2, columns=("matched_rejected", "matched_chosen"), score=pairs.aot_unpaired_columns
    ),
    "cpo": _free(pairs.cpo, _LN2, constants=_SMOOTHING),
    "simpo": _free(pairs.simpo, _below_target, token_means=True, constants=_TARGET),
    "alphapo": _free(pairs.alphapo, _below_target, token_means=True, constants=_SHAPE),
    "orpo": _free(pairs.orpo, lambda c: c["beta"] * _LN2, token_means=True),
    "kto": _single(unpaired.kto, 0.5, columns=("z0",)),
    "apo_zero_unpaired": _single(unpaired.apo_zero_unpaired, 0.5),
}


def combine(
    examples: Pairs | Unpaired, terms: Sequence[tuple[str, float]], given: Mapping[str, Any]
) -> Float[Array, "*P"]:
    """The sum of weight * loss over (loss type, weight) (MPO, arXiv 2411.10442).

    given: beta, constants and columns by name; each loss takes its own, and its defaults for what is not there.
    """
    losses = [weight * LOSSES[name].function(examples, **LOSSES[name].numbers(given)) for name, weight in terms]
    return sum(losses[1:], start=losses[0])
