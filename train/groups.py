"""A prompt's completions, and the columns of a step: each prompt once, its completions behind it."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from configs.schema import Run
from data.pack import Columns, fill_row, pack_window
from data.pairs import join_branches
from data.prompts import Prompt
from decode.results import Completion
from sharding.rules import Rules
from train.rewards import Score
from train.selection import Row
from train.setup import Portion

COLUMNS = ("branches", "sampler_logprobs", "completions")  # besides those of every batch


@dataclass
class Group:
    """A prompt with its completions, as they were judged."""

    prompt: Prompt
    made: list[Completion]
    row: Row  # the same for people and files, with rewards
    advantages: list[np.ndarray] | None = None  # of each completion's tokens, once they are known

    @property
    def scores(self) -> np.ndarray:
        """The reward of each completion; NaN where nothing judged it."""
        return np.asarray([number_of(one["reward"]) for one in self.row["completions"]])

    @property
    def varied(self) -> bool:
        """Whether some completion is better than another."""
        known = self.scores[np.isfinite(self.scores)]
        return known.size > 0 and bool(known.max() > known.min())

    @property
    def neutral(self) -> bool:
        """Whether all its advantages are known to be 0."""
        return self.advantages is not None and not any(one.any() for one in self.advantages)

    def counted(self, masked: bool) -> list[bool]:
        """Which completions are learnt from; masked: not from those that never end."""
        return [not masked or one.finish_reason == "stop" for one in self.made]


def number_of(score: Score) -> float:
    """A score; NaN for one that is none."""
    return math.nan if score is None else score


def portion_of(run: Run, longest: int, mesh: Mesh, rules: Rules) -> Portion:
    """Rows for a step in the worst case: the longest prompt every time, no completion that ends early.

    Best fit never needs more: when it opens a row, each one before has less room left than a worst-case example takes,
    so it holds as many examples as a row can in the worst case. Two parts more, where neutral groups are apart.
    """
    capacity, generations, size = run.data.max_length, run.sample.num_generations, run.sample.max_new_tokens
    # completions behind one prompt
    together = min(generations, (capacity - (longest - 1)) // size) if run.data.share_prompt else 1
    examples = run.train.batch_size * -(-generations // together)
    rows = -(-examples // (capacity // (longest - 1 + together * size)))
    at_once = run.train.microbatch_rows * math.prod(mesh.shape[axis] for axis in rules.axes("batch"))
    return Portion(at_once, -(-rows // at_once) + 2 * run.objective.skips)


def pack(groups: Sequence[Group], run: Run, portion: Portion, pad_id: int) -> Columns:
    """The columns of a step: each prompt once, its completions behind it, in as few rows as they need.

    A group too long for a row is cut between completions, its prompt then comes again. Neutral groups are packed apart,
    into the last parts that the batch is computed in: if there is no gradient in them, they need not be computed.
    """
    firsts = np.cumsum([1, *(len(group.made) for group in groups)])  # numbers of completions in the batch; 0: none
    apart: tuple[list[Columns], list[Columns]] = [], []
    for group, first in zip(groups, firsts.tolist(), strict=False):
        apart[group.neutral and run.objective.skips].extend(_examples(group, first, run))
    return _stack(apart, run.data.max_length, portion, pad_id)


def _examples(group: Group, number: int, run: Run) -> list[Columns]:
    """A group as examples that fit a row; number: of its first completion."""
    start = len(group.prompt.tokens)
    blank = np.zeros(start, np.float32)
    examples: list[Columns] = []
    part: list[Columns] = []
    room = most = run.data.max_length - (start - 1)
    masked = run.objective.mask_truncated_completions
    for i, (one, counts) in enumerate(zip(group.made, group.counted(masked), strict=True), number):
        size = len(one.tokens)
        if size > room:
            examples.append(join_branches(part, start))
            part, room = [], most
        room = room - size if run.data.share_prompt else 0
        part.append(
            {
                "tokens": np.asarray([*group.prompt.tokens, *one.tokens], np.int32),
                "weights": np.concatenate([blank, np.full(size, counts, np.float32)]),
                "sampler_logprobs": np.concatenate([blank, np.asarray(one.logprobs, np.float32)]),
                "completions": np.concatenate([blank, np.full(size, i)]).astype(np.int32),
            }
        )
    return [*examples, join_branches(part, start)]


def _stack(apart: Sequence[list[Columns]], capacity: int, portion: Portion, pad_id: int) -> Columns:
    """Each list of examples in as few rows as it needs, beginning with a part of its own; the parts, which are computed
    one after the other, fill up in turn."""
    rows, parts = portion.rows, portion.microbatches
    chosen: list[list[Columns]] = [[] for _ in range(rows * parts)]
    place = 0
    for examples in apart:
        for row in pack_window([len(example["tokens"]) for example in examples], capacity, None):
            # step.split_batch takes every parts-th row
            chosen[place // rows + parts * (place % rows)] = [examples[i] for i in row]
            place += 1
        place = -(-place // rows) * rows
    filled = [fill_row(row, capacity, pad_id, COLUMNS) for row in chosen]
    return {name: np.stack([row[name] for row in filled]) for name in filled[0]}


def places_of(completions: np.ndarray) -> list[np.ndarray]:
    """Where the tokens of each completion lie, in their order, in the flattened rows of numbers from 1."""
    flat = completions.reshape(-1)
    order = np.argsort(flat, kind="stable")
    return np.split(order, np.searchsorted(flat[order], np.arange(1, flat.max() + 1)))[1:]


def pack_arrays(columns: Columns) -> str:
    """Columns as text: a compressed archive in base 64."""
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **columns)
    return base64.b64encode(file.getvalue()).decode()


def unpack_arrays(text: str) -> Columns:
    """The inverse of pack_arrays."""
    return dict(np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False))
