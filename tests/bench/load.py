"""From the start of the process to the first generated token of SmolLM2-135M, against transformers.

    python -m tests.bench.load [--rounds 5] [--peer PYTHON]

Both read the same float32 Hugging Face folder, take one prompt of 5 words and make one token greedily; ours with a warm
compilation cache. Whole processes in turn, wall seconds, median. One JSON line. Goal: ratio at most 1.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.convert import run
from tests.bench.duel import export, median

PROMPT = "The capital of France is"
OURS = """
import sys, json, time
began = time.perf_counter()
from sharding.compile_cache import enable_compilation_cache
enable_compilation_cache()
from decode.generate import Sampling, generate
from decode.load import load_model
model = load_model(sys.argv[1])
loaded = time.perf_counter()
(made,) = generate(model, [sys.argv[2]], Sampling(1))
print("@@" + json.dumps({"load": loaded - began, "token": made.tokens[0], "inner": time.perf_counter() - began}))
"""
THEIRS = """
import sys, json, time
began = time.perf_counter()
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
loaded = time.perf_counter()
ids = tokenizer(sys.argv[2], return_tensors="pt")
made = model.generate(**ids, max_new_tokens=1, do_sample=False)
print("@@" + json.dumps({"load": loaded - began, "token": int(made[0, -1]), "inner": time.perf_counter() - began}))
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", default=None, help="a Python with torch and transformers")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(name) / "cache")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        folder = export(Path(name))
        jobs = {"ours": [sys.executable, "-c", OURS, folder, PROMPT]}
        if args.peer:
            jobs["transformers"] = [args.peer, "-c", THEIRS, folder, PROMPT]
        result: dict[str, Any] = {"bench": "load", "cold": round(run(jobs["ours"])["seconds"], 2)}
        taken: dict[str, list[dict[str, float]]] = {job: [] for job in jobs}
        for _ in range(args.rounds):
            for job, command in jobs.items():
                taken[job].append(run(command))
    for job, runs in taken.items():
        result[job] = {field: median(one[field] for one in runs) for field in ("seconds", "load", "inner")}
    if args.peer:
        assert taken["ours"][0]["token"] == taken["transformers"][0]["token"]
        pairs = zip(taken["ours"], taken["transformers"], strict=True)
        result["of_transformers"] = median(ours["seconds"] / theirs["seconds"] for ours, theirs in pairs)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
