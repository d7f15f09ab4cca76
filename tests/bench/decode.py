"""Decoding SmolLM2-135M against transformers (dynamic and static cache) and Tunix: prompt 64, 32 new tokens, float32.

    python -m tests.bench.decode [--peer PYTHON] [--tunix PYTHON] [--rounds 5] [--jobs greedy_1,beam4_8]

The same weights, prompts and threads, stacks in turn; beams count only the sequences returned. `bandwidth`: bytes of
weights read at batch 1 a second, over what this process reads in a plain sum. `beam_of_sampling`: rows a second of 8
beams of 4, over plain sampling of 32 rows. One JSON line. The peer needs torch and transformers in PYTHON, Tunix
google-tunix. Goals against transformers: batch 1 1.6 x, batch 8 2.5 x, beam 4 3 x at batch 1 and 2.5 x at batch 8;
against Tunix 1.7 x at batch 8; bandwidth 0.8; beams 0.85 of sampling.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.decode_jobs import JOBS, NEW
from tests.bench.duel import Worker, export, median


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", default=None, help="no peer: only our own figures")
    parser.add_argument("--tunix", default=None, help="a Python that has google-tunix")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", default=",".join(JOBS))
    args = parser.parse_args()
    jobs = args.jobs.split(",")
    with tempfile.TemporaryDirectory() as folder:
        path = export(Path(folder))
        workers = {"ours": Worker(sys.executable, "decode_ours", path)}
        if args.peer:
            workers |= {kind: Worker(args.peer, "decode_torch", kind, path) for kind in ("dynamic", "static")}
        if args.tunix:
            workers["tunix"] = Worker(args.tunix, "decode_tunix", path)
        result: dict[str, Any] = {"bench": "decode", **{name: worker.hello for name, worker in workers.items()}}
        taken: dict[tuple[str, str], list[dict[str, float]]] = {}
        for job in jobs:
            for name, worker in workers.items():
                worker.ask("job", job=job)  # warm: compiled
                taken[name, job] = []
            for _ in range(args.rounds):
                for name, worker in workers.items():
                    taken[name, job].append(worker.ask("job", job=job))
            result[job] = {
                name: round(median(s["tokens"] / s["seconds"] for s in taken[name, job]), 1) for name in workers
            }
            for name in set(workers) - {"ours"}:
                pairs = list(zip(taken[name, job], taken["ours", job], strict=True))
                result[job][f"vs_{name}"] = median(p["seconds"] / o["seconds"] for p, o in pairs)
                result[job][f"vs_{name}_cpu"] = median(p["cpu"] / o["cpu"] for p, o in pairs)
        ours = workers["ours"]
        if "greedy_1" in jobs:  # what 32 more tokens cost: without the prompt's share
            ours.ask("job", job="greedy_1", new=2 * NEW)
            shares = []
            for _ in range(args.rounds):
                short, long = ours.ask("job", job="greedy_1"), ours.ask("job", job="greedy_1", new=2 * NEW)
                step = (long["seconds"] - short["seconds"]) / NEW
                shares.append(ours.hello["weights"] / step / ours.ask("read")["bytes_per_second"])
            result["bandwidth"] = median(shares)
        if "beam4_8" in jobs:
            ours.ask("job", job="sample_8", rows=32)
            ratios = []
            for _ in range(args.rounds):
                plain, beams = ours.ask("job", job="sample_8", rows=32), ours.ask("job", job="beam4_8")
                ratios.append(plain["seconds"] / beams["seconds"])
            result["beam_of_sampling"] = median(ratios)
        result["peak_gib"] = {name: round(worker.ask("memory")["peak_gib"], 2) for name, worker in workers.items()}
        for worker in workers.values():
            worker.close()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
