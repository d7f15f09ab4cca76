"""DPO of SmolLM2-135M against TRL's DPOTrainer and against our own SFT, on the same pairs.

    python -m tests.bench.dpo [--peer PYTHON] [--rounds 5] [--only trl_dpo,trl_dpo_cached] [--data identity,long]

float32, full fine-tuning, cached reference, shared prompts; batches of 4 rows x 256 for us, of 4 pairs for TRL. Tokens
are those of prompt and chosen and of prompt and rejected, on all sides; `positions` are what we compute of them. SFT
trains on the same sequences. `online`: LoRA with the reference computed in each step, over LoRA with a cached one.
Data: the pairs of dpo_identity; `long`: prompts three times as long as completions. One JSON line.
Goals: tokens/s 0.9 x own SFT's, 2 x TRL's (3 x on long), online 1.25, memory within 1.1 of SFT's.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from tests.bench import rows
from tests.bench.duel import Worker, against, export, median, rounds, summary


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="trl_dpo,trl_dpo_cached")
    parser.add_argument("--data", default="identity,long")
    parser.add_argument("--checkpointing", action="store_true", help="TRL's own default; slower, less memory")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # where the reference's log-probs are kept
        model = export(Path(folder))
        made = {"identity": f"{folder}/identity.jsonl", "long": rows.write(f"{folder}/long.jsonl", rows.pairs())}
        Worker(sys.executable, "stack_ours", "pairs", model, made["identity"]).close()
        found = {name: compare(args, model, made[name]) for name in args.data.split(",")}
        print(json.dumps({"bench": "dpo", **found}))


def compare(args: argparse.Namespace, model: str, path: str) -> dict:
    """All measurements on one file of pairs."""
    sequences = rows.write(path.replace(".jsonl", "_sft.jsonl"), rows.sequences(rows.read(path)))
    workers = {
        "dpo": Worker(sys.executable, "stack_ours", "recipe", "dpo", model, path, *args.overrides),
        "sft": Worker(sys.executable, "stack_ours", "recipe", "sft", model, sequences, *args.overrides),
    }
    extra, peers = (["checkpointing"] if args.checkpointing else []), [name for name in args.only.split(",") if name]
    try:
        for name in peers:
            workers[name] = Worker(args.peer, "stack_torch", name, model, path, *extra)
        taken = rounds(workers, args.rounds)
        gemms = {name: [worker.ask("gemm") for _ in range(5)] for name, worker in workers.items()}
        memory = {name: round(worker.ask("memory")["peak_gib"], 2) for name, worker in workers.items()}
        result = {k: v for w in workers.values() for k, v in w.hello.items()}
    finally:
        for worker in workers.values():
            worker.close()
    best = max(g["flops_per_second"] for g in gemms["dpo"])
    for name, steps in taken.items():
        result[name] = summary(steps) | {"peak_gib": memory[name], "loss": round(steps[0]["loss"], 4)}
        if name != "sft":
            rate = sum(s["pairs"] for s in steps) / sum(s["seconds"] for s in steps)
            result[name]["pairs_per_second"] = round(rate, 3)
    ours, sft = taken["dpo"], taken["sft"]
    share = sum(s["positions"] for s in ours) / sum(s["tokens"] for s in ours)
    result["dpo"] |= {
        "positions_of_tokens": round(share, 3),
        "mfu": median(s["flops"] / s["seconds"] / best for s in ours),
    }
    result["of_sft"] = against(ours, sft) | {"memory": round(memory["dpo"] / memory["sft"], 3)}
    result["of_sft"]["positions"] = against(*([s | {"tokens": s["positions"]} for s in x] for x in (ours, sft)))["raw"]
    for name in peers:
        ratio, blas = (
            against(ours, taken[name]),
            median(g["seconds"] for g in gemms[name]) / median(g["seconds"] for g in gemms["dpo"]),
        )
        result[name] |= ratio | {
            "software": round(ratio["raw"] / blas, 2), "gemm_ratio": round(blas, 2),
            "memory": round(memory["dpo"] / memory[name], 2),
        }  # fmt: skip
    lora = ["tune.method=lora", *args.overrides]
    both = {
        kind: Worker(sys.executable, "stack_ours", "recipe", "dpo", model, path, f"objective.reference={kind}", *lora)
        for kind in ("cached", "adapterless")
    }
    try:
        taken = rounds(both, args.rounds)
    finally:
        for worker in both.values():
            worker.close()
    return result | {"online": against(taken["cached"], taken["adapterless"])}


if __name__ == "__main__":
    main()
