"""How long until something happens: importing the command, and the first training step, cold and with a warm cache.

    python -m tests.bench.start_up [--import-only]

SmolLM2-135M, full fine-tuning, batches of 4 x 256; the model's file is fetched beforehand. One JSON line.
Goals: import under 2 s, first step under 60 s cold on 2 cores, under half of that warm.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.bench import rows
from tests.bench.duel import MODEL, ROOT, median


def seconds(command: list[str], env: dict[str, str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def write_rows(path: Path) -> None:
    """Already tokenised rows that all carry loss and end as the model ends a turn."""
    with path.open("w") as file:
        for example in rows.uneven(64):
            tokens = [*example["tokens"][:-1].tolist(), 2]
            file.write(json.dumps({"tokens": tokens, "weights": np.ones(len(tokens)).tolist()}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--import-only", action="store_true")
    args = parser.parse_args()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    imports = [seconds([sys.executable, "-c", "import train.cli"], env) for _ in range(5)]
    helps = [seconds([sys.executable, "-m", "train.cli", "--help"], env) for _ in range(3)]
    result = {"bench": "start_up", "python": sys.version.split()[0], "import": median(imports), "help": median(helps)}
    if not args.import_only:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_rows(folder / "rows.jsonl")
            # the cache folder alone is fresh: the model is not fetched again
            env["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")
            env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
            env["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
            for kind in ("cold", "warm"):
                result[f"first_step_{kind}"] = round(first_step(folder, kind, env), 1)
    print(json.dumps(result))


def first_step(folder: Path, kind: str, env: dict[str, str]) -> float:
    """Seconds from the start of the process to the first line of metrics.jsonl."""
    output = folder / kind
    command = [
        sys.executable, "-m", "train.cli", "train", "sft", f"model.source={MODEL}",
        f"data.train={folder / 'rows.jsonl'}", f"data.max_length={rows.LENGTH}", f"train.batch_size={rows.ROWS}",
        "train.epochs=null", "train.steps=2",
        "checkpoint.enabled=false", "export.enabled=false", f"output={output}",
    ]  # fmt: skip
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
        metrics = output / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None:
                log.seek(0)
                raise RuntimeError(log.read()[-3000:])
            time.sleep(0.05)
        taken = time.perf_counter() - start
        process.wait()
    return taken


if __name__ == "__main__":
    main()
