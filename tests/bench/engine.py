"""The decoding engine on lengths with a long tail: refilled slots against static batches, and how full the slots were.

    python -m tests.bench.engine [--rows 96] [--slots 8] [--rounds 3]

SmolLM2-135M, float32, prompts of 16 to 64 tokens, 4 to 256 new ones (log-normal, median 20), of which the engine knows
only the upper bound. Static batches are the same engine run batch by batch: one lasts as long as its longest row. One
JSON line. Goals: 0.9 of the slots live while rows wait, 2 x static.
"""

import argparse
import json
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decode.engine import Stats
from decode.generate import Sampling, generate
from decode.load import load_model
from decode.logits import Context, register
from tests.bench.duel import median

MOST = 256


@register(meta_fields=("eos",))
@dataclass(frozen=True)
class EndAt:
    """End a row at the length that its first token names: nobody else knows it before."""

    eos: int

    def __call__(self, logits: Any, context: Context) -> Any:
        made = context.length - context.prompt_length + 1
        end = (made >= context.tokens[:, 0])[:, None]
        is_eos = jnp.arange(logits.shape[1])[None] == self.eos
        return jnp.where(end == is_eos, logits, -jnp.inf)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model, rng = load_model("smollm2-135m-instruct", dtype="float32", unroll=True), np.random.default_rng(0)
    prompts = [rng.integers(1000, 40000, rng.integers(16, 65)).tolist() for _ in range(args.rows)]
    lengths = np.clip(np.exp(rng.normal(3, 1, args.rows)), 4, MOST).astype(int)
    for prompt, length in zip(prompts, lengths, strict=True):
        prompt[0] = int(length)  # the processor reads there when to end
    sampling = Sampling(max_new_tokens=MOST, processors=(EndAt(int(model.eos_ids[0])),))

    def refilled() -> Stats:
        stats = Stats()
        generate(model, prompts, sampling, batch_size=args.slots, stats=stats)
        return stats

    def static() -> Stats:
        stats = Stats()
        for at in range(0, args.rows, args.slots):
            generate(model, prompts[at : at + args.slots], sampling, stats=stats)
        return stats

    seconds: dict[str, list[float]] = {"refilled": [], "static": []}
    found: dict[str, Stats] = {}
    for number in range(args.rounds + 1):  # the first one compiles
        for name, run in (("refilled", refilled), ("static", static)):
            began = time.perf_counter()
            found[name] = run()
            if number:
                seconds[name].append(time.perf_counter() - began)
    ours = found["refilled"]
    result = {
        "bench": "engine",
        "jax": jax.__version__,
        "rows": args.rows,
        "slots": args.slots,
        "tokens": int(lengths.sum()),
        "tokens_per_second": round(int(lengths.sum()) / median(seconds["refilled"]), 1),
        "live": round(ours.share, 3),
        "live_while_rows_wait": round(ours.share_waited, 3),
        "live_static": round(found["static"].share, 3),
        "steps": ours.steps,
        "steps_static": found["static"].steps,
        "prefill_share": round(ours.seconds["prefill"] / sum(ours.seconds.values()), 3),
        "vs_static": median(s / r for s, r in zip(seconds["static"], seconds["refilled"], strict=True)),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
