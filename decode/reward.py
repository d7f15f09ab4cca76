"""What reward models say of whole rows and of the steps in them; how often a model prefers the better of a pair."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from configs.errors import UsageError
from configs.schema import Data
from data.chat import Example, encode_chat, encode_completion
from data.formats import normalise
from data.pairs import encode_pair, ended
from data.rewards import encode_steps
from data.sources import open_source
from decode.engine import on
from decode.jsonl import at, checked
from decode.load import Model
from decode.prompts import batches, bucket, check_row, pad_right
from decode.score import score
from model.architecture import Architecture
from model.compute import Compute
from model.head import scores
from model.transformer import forward

Progress = Callable[[int], None]


def score_rewards(
    model: Model,
    rows: Sequence[Sequence[int]],
    *,
    batch_size: int | None = 8,
    progress: Progress = lambda rows: None,
) -> np.ndarray:
    """float32[N, heads]: the reward of each row of token ids by each head, read at its last token (of a process reward
    model: the log-odds that the step which ends there is good)."""
    return np.stack([read[-1] for read in read_scores(model, rows, batch_size=batch_size, progress=progress)])


def read_scores(
    model: Model,
    rows: Sequence[Sequence[int]],
    *,
    batch_size: int | None = 8,
    progress: Progress = lambda rows: None,
) -> list[np.ndarray]:
    """float32[length, heads] of each row: what the score head says at every token; few shapes are ever compiled."""
    if not model.arch.num_labels:
        raise UsageError("the model is a language model, which has no score head: objective.type=reward trains one")
    for number, row in enumerate(rows, 1):
        check_row(row, model.arch.vocab_size, model.arch.max_position, f"row {number}")
    found: dict[int, np.ndarray] = {}
    for batch in batches([len(row) for row in rows], batch_size):
        chosen = [rows[i] for i in batch]
        filled = chosen + [[0]] * ((batch_size or len(batch)) - len(batch))
        tokens, segments = pad_right(filled, min(bucket(max(map(len, chosen))), model.arch.max_position))
        with on(model):
            made = np.asarray(_scores(model.arch, model.compute, model.params, tokens, segments), np.float32)
        for n, i in enumerate(batch):
            found[i] = made[n, : len(rows[i])]
        progress(len(batch))
    return [found[i] for i in range(len(rows))]


@partial(jax.jit, static_argnames=("arch", "compute"))
def _scores(
    arch: Architecture, compute: Compute, params: Any, tokens: Int[Array, "B T"], segments: Int[Array, "B T"]
) -> Float[Array, "B T C"]:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return scores(arch, params, forward(arch, compute, params, tokens, positions, segments))


@dataclass(frozen=True)
class Judged:
    """Tokens, and what is said of them: a reward by each head and their mean; of a process, the log-odds that each of
    its steps is good, and the least of them."""

    tokens: list[int]
    rewards: list[float]
    reward: float


def judge(
    model: Model,
    rows: Sequence[tuple[str, str, Any]],
    *,
    batch_size: int = 8,
    progress: Progress = lambda rows: None,
) -> list[Judged]:
    """Judge rows as decode.jsonl reads them (where, key, value), tokenised as for training: a text ends with EOS, a
    conversation with its last answer, steps are read at their ends; tokens are taken as they are."""
    examples = []
    for where, key, value in rows:
        with at(where):
            examples.append(_encode(model, key, value))
            check_row(examples[-1]["tokens"].tolist(), model.arch.vocab_size, model.arch.max_position, f"'{key}'")
    tokens = [example["tokens"].tolist() for example in examples]
    results = []
    for example, read in zip(
        examples, read_scores(model, tokens, batch_size=batch_size, progress=progress), strict=True
    ):
        steps = np.flatnonzero(example["weights"]) if model.arch.token_labels else [-1]
        found = read[steps].reshape(-1).tolist()
        one = min(found) if model.arch.token_labels else float(np.mean(found))
        results.append(Judged(example["tokens"].tolist(), found, one))
    return results


def _encode(model: Model, key: str, value: Any) -> Example:
    """Tokens, and weights where a process is read."""
    tokenizer = model.tokenizer
    if key == "completions":
        if not model.arch.token_labels:
            raise UsageError("'completions' are the steps of a process: this reward model judges whole sequences")
        form = normalise({"labels": [0] * len(value[key]), **value}, "stepwise")
        return encode_steps(form, tokenizer, Data(train=("rows",)))
    value = checked(key, value)
    if key == "tokens":
        example = {"tokens": np.asarray(value, np.int32)}
    elif key == "text":
        example = encode_completion(tokenizer, "", value)
    else:
        example = encode_chat(tokenizer, value)
        if not example["weights"].any():
            raise UsageError("'messages' has no answer of the assistant: there is nothing to judge")
        example = ended(example)
    weights = np.zeros(len(example["tokens"]), np.float32)
    weights[-1:] = 1
    return {"tokens": example["tokens"], "weights": weights}


@dataclass(frozen=True)
class Preferred:
    """How a model ranks pairs: the share it ranks right, and by how much it prefers the chosen one on average.

    by_length: (share, pairs) of those whose chosen one is longer or shorter, in tokens: a model that only likes length
    is right in the one and wrong in the other.
    """

    pairs: int
    accuracy: float
    margin: float
    lowest: float  # of all values
    highest: float
    by_length: dict[str, tuple[float | None, int]]


def compare(
    model: Model,
    pairs: Sequence[tuple[Example, Example]],
    *,
    batch_size: int = 8,
    progress: Progress = lambda rows: None,
) -> dict[str, Preferred]:
    """{measure: Preferred} on (chosen, rejected), unshifted with weights on the completion.

    A reward model is measured by `reward`; a language model by the `sum` and the `mean` of a completion's log-probs.
    """
    sides = [side for pair in pairs for side in pair]
    rows = [side["tokens"].tolist() for side in sides]
    sizes = np.asarray([np.count_nonzero(side["weights"]) for side in sides])
    if model.arch.num_labels:
        measures = {"reward": score_rewards(model, rows, batch_size=batch_size, progress=progress).mean(1)}
    else:
        scored = score(model, rows, batch_size=batch_size, progress=progress)
        learnt = [side["weights"][1:] > 0 for side in sides]
        sums = np.asarray([np.asarray(row.logprobs)[at].sum() for row, at in zip(scored, learnt, strict=True)])
        measures = {"sum": sums, "mean": sums / sizes}
    longer = sizes[0::2] - sizes[1::2]
    return {name: _preferred(values, longer) for name, values in measures.items()}


def read_pairs(model: Model, paths: Sequence[str]) -> list[tuple[Example, Example]]:
    """The pairs of preference files, tokenised as for training, each side up to the end of its answer."""
    data = Data(train=tuple(paths))
    records = open_source(paths)
    pairs = []
    for index in range(len(records)):
        with at(records.where(index)):
            chosen, rejected = encode_pair(normalise(records[index]), model.tokenizer, data)
            for name, side in (("chosen", chosen), ("rejected", rejected)):
                check_row(side["tokens"].tolist(), model.arch.vocab_size, model.arch.max_position, f"'{name}'")
        pairs.append((chosen, rejected))
    return pairs


def _preferred(values: np.ndarray, longer: np.ndarray) -> Preferred:
    """values: of chosen, rejected, chosen, ...; longer: by how many tokens each chosen one is."""
    margins = values[0::2] - values[1::2]
    right = margins > 0
    share = lambda which: float(right[which].mean()) if which.any() else None  # noqa: E731
    groups = {"chosen_longer": longer > 0, "chosen_shorter": longer < 0, "same_length": longer == 0}
    by_length = {name: (share(which), int(which.sum())) for name, which in groups.items()}
    accuracy, margin, lowest, highest = (float(x) for x in (right.mean(), margins.mean(), values.min(), values.max()))
    return Preferred(len(margins), accuracy, margin, lowest, highest, by_length)
