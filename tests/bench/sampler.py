"""The sampler's tail: milliseconds from logits to a token, for 1 and 8 rows of 49152 and 151936 tokens.

    python -m tests.bench.sampler [--repeats 20]

The least of all repeats, four draws inside one jitted loop each. One JSON line: {"<processors> <rows> x <tokens>": ms}.
Goals for temperature and top-p: 0.8, 2.2, 3 and 7 ms.
"""

import argparse
import json
import time
from typing import Any

import jax
import jax.numpy as jnp

from decode.choose import sample
from decode.logits import Context, Temperature, TopK, TopP, process

DRAWS = 4
CHAINS = {
    "temperature": (Temperature(0.8),),
    "temperature top_p": (Temperature(0.8), TopP(0.9)),
    "temperature top_k top_p": (Temperature(0.8), TopK(50), TopP(0.9)),
}


@jax.jit
def draw(chain: Any, logits: Any) -> Any:
    """Several draws; each depends on the one before, so none can be left out."""
    rows = logits.shape[0]
    context = Context(jnp.zeros((rows, 8), jnp.int32), jnp.ones(rows, jnp.int32), jnp.ones(rows, jnp.int32))
    seeds = jnp.stack([jnp.arange(rows, dtype=jnp.uint32), jnp.zeros(rows, jnp.uint32)], axis=1)

    def body(i: Any, token: Any) -> Any:
        moved = logits + token[:, None].astype(jnp.float32) * 1e-9
        return sample(process(chain, moved, context), seeds, context.length + i)[0]

    return jax.lax.fori_loop(0, DRAWS, body, jnp.zeros(rows, jnp.int32))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    result: dict[str, Any] = {"bench": "sampler", "jax": jax.__version__}
    for rows, vocab in ((1, 49152), (8, 49152), (1, 151936), (8, 151936)):
        logits = 3 * jax.random.normal(jax.random.key(0), (rows, vocab))
        for name, chain in CHAINS.items():
            draw(chain, logits).block_until_ready()
            best = float("inf")
            for _ in range(args.repeats):
                began = time.perf_counter()
                draw(chain, logits).block_until_ready()
                best = min(best, time.perf_counter() - began)
            result[f"{name} {rows} x {vocab}"] = round(best / DRAWS * 1e3, 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
