"""Anonymous memory (RssAnon, sampled) while a checkpoint is read, over what the imports take.

    python -m tests.bench.load_memory [MODEL] [--dtype float32]

MODEL: a named model, a GGUF file or a Hugging Face folder; without one, the named GGUF and its export. One JSON line.
Goal: at most the model in its target dtype + 2 x the largest stacked tensor.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.duel import MODEL, ROOT, export
from tests.bench.memory import Peak


def measure(model: str, dtype: str) -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    from convert.load import load_params, resolve

    jax.jit(lambda x: x @ x)(jnp.ones((8, 8))).block_until_ready()  # the runtime's own threads and pools
    source = resolve(model)
    with Peak() as peak:
        start = time.perf_counter()
        params = jax.block_until_ready(load_params(source, dtype=dtype))
        taken = time.perf_counter() - start
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    allowed = sum(sizes) + 2 * max(sizes)
    return {
        "seconds": round(taken, 2), "baseline_gib": round(peak.baseline / 2**30, 3),
        "grown_gib": round(peak.grown / 2**30, 3),
        "model_gib": round(sum(sizes) / 2**30, 3), "allowed_gib": round(allowed / 2**30, 3),
        "of_allowed": round(peak.grown / allowed, 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    if args.model:
        print(json.dumps({"bench": "load_memory", **vars(args), **measure(args.model, args.dtype)}))
        return
    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, object] = {"bench": "load_memory", "dtype": args.dtype}
        for kind, model in {"gguf": MODEL, "safetensors": export(Path(folder))}.items():
            command = [sys.executable, "-m", "tests.bench.load_memory", model, "--dtype", args.dtype]
            done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
            result[kind] = {k: v for k, v in json.loads(done.stdout.splitlines()[-1]).items() if isinstance(v, float)}
        print(json.dumps(result))


if __name__ == "__main__":
    main()
