"""A batch as text for human eyes: which tokens carry loss, whose they are, where examples begin."""

from collections.abc import Mapping, Sequence
from itertools import groupby, islice
from typing import TYPE_CHECKING

import numpy as np

from data.chat import ROLES
from data.loader import Loader
from data.pack import Piece
from data.stats import Summary
from data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

Columns = Mapping[str, np.ndarray]
LEGEND = "tokens that carry loss are \u27e6marked\u27e7"
STYLES = {"template": "dim", "system": "magenta", "user": "cyan", "assistant": "yellow", "tool": "blue", "other": "dim"}


def trained_share(batch: Columns) -> float:
    """Share of a batch's tokens, padding aside, that carry loss."""
    return float(np.count_nonzero(batch["weights"])) / max(1, int(np.count_nonzero(batch["segments"])))


def trained_texts(row: Columns, tokenizer: Tokenizer) -> list[str]:
    """The stretches of text that a row ([T] columns) trains on, in order."""
    runs = groupby(_runs(row), key=lambda run: run[:3])
    return [tokenizer.decode([token for run in group for token in run[4]]) for (*_, trained), group in runs if trained]


def trained_tokens(batch: Columns) -> set[int]:
    """The ids that a batch trains on; preflight looks for an end of turn among them."""
    return set(np.asarray(batch["targets"])[np.asarray(batch["weights"]) > 0].tolist())


def render_row(row: Columns, tokenizer: Tokenizer, roles: np.ndarray | None = None) -> "Text":
    """A row ([T] columns) as rich text. `roles` are those of the row's tokens, example after example, each including
    its first token."""
    from rich.text import Text

    text, segment, side = Text(), 0, 0
    for number, branch, trained, role, tokens in _runs(row, roles):
        if number != segment:
            text.append(f"{'' if segment == 0 else chr(10)}\u2500\u2500 example {number} \u2500\u2500\n", "bold")
        if branch and (number, branch) != (segment, side):
            text.append(f"\n\u2500\u2500 {_side(row, number, branch)} \u2500\u2500\n", "bold")
        segment, side = number, branch
        words = tokenizer.decode(tokens)
        if trained:
            text.append(f"\u27e6{words}\u27e7", "bold green")
        else:
            text.append(words, STYLES[role])
    padding = int((np.asarray(row["segments"]) == 0).sum())
    if padding:
        text.append(f"\n({padding} positions of padding)", "dim")
    return text


def _side(row: Columns, segment: int, branch: int) -> str:
    """What a branch of an example is."""
    if "desirable" not in row:
        return ("chosen", "rejected")[branch - 1]
    desirable = row["desirable"][np.asarray(row["segments"]) == segment].any()
    return ("desirable" if desirable else "undesirable", "mismatched (of another row)")[branch - 1]


def _runs(row: Columns, roles: np.ndarray | None = None) -> list[tuple[int, int, bool, str, list[int]]]:
    """Stretches of a row of one example, one branch, one role and one trained or not: (example, branch, trained, role,
    tokens)."""
    segments = np.asarray(row["segments"])
    flat: list[tuple[int, int, bool, str, int]] = []
    for number in range(1, int(segments.max(initial=0)) + 1):
        inside = segments == number
        # the example as it was: its first token, which nothing predicts, then the targets; where scores are read and
        # nothing is predicted, the targets are the tokens
        first = [] if np.array_equal(row["tokens"][inside], row["targets"][inside]) else [row["tokens"][inside][0]]
        tokens = [*map(int, first), *map(int, row["targets"][inside])]
        trained = [*(False for _ in first), *(bool(weight) for weight in row["weights"][inside])]
        branches = row["branches"][inside].tolist() if "branches" in row else [0] * len(tokens)
        branches = branches[: len(tokens) - len(branches)] + branches  # the first token is where its target is
        start = len(flat)
        names = ["template" if roles is None else ROLES[roles[start + at]] for at in range(len(tokens))]
        flat += zip([number] * len(tokens), branches, trained, names, tokens, strict=True)
    return [(*key, [item[4] for item in group]) for key, group in groupby(flat, key=lambda item: item[:4])]


def show_batch(batch: Columns, tokenizer: Tokenizer, console: "Console", rows: int = 2) -> None:
    """Print the first rows of a batch; colours only on a terminal."""
    console.print(
        f"batch {tuple(batch['tokens'].shape)}, {trained_share(batch):.1%} of the tokens carry loss; {LEGEND}"
    )
    for number in range(min(rows, len(batch["tokens"]))):
        console.print(f"row {number}", style="bold", highlight=False)
        console.print(render_row({name: column[number] for name, column in batch.items()}, tokenizer), soft_wrap=True)


def show_data(loader: Loader, console: "Console", rows: int = 2, summary: Summary | None = None) -> None:
    """Print the first rows that a loader gives, with roles in colour, and the statistics if there are any."""
    for line in summary.lines() if summary else []:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    tokenizer = loader.examples.tokenizer
    console.print(LEGEND, highlight=False)
    first = islice((row for window in loader.windows(0) for row in window), rows)
    for number, pieces in enumerate(first):
        columns = loader.fill(pieces)
        console.print(f"row {number}: {len(pieces)} examples, {trained_share(columns):.1%} carry loss", style="bold")
        console.print(render_row(columns, tokenizer, _roles(loader, pieces)), soft_wrap=True)


def _roles(loader: Loader, pieces: Sequence[Piece]) -> np.ndarray | None:
    """Whose the tokens of a row are; None where it is one stream."""
    if not loader.data.document_mask:
        return None
    found = []
    for piece in pieces:
        roles = loader.examples.roles(piece.number)
        roles = np.zeros(piece.stop + 1, np.int8) if roles is None else roles
        found.append(roles[piece.start : piece.stop + 1])
    return np.concatenate(found)
