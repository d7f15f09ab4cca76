"""What the data amounts to: counted before a run starts, so that a wrong mask or a bad fit is seen while it is free."""

from dataclasses import dataclass

import numpy as np

from data.examples import REASONS
from data.loader import Loader

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
        rows=len(examples),
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
    )
