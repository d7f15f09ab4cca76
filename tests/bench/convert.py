"""`purestep convert` from folder to folder, against `cp` of the same bytes and transformers' load and save.

    python -m tests.bench.convert [--size 0.5b] [--rounds 3] [--peer PYTHON] [--folder TMP]

A Llama checkpoint of random bfloat16 bytes, made on the fly and deleted after, in turn: `cp`, `cp` with a sync of what
it wrote, ours, ours with another dtype, the peer's from_pretrained and save_pretrained. Wall seconds, and the peak of
anonymous memory above what the imports take (ours also against twice the largest stacked tensor); `inner`: without the
start of Python. What we write is synced, so `of_cp_synced` compares like with like. One JSON line.
Goals: at most 1.5 x cp, grown at most `allowed`. --size 8b needs 40 GB of disk; --size tiny tries the script out.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.duel import MARK, ROOT, median

# hidden, ffn, layers, heads, kv heads, vocabulary
SIZES = {
    "tiny": (64, 256, 2, 4, 2, 512),
    "0.5b": (1024, 4864, 22, 16, 4, 65536),
    "8b": (4096, 14336, 32, 32, 8, 128256),
}
OURS = """
import sys, json, time
from train import cli
from tests.bench.memory import Peak
import convert.conversion
began = time.perf_counter()
with Peak(0.01) as peak:
    cli.app(["convert", *sys.argv[1:]], standalone_mode=False)
print("@@" + json.dumps({"inner": time.perf_counter() - began, "grown": peak.grown}))
"""
THEIRS = """
import sys, json, time
import torch
from transformers import AutoModelForCausalLM
from tests.bench.memory import Peak
began = time.perf_counter()
with Peak(0.01) as peak:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).save_pretrained(sys.argv[2])
print("@@" + json.dumps({"inner": time.perf_counter() - began, "grown": peak.grown}))
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", default=None, help="a Python with torch and transformers")
    parser.add_argument("--folder", default=None, help="where to write; default: the system's temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        here = Path(name)
        nbytes, largest = make(here / "source", args.size)
        result: dict[str, Any] = {"bench": "convert", "size": args.size, "bytes": nbytes}
        result |= measure(here, args.rounds, args.peer)
        allowed = 2 * largest
        result |= {"allowed": allowed, "of_cp": ratio(result, "cp"), "of_cp_synced": ratio(result, "cp_synced")}
        if args.peer:
            result["of_transformers"] = ratio(result, "transformers")
        for job, times in (("ours", 1), ("ours_float32", 2)):
            result[job]["of_allowed"] = round(result[job]["grown"] / (allowed * times), 3)
    print(json.dumps(result))


def ratio(result: dict[str, Any], peer: str) -> float:
    return round(result["ours"]["seconds"] / result[peer]["seconds"], 3)


def make(folder: Path, size: str) -> tuple[int, int]:
    """A checkpoint of random bytes, in files as transformers cuts them; its bytes, and those of the largest stack."""
    from convert.hf import write_configs, write_shards
    from convert.tables import rows
    from convert.tensors import DTYPES, Outgoing
    from model.families import architecture_from_hf

    hidden, ffn, layers, heads, kv_heads, vocabulary = SIZES[size]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocabulary, "hidden_size": hidden,
        "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "hidden_act": "silu", "tie_word_embeddings": False,
    }  # fmt: skip
    arch, rng, kind = architecture_from_hf(config), np.random.default_rng(0), DTYPES["BF16"]

    def draw(shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
        # 15 random bits of small numbers: no infinity, no NaN
        return lambda: (rng.integers(0, 1 << 15, shape, np.uint16) & 0xBFFF).view(kind)

    tensors = [
        Outgoing(n, r.their_shape(arch), kind, draw(r.their_shape(arch))) for r in rows(arch) for n in r.names(arch)
    ]
    folder.mkdir()
    write_configs(folder, tensors, arch, config, None)
    write_shards(folder, tensors, 5_000_000_000)
    stacks = [2 * int(np.prod(row.shape(arch))) for row in rows(arch)]
    return sum(t.nbytes for t in tensors), max(stacks)


def measure(here: Path, rounds: int, peer: str | None) -> dict[str, Any]:
    source, out = str(here / "source"), here / "out"
    jobs: dict[str, list[str]] = {
        "cp": ["cp", "-r", source, str(out)],
        "cp_synced": ["sh", "-c", f"cp -r '{source}' '{out}' && sync '{out}'/*"],
        "ours": [sys.executable, "-c", OURS, source, str(out)],
        "ours_float32": [sys.executable, "-c", OURS, source, str(out), "--dtype", "float32"],
    }
    if peer:
        jobs["transformers"] = [peer, "-c", THEIRS, source, str(out)]
    taken: dict[str, list[dict[str, float]]] = {job: [] for job in jobs}
    for _ in range(rounds):
        for job, command in jobs.items():
            os.sync()  # nobody writes what another has left to be written
            taken[job].append(run(command))
            shutil.rmtree(out)
    return {
        job: {
            "seconds": median(one["seconds"] for one in runs),
            "seconds_range": [round(f(one["seconds"] for one in runs), 3) for f in (min, max)],
            **(
                {"inner": median(one["inner"] for one in runs), "grown": int(max(one["grown"] for one in runs))}
                if "grown" in runs[0]
                else {}
            ),
        }
        for job, runs in taken.items()
    }


def run(command: list[str]) -> dict[str, float]:
    """Wall seconds of the whole process, and what it says of itself."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{command[:3]}: {done.stderr[-2000:]}")
    said = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    return {"seconds": seconds, **(json.loads(said[-1].removeprefix(MARK)) if said else {})}


if __name__ == "__main__":
    main()
