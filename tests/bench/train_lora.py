"""LoRA (rank 16, every linear layer) against PEFT in a bare torch loop, and against our own full step.

    python -m tests.bench.train_lora [--peer PYTHON] [--rounds 5] [key=value ...]

float32, the same weights; full rows for PEFT, packed rows of uneven lengths for us. One JSON line. The peer
needs torch, transformers and peft in PYTHON. Goals: 1.25 x PEFT, at most 0.75 of the full step's time.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.bench.duel import Worker, export, median, rounds
from tests.bench.train_full import compare


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    args.only, args.checkpointing = "peft", False
    with tempfile.TemporaryDirectory() as folder:
        model = export(Path(folder))
        result = compare("lora", args, model, Path(folder))
        both = {m: Worker(sys.executable, "stack_ours", m, model, *args.overrides) for m in ("lora", "full")}
        taken = rounds(both, args.rounds)
        for worker in both.values():
            worker.close()
    for field in ("seconds", "cpu"):
        shares = [a[field] / b[field] for a, b in zip(taken["lora"], taken["full"], strict=True)]
        result[f"of_full_{field}"] = median(shares)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
