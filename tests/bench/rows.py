"""The data of the training benchmarks: random sequences of uneven lengths, the same for every stack. Only numpy."""

import json
from collections.abc import Iterator
from pathlib import Path
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


def pairs(count: int = 64, seed: int = 0) -> list[Example]:
    """Preferences of random tokens, completions of 12 to 64, log-uniform, after prompts three times as long."""
    rng = np.random.default_rng(seed)
    made = []
    for sizes in np.exp(rng.uniform(np.log(12), np.log(65), (count, 2))).astype(int):
        lengths = {"prompt_tokens": 3 * int(sizes.mean()), "chosen_tokens": sizes[0], "rejected_tokens": sizes[1]}
        made.append({name: rng.integers(20, VOCAB, n).tolist() for name, n in lengths.items()})
    return made


def sequences(made: list[Example]) -> list[Example]:
    """Each pair as two rows for SFT: prompt and chosen, prompt and rejected."""
    return [
        {
            "tokens": [*pair["prompt_tokens"], *pair[side]],
            "weights": [0] * len(pair["prompt_tokens"]) + [1] * len(pair[side]),
        }
        for pair in made
        for side in ("chosen_tokens", "rejected_tokens")
    ]


def read(path: str) -> list[Example]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write(path: str, made: list[Example]) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def contents(batch: dict[str, np.ndarray]) -> dict[str, float]:
    """The tokens of our batch's sequences, a prompt counted with each completion as peers compute it; and its pairs."""
    tokens = pairs = 0
    for r, segments in enumerate(batch["segments"]):
        for segment in range(1, int(segments.max()) + 1):
            inside = segments == segment
            if "branches" in batch:
                prompt = 1 + int((batch["branches"][r][inside] == 0).sum())
                tokens, pairs = tokens + 2 * prompt + int((batch["branches"][r][inside] > 0).sum()), pairs + 1
            else:
                tokens += 1 + int(inside.sum())
    return {"tokens": float(tokens), "pairs": float(pairs)}


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


def letters(completions: list[Any], **_: Any) -> list[float]:
    """A reward that hardly ever is the same for two completions: the share of the letter e."""
    texts = [one[0]["content"] for one in completions]
    return [text.count("e") / max(1, len(text)) for text in texts]
