"""What the host adds to a step, besides the device's work: handing it over, and placing its batch. No peer.

    python -m tests.bench.host_overhead

SmolLM2-135M, 4 x 256; the device is idle when the clock starts, so nothing hides behind its work as it does in the
loop, which hands over a step while the one before still runs. One JSON line. Goal: under 1 ms a step, one trace.
"""

import json
import sys

from tests.bench.duel import MODEL, Worker, median


def main() -> None:
    result = {"bench": "host_overhead"}
    for method in ("full", "lora"):
        worker = Worker(sys.executable, "stack_ours", method, MODEL)
        worker.ask("step")
        taken = [worker.ask("host") for _ in range(7)]
        worker.close()
        result |= {"jax": worker.hello["jax"], f"{method}_ms": median(1e3 * t["seconds"] for t in taken)}
        result[f"{method}_place_ms"] = median(1e3 * t["place"] for t in taken)
        result[f"{method}_traces"] = int(taken[-1]["traces"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
