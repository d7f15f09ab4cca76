"""The data of the training benchmarks: random sequences of uneven lengths, the same for every stack. Only numpy."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from data.pack import fill_row, pack_window

ROWS, LENGTH = 4, 256  # a batch: 4 rows of 256 predicted tokens
VOCAB = 49152
Example = dict[str, Any]


def uneven(count: int = 512, seed: int = 0) -> list[Example]:
    """Lengths as in chat data: 16 to 257 tokens, log-uniform, 80 predicted tokens on average."""
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.uniform(np.log(16), np.log(LENGTH + 1), count)).astype(int)
    return [_example(rng, n) for n in lengths]


def full(count: int = 64, seed: int = 0) -> list[Example]:
    """Every sequence fills its row."""
    rng = np.random.default_rng(seed)
    return [_example(rng, LENGTH + 1) for _ in range(count)]


def _example(rng: np.random.Generator, length: int) -> Example:
    return {"tokens": rng.integers(20, VOCAB, length).astype(np.int32), "weights": np.ones(length, np.float32)}


def batches(examples: list[Example]) -> Iterator[dict[str, np.ndarray]]:
    """Our packed batches, over and over."""
    packed = pack_window([len(e["tokens"]) - 1 for e in examples], LENGTH, 0)
    while True:
        for start in range(0, len(packed) - ROWS + 1, ROWS):
            yield stack([fill_row([examples[i] for i in row], LENGTH) for row in packed[start : start + ROWS]])


def stack(filled: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in filled]) for name in filled[0]}


def from_peer(path: str) -> dict[str, np.ndarray]:
    """A peer's first batch (input_ids, labels, and position_ids or attention_mask) as ours, one sequence a row."""
    saved, found = np.load(path), []
    positions = saved["position_ids"] if "position_ids" in saved else None
    for r, ids in enumerate(saved["input_ids"]):
        end = len(ids) if "attention_mask" not in saved else int(saved["attention_mask"][r].sum())
        starts = [0] if positions is None else [i for i in range(end) if positions[r, i] == 0]
        for a, b in zip(starts, [*starts[1:], end], strict=True):
            found.append({"tokens": ids[a:b], "weights": (saved["labels"][r, a:b] != -100).astype(np.float32)})
    found = [e for e in found if len(e["tokens"]) > 1]
    return stack([fill_row([e], LENGTH) for e in found])
