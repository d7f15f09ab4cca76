"""Stacks side by side: one process each, steps taken in turn (A B A B ...), so that a noisy machine hits all alike.

A worker is a process that answers each JSON line on stdin with one on stdout, marked MARK. What the ratios mean:
raw = seconds of the peer / seconds of ours, median over rounds; cpu = the same of CPU seconds, which a busy machine
changes less; software = raw / (the same ratio of a bare matrix product), what is left when the BLAS is taken out.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MARK = "@@"
ROOT = Path(__file__).resolve().parents[2]
MODEL = "smollm2-135m-instruct"
GEMM = (1024, 576, 1536)  # one of the model's own products: tokens x d_model x d_ff


def serve(answers: dict[str, Any]) -> None:
    """The worker's side: {"do": name, ...arguments} -> answers[name](**arguments), until stdin ends."""
    for line in sys.stdin:
        request = json.loads(line)
        reply(answers[request.pop("do")](**request))


def reply(value: Any) -> None:
    print(MARK + json.dumps(value), flush=True)


def timed(work: Any) -> dict[str, float]:
    """Seconds and CPU seconds of work(), which returns extra fields or None."""
    wall, cpu = time.perf_counter(), time.process_time()
    extra = work() or {}
    return {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu, **extra}


def peak_gib() -> dict[str, float]:
    """The process's largest resident memory so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {"peak_gib": int(line.split()[1]) / 2**20}


class Worker:
    """A stack in its own process; `python` may be another interpreter than ours."""

    def __init__(self, python: str, module: str, *arguments: str) -> None:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
        env |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [python, "-m", f"tests.bench.{module}", *arguments],
            cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
        )  # fmt: skip
        self.hello = self._answer()

    def ask(self, do: str, **arguments: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line[len(MARK) :])
        self.log.seek(0)
        raise RuntimeError(f"{self.process.args} ended:\n{self.log.read()[-3000:]}")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def rounds(workers: dict[str, Worker], count: int, do: str = "step") -> dict[str, list[dict[str, float]]]:
    """Each worker's answers: one warm-up, then `count` rounds in turn."""
    for worker in workers.values():
        worker.ask(do)
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for _ in range(count):
        for name, worker in workers.items():
            taken[name].append(worker.ask(do))
    return taken


def median(values: Any) -> float:
    return round(statistics.median(values), 4)


def per_token(steps: list[dict[str, float]], field: str) -> list[float]:
    return [step[field] / step["tokens"] for step in steps]


def against(ours: list[dict[str, float]], peer: list[dict[str, float]]) -> dict[str, Any]:
    """How much longer the peer takes for a real (not padding) token, round by round."""
    result: dict[str, Any] = {}
    for name, field in {"raw": "seconds", "cpu": "cpu"}.items():
        ratios = [p / o for p, o in zip(per_token(peer, field), per_token(ours, field), strict=True)]
        result |= {name: median(ratios), f"{name}_range": [round(min(ratios), 2), round(max(ratios), 2)]}
    return result


def summary(steps: list[dict[str, float]]) -> dict[str, float]:
    rate = sum(s["tokens"] for s in steps) / sum(s["seconds"] for s in steps)
    best = max(s["tokens"] / s["seconds"] for s in steps)
    return {"seconds": median(s["seconds"] for s in steps), "tokens_per_second": round(rate, 1), "best": round(best, 1)}


def export(folder: Path, python: str = sys.executable) -> str:
    """The named model as a Hugging Face folder: the same float32 weights for every stack."""
    worker = Worker(python, "stack_ours", "export", str(folder / "model"))
    worker.close()
    return str(folder / "model")
