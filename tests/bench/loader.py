"""Raw text to batches, against what a training step of SmolLM2-135M takes, and against `tokenizers` alone.

    python -m tests.bench.loader [--files N] [--steps N]

Texts of the Python standard library, SmolLM2's tokenizer, rows of 1024. `cold`: the loader tokenises as it goes;
`warm`: what it has tokenised already; `encode_batch`: tokenizers on the same texts, all cores; `waste`: share of
positions that are padding. One JSON line. Goals: warm and cold 5 x what a step takes, tokenising as fast as
encode_batch, waste below 2 %.
"""

import argparse
import json
import sys
import time

from tests.bench.duel import MODEL, Worker, median


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    result = {"bench": "loader", **{packing: load(args.files, packing) for packing in ("concat", "best_fit")}}
    result["encode_batch"] = encode(args.files)
    worker = Worker(sys.executable, "stack_ours", "full", MODEL)
    worker.ask("step")
    steps = [worker.ask("step") for _ in range(args.steps)]
    worker.close()
    result["step_tokens_per_second"] = median(s["tokens"] / s["seconds"] for s in steps)
    for packing in ("concat", "best_fit"):
        result[packing]["of_a_step"] = round(result[packing]["cold"] / result["step_tokens_per_second"], 1)
    print(json.dumps(result))


def texts(files: int) -> list[str]:
    from data.sources import open_source

    records = open_source("python_stdlib")
    return [records[i]["text"] for i in range(0, len(records), max(1, len(records) // files))][:files]


def load(files: int, packing: str) -> dict[str, float]:
    """Tokens a second of a loader over the texts, first and second time round, and the padding."""
    from configs.data import Data
    from convert.load import load_tokenizer, resolve
    from data.examples import Examples
    from data.loader import Loader

    data = Data(train=("python_stdlib",), packing=packing, truncation="split", max_length=1024, prefetch=0)
    examples = Examples([{"text": text} for text in texts(files)], load_tokenizer(resolve(MODEL)), data)
    rates, filled, positions = [], 0, 0
    for _ in range(2):
        loader, began, tokens = Loader(examples, data, 4, epochs=1), time.perf_counter(), 0
        for batch in loader:
            tokens += int((batch["segments"] > 0).sum())
            filled, positions = filled + int((batch["segments"] > 0).sum()), positions + batch["segments"].size
        rates.append(tokens / (time.perf_counter() - began))
    return {"cold": round(rates[0]), "warm": round(rates[1]), "waste": round(1 - filled / positions, 4)}


def encode(files: int) -> float:
    """Tokens a second of tokenizers' encode_batch."""
    from convert.load import load_tokenizer, resolve

    backend = load_tokenizer(resolve(MODEL)).codec.backend  # type: ignore[attr-defined]
    batch = texts(files)
    began = time.perf_counter()
    found = backend.encode_batch(batch)
    return round(sum(len(one.ids) for one in found) / (time.perf_counter() - began))


if __name__ == "__main__":
    main()
