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
    zero: Callable[[Mapping[str, float]], float]  # constants -> the loss of equal scores, or of equal log-probs
    reference: bool = True
    divergence: bool = False  # a function of the margin: may take another f-divergence
    weightable: bool = True  # may take weights per pair (WPO): not where ranks tie pairs together
    token_means: bool = False  # of mean log-probs throughout: so are its reward metrics
    constants: Mapping[str, Constant] = field(default_factory=dict)  # besides beta
    columns: tuple[str, ...] = ()
    score: Callable[[Pairs, Array], dict[str, Array]] | None = None  # makes the columns from all pairs and their mask

    def numbers(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Of all that is given, what this loss takes."""
        return {name: given[name] for name in ("beta", *self.constants, *self.columns) if name in given}

    def at_zero(self, given: Mapping[str, float]) -> float:
        """The loss of a pair of zero margin: with a reference that is the policy, of every pair at step 0."""
        return self.zero({**{name: constant.default for name, constant in self.constants.items()}, **given})


BETA = Constant(0.1, 0, math.inf, "()")
_SMOOTHING = {"label_smoothing": Constant(0.0, 0, 0.5, "[)")}
_MARGIN = {"simpo_gamma": Constant(0.5, 0, math.inf, "[)"), **_SMOOTHING}
_EPSILON = {"label_smoothing": Constant(1e-3, 0, 0.5, "()")}
_TAU = {"discopop_tau": Constant(0.05, 0, 1, "(]")}
_ALPHA = {"alpha": Constant(0.0, -math.inf, math.inf, "()"), **_MARGIN}

_row = PreferenceLoss
_on_margin = partial(_row, divergence=True)
_free = partial(_row, reference=False)


def _log_2(c: Mapping[str, float]) -> float:
    return math.log(2)


def _short_of_target(c: Mapping[str, float]) -> float:
    return math.log1p(math.exp(c["simpo_gamma"])) - c["label_smoothing"] * c["simpo_gamma"]


LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": _on_margin(dpo, _log_2),
    "sigmoid_norm": _on_margin(sigmoid_norm, _log_2),
    "hinge": _on_margin(hinge, lambda c: 1.0),
    "ipo": _on_margin(ipo, lambda c: 0.25 / c["beta"] ** 2),
    "ipo_sum": _on_margin(ipo_sum, lambda c: 0.25 / c["beta"] ** 2),
    "exo_pair": _on_margin(
        exo_pair,
        lambda c: -math.log(2) - 0.5 * math.log(c["label_smoothing"] * (1 - c["label_smoothing"])),
        constants=_EPSILON,
    ),
    "robust": _on_margin(robust, _log_2, constants=_SMOOTHING),
    "cdpo": _on_margin(cdpo, _log_2, constants=_SMOOTHING),
    "discopop": _on_margin(discopop, lambda c: 0.5 * math.log(2) + 0.5, constants=_TAU),
    "nca_pair": _row(nca_pair, lambda c: 2 * math.log(2)),
    "bco_pair": _row(bco_pair, lambda c: 2 * math.log(2), columns=("delta",)),
    "sppo_hard": _row(sppo_hard, lambda c: 0.5 / c["beta"] ** 2),
    "apo_zero": _row(apo_zero, lambda c: 1.0),
    "apo_down": _row(apo_down, lambda c: 1.0),
    "aot": _row(aot, _log_2, weightable=False, constants=_SMOOTHING, columns=("matched_ref",), score=aot_columns),
    "aot_unpaired": _row(
        aot_unpaired,
        _log_2,
        weightable=False,
        constants=_SMOOTHING,
        columns=("matched_rejected", "matched_chosen"),
        score=aot_unpaired_columns,
    ),
    "cpo": _free(cpo, _log_2, constants=_SMOOTHING),
    "simpo": _free(simpo, _short_of_target, token_means=True, constants=_MARGIN),
    "alphapo": _free(alphapo, _short_of_target, token_means=True, constants=_ALPHA),
    "orpo": _free(orpo, lambda c: c["beta"] * math.log(2), token_means=True),
}


def combine(pairs: Pairs, terms: Sequence[tuple[str, float]], given: Mapping[str, Any]) -> Float[Array, "*P"]:
    """The sum of weight * loss over (loss type, weight) (MPO, arXiv 2411.10442).

    given: beta, constants and columns by name; each loss takes its own, and its defaults for what is not there.
    """
    losses = [weight * LOSSES[name].function(pairs, **LOSSES[name].numbers(given)) for name, weight in terms]
    return sum(losses[1:], start=losses[0])


