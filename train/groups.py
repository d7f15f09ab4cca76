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

    @property
    def scores(self) -> np.ndarray:
        """The reward of each completion; NaN where nothing judged it."""
        return np.asarray([number_of(one["reward"]) for one in self.row["completions"]])

    @property
    def varied(self) -> bool:
        """Whether some completion is better than another."""
        known = self.scores[np.isfinite(self.scores)]
        return known.size > 0 and bool(known.max() > known.min())


def number_of(score: Score) -> float:
    """A score; NaN for one that is none."""
    return math.nan if score is None else score


def portion_of(run: Run, longest: int, mesh: Mesh, rules: Rules) -> Portion:
    """Rows for a step in the worst case: the longest prompt every time, no completion that ends early.

    Best fit never needs more: when it opens a row, each one before has less room left than a worst-case example takes,
    so it holds as many examples as a row can in the worst case.
    """
    capacity, generations, size = run.data.max_length, run.sample.num_generations, run.sample.max_new_tokens
    together = min(generations, (capacity - (longest - 1)) // size)  # completions behind one prompt
    examples = run.train.batch_size * -(-generations // together)
    rows = -(-examples // (capacity // (longest - 1 + together * size)))
    at_once = run.train.microbatch_rows * math.prod(mesh.shape[axis] for axis in rules.axes("batch"))
    return Portion(at_once, -(-rows // at_once))


def pack(groups: Sequence[Group], run: Run, portion: Portion, pad_id: int) -> Columns:
    """The columns of a step: each prompt once, its completions behind it, in as few rows as they need.

    A group too long for a row is cut between completions, its prompt then comes again.
    """
    capacity, masked = run.data.max_length, run.objective.mask_truncated_completions
    examples: list[Columns] = []
    number = 1  # of a completion in the batch; 0: none
    for group in groups:
        start = len(group.prompt.tokens)
        blank = np.zeros(start, np.float32)
        part: list[Columns] = []
        room = capacity - (start - 1)
        for one in group.made:
            size = len(one.tokens)
            if size > room:
                examples.append(join_branches(part, start))
                part, room = [], capacity - (start - 1)
            room -= size
            counts = not (masked and one.finish_reason != "stop")
            part.append(
                {
                    "tokens": np.asarray([*group.prompt.tokens, *one.tokens], np.int32),
                    "weights": np.concatenate([blank, np.full(size, counts, np.float32)]),
                    "sampler_logprobs": np.concatenate([blank, np.asarray(one.logprobs, np.float32)]),
                    "completions": np.concatenate([blank, np.full(size, number)]).astype(np.int32),
                }
            )
            number += 1
        examples.append(join_branches(part, start))
    return _stack(examples, capacity, portion, pad_id)


def _stack(examples: list[Columns], capacity: int, portion: Portion, pad_id: int) -> Columns:
    """Examples in as few rows as they need; the parts that are computed one after the other fill up in turn."""
    rows, parts = portion.rows, portion.microbatches
    packed = pack_window([len(example["tokens"]) for example in examples], capacity, None)
    chosen: list[list[int]] = [[] for _ in range(rows * parts)]
    for i, row in enumerate(packed):
        # step.split_batch takes every parts-th row
        chosen[i // rows + parts * (i % rows)] = row
    filled = [fill_row([examples[i] for i in row], capacity, pad_id, COLUMNS) for row in chosen]
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
