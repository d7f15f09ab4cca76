"""Full fine-tuning of SmolLM2-135M against TRL's SFTTrainer (packed and default) and a bare torch loop.

    python -m tests.bench.train_full [--peer PYTHON] [--rounds 5] [--only trl_packed,compiled,tunix] [KEY=VALUE ...]

float32, identical weights, uneven lengths for TRL and us, full rows for the bare and compiled loops and Tunix; real
tokens per second. The peers need torch, transformers and trl in PYTHON, `tunix` needs --tunix PYTHON. One JSON
line. Goals: 1.5 x TRL packed, 2.5 x TRL default, 1.3 x torch.compile, 1.5 x Tunix, 0.6 x TRL's memory, MFU 0.8.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.bench.duel import Worker, against, export, median, rounds, summary


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", default=sys.executable)
    parser.add_argument("--tunix", default=sys.executable, help="a Python that has Tunix")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="trl_packed,trl_default,bare")
    parser.add_argument("--checkpointing", action="store_true", help="TRL's own default; slower, less memory")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = export(Path(folder))
        print(json.dumps(compare("full", args, model, Path(folder))))


def compare(method: str, args: argparse.Namespace, model: str, folder: Path) -> dict:
    extra = ["checkpointing"] if args.checkpointing else []
    workers = {"ours": Worker(sys.executable, "stack_ours", method, model, *args.overrides)}
    dumps = {name: str(folder / f"{name}.npz") for name in args.only.split(",")}
    try:
        for name, path in dumps.items():
            if name == "tunix":
                workers[name] = Worker(args.tunix, "stack_tunix", name, model, path)
            else:
                workers[name] = Worker(args.peer, "stack_torch", name, model, path, *extra)
        losses = {}
        for name, path in dumps.items():  # their first batch under the initial weights, theirs and ours
            first = workers[name].ask("step")
            losses[name] = abs(first["loss"] - workers["ours"].ask("loss", path=path))
        taken = rounds(workers, args.rounds)
        gemms = {name: [worker.ask("gemm") for _ in range(5)] for name, worker in workers.items()}
        memory = {name: round(worker.ask("memory")["peak_gib"], 2) for name, worker in workers.items()}
        hello = {k: v for w in workers.values() for k, v in w.hello.items()}
    finally:
        for worker in workers.values():
            worker.close()
    best = max(g["flops_per_second"] for g in gemms["ours"])
    ours = taken["ours"]
    result = {
        "bench": f"train_{method}", **hello,
        "ours": summary(ours) | {"peak_gib": memory["ours"], "gemm_gflops": round(best / 1e9)},
        "mfu": median(s["flops"] / s["seconds"] / best for s in ours),
        "mfu_best": round(max(s["flops"] / s["seconds"] for s in ours) / best, 3),
    }  # fmt: skip
    for name in dumps:
        ratio = against(ours, taken[name])
        blas = median(g["seconds"] for g in gemms[name]) / median(g["seconds"] for g in gemms["ours"])
        result[name] = summary(taken[name]) | ratio | {
            "software": round(ratio["raw"] / blas, 2), "gemm_ratio": round(blas, 2), "peak_gib": memory[name],
            "memory": round(memory["ours"] / memory[name], 2), "loss_difference": round(losses[name], 7),
        }  # fmt: skip
    return result


if __name__ == "__main__":
    main()
