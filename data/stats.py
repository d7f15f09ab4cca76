"""What the data amounts to: counted before a run starts, so that a wrong mask or a bad fit is seen while it is free."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.chat import end_of_turn
from data.examples import REASONS, Examples
from data.loader import Loader
from data.pack import Columns
from data.pairs import shared_tokens
from data.tokenizer import Tokenizer

PERCENTILES = (0, 50, 90, 99, 100)


@dataclass(frozen=True)
class Summary:
    """Counts over one epoch. Lengths are in positions (tokens - 1)."""

    rows: int  # rows of the source
    examples: int  # that are trained on
    dropped: dict[str, int]  # by reason, keys of REASONS
    truncated: int
    positions: int
    trained: int  # positions that carry loss
    percentiles: dict[int, int]  # of the lengths
    histogram: list[tuple[int, int]]  # (upper bound of a bin, examples in it); bounds double
    packed_rows: int
    fill: float  # share of the packed rows' positions that is not padding
    first_bad: str
    notes: tuple[str, ...] = ()  # about preferences

    @property
    def trained_share(self) -> float:
        """Share of the positions that carry loss."""
        return self.trained / max(1, self.positions)

    def lines(self) -> list[str]:
        """For people: a few lines of plain text."""
        lengths = ", ".join(f"p{percent} {length}" for percent, length in self.percentiles.items())
        text = [
            f"{self.examples} examples of {self.rows} rows, {self.positions} tokens, "
            f"{self.trained_share:.1%} of them carry loss",
            f"lengths: {lengths}",
            f"packing: {self.packed_rows} rows, {self.fill:.1%} full",
        ]
        text += self.notes
        if self.truncated:
            text.append(f"truncated to data.max_length: {self.truncated}")
        text += [f"dropped: {count} {REASONS[reason]}" for reason, count in self.dropped.items()]
        return [*text, f"first malformed row: {self.first_bad}"] if self.first_bad else text


def summarise(loader: Loader) -> Summary:
    """Statistics of the first epoch; tokenises everything once. Raises UsageError when no example is left."""
    examples = loader.examples
    examples.scan()
    lengths = examples.lengths[examples.lengths > 0]
    packed_rows, positions = loader.rows_in(0), int(lengths.sum())
    bounds = [2**power for power in range(3, int(lengths.max() - 1).bit_length() + 1)] or [8]
    bins = np.searchsorted(bounds, lengths)
    return Summary(
        rows=len(examples.records),
        examples=len(lengths),
        dropped=dict(examples.dropped()),
        truncated=int((examples.truncated & (examples.lengths > 0)).sum()),
        positions=positions,
        trained=int(examples.trained.sum()),
        percentiles={percent: int(np.percentile(lengths, percent, method="nearest")) for percent in PERCENTILES},
        histogram=[(bound, int((bins == number).sum())) for number, bound in enumerate(bounds)],
        packed_rows=packed_rows,
        fill=positions / (packed_rows * loader.data.max_length),
        first_bad=examples.first_bad,
        notes=preference_notes(examples),
    )


def preference_notes(examples: Examples) -> tuple[str, ...]:
    """Lines about pairs (their lengths, which models learn to exploit) or about labels; none for other examples."""
    if "desirable" in examples.columns:
        return _label_notes([example for example in examples if example is not None])
    if "branches" in examples.columns:
        return _pair_notes([example for example in examples if example is not None], _ends(examples.tokenizer))
    return ()


def _completions(example: Columns, branches: Sequence[int]) -> list[np.ndarray]:
    """The tokens of some branches, from where they part or are learnt to the last that carries loss."""
    inside = [example["branches"] == branch for branch in branches]
    sides = [{"tokens": example["targets"][own], "weights": example["weights"][own]} for own in inside]
    start = shared_tokens(sides)
    return [side["tokens"][start : np.flatnonzero(side["weights"])[-1] + 1] for side in sides]


def _ends(tokenizer: Tokenizer) -> list[int]:
    turn = tokenizer.special_tokens.get(end_of_turn(tokenizer)) if tokenizer.chat_template else None
    return [*tokenizer.eos_ids, *([] if turn is None else [turn])]


def _length(lengths: np.ndarray) -> str:
    return f"{np.median(lengths):g} tokens (median; p90 {np.percentile(lengths, 90, method='nearest')})"


def _pair_notes(examples: list[Columns], ends: list[int]) -> tuple[str, ...]:
    pairs = [_completions(example, (1, 2)) for example in examples]
    chosen, rejected = np.array([[len(side) for side in pair] for pair in pairs]).T
    longer = np.mean(chosen > rejected)
    near = np.mean(abs(chosen - rejected) <= 0.1 * np.maximum(chosen, rejected))
    nested = np.mean([_is_beginning(*(side[~np.isin(side, ends)] for side in pair)) for pair in pairs])
    notes = (
        f"chosen: {_length(chosen)}; rejected: {_length(rejected)}",
        f"chosen is longer in {longer:.1%} of the pairs; the lengths are within 10 % in {near:.1%}; only they differ "
        f"(one is the beginning of the other) in {nested:.1%}",
    )
    if longer <= 2 / 3:
        return notes
    warning = (
        "warning: more than two in three pairs prefer the longer completion, so the model learns to write longer: "
        "balance the data, or set objective.loss_type=sigmoid_norm or simpo, or objective.ld_alpha below 1"
    )
    return *notes, warning


def _is_beginning(one: np.ndarray, other: np.ndarray) -> bool:
    size = min(len(one), len(other))
    return np.array_equal(one[:size], other[:size])


def _label_notes(examples: list[Columns]) -> tuple[str, ...]:
    labels = np.array([example["desirable"][0] > 0 for example in examples])
    lengths = np.array([len(_completions(example, (1,))[0]) for example in examples])
    good, bad = int(labels.sum()), int((~labels).sum())
    sides = [(f"{good} desirable", lengths[labels]), (f"{bad} undesirable", lengths[~labels])]
    note = "; ".join(f"{name}, {_length(those)}" if len(those) else name for name, those in sides)
    if not good or not bad:
        return note, "warning: all completions have the same label"
    # arXiv 2402.01306: desirable_weight * good / (undesirable_weight * bad) in [1, 4/3]
    ratio = good / bad
    if 1 <= ratio <= 4 / 3:
        return note, "labels are balanced at weights of 1"
    name, low = ("desirable_weight", 1 / ratio) if ratio < 1 else ("undesirable_weight", ratio * 3 / 4)
    return note, f"labels are balanced by objective.{name} from {low:.3g} to {low * 4 / 3:.3g}"
