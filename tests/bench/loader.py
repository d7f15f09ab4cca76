"""Raw text to batches, against what a training step of SmolLM2-135M takes, and against `tokenizers` alone.

    python -m tests.bench.loader [--files N] [--steps N] [--rounds N]

Texts of the Python standard library, SmolLM2's tokenizer, rows of 1024. `cold`: the loader tokenises as it goes;
`warm`: what it has tokenised already; `encode_batch`: tokenizers on the same texts, all cores; `waste`: share of
positions that are padding. One JSON line. Goals: warm and cold 5 x what a step takes, tokenising as fast as
encode_batch (in turn, median), waste below 2 %.
"""

import argparse
import json
import sys
import time
from typing import Any

from tests.bench.duel import MODEL, Worker, median


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    kinds = ("concat", "best_fit")
    made = texts(args.files)
    taken = [{**{kind: load(made, kind) for kind in kinds}, "encode": encode(made)} for _ in range(args.rounds + 1)][1:]
    worker = Worker(sys.executable, "stack_ours", "full", MODEL)
    worker.ask("step")
    steps = [worker.ask("step") for _ in range(args.steps)]
    worker.close()
    step = median(s["tokens"] / s["seconds"] for s in steps)
    result: dict[str, Any] = {"bench": "loader", "encode_batch": median(r["encode"] for r in taken), "step": step}
    for kind in kinds:
        found = {name: median(r[kind][name] for r in taken) for name in taken[0][kind]}
        ratios = [r[kind]["cold"] / r["encode"] for r in taken]
        result[kind] = found | {
            "of_a_step": round(found["cold"] / step, 1), "of_encode_batch": median(ratios),
            "range": [round(min(ratios), 2), round(max(ratios), 2)],
        }  # fmt: skip
    print(json.dumps(result))


def texts(files: int) -> list[str]:
    from data.sources import open_source

    records = open_source("python_stdlib")
    return [records[i]["text"] for i in range(0, len(records), max(1, len(records) // files))][:files]


def load(made: list[str], packing: str) -> dict[str, float]:
    """Tokens a second of a loader over the texts, first and second time round, and the padding."""
    from configs.data import Data
    from convert.load import load_tokenizer, resolve
    from data.examples import Examples
    from data.loader import Loader

    data = Data(train=("python_stdlib",), packing=packing, truncation="split", max_length=1024, prefetch=0)
    examples = Examples([{"text": text} for text in made], load_tokenizer(resolve(MODEL)), data)
    rates, filled, positions = [], 0, 0
    for _ in range(2):
        loader, began, tokens = Loader(examples, data, 4, epochs=1), time.perf_counter(), 0
        for batch in loader:
            tokens += int((batch["segments"] > 0).sum())
            filled, positions = filled + int((batch["segments"] > 0).sum()), positions + batch["segments"].size
        rates.append(tokens / (time.perf_counter() - began))
    return {"cold": round(rates[0]), "warm": round(rates[1]), "waste": round(1 - filled / positions, 4)}


def encode(made: list[str]) -> float:
    """Tokens a second of tokenizers' encode_batch."""
    from convert.load import load_tokenizer, resolve

    backend = load_tokenizer(resolve(MODEL)).codec.backend  # type: ignore[attr-defined]
    began = time.perf_counter()
    found = backend.encode_batch(made)
    return round(sum(len(one.ids) for one in found) / (time.perf_counter() - began))


if __name__ == "__main__":
    main()
