"""Causal attention with grouped heads, forwards and backwards, against torch's scaled_dot_product_attention.

    python -m tests.bench.attention [--peer PYTHON] [--rounds 5] [--lengths 256,512,1024,2048,4096]

SmolLM2-135M's heads (9 queries, 3 keys, 64 wide), one row, float32, 2 threads, in turn; each process makes the same
numbers, and the gradients' sums of squares must agree. `peer`: torch's time over ours, medians (torch repeats the keys
outside the clock); `reference`: that of model/attention.py's reference. One JSON line.
"""

import argparse
import json
import sys
from typing import Any

import numpy as np

from tests.bench.duel import Worker, median, peak_gib, reply, rounds, serve, timed

HEADS, KEYS, WIDTH = 9, 3, 64


def made(length: int) -> list[np.ndarray]:
    """q, k, v and the gradient of the result, [1, T, heads, H]."""
    rng = np.random.default_rng(length)
    return [rng.normal(size=(1, length, n, WIDTH)).astype(np.float32) for n in (HEADS, KEYS, KEYS, HEADS)]


def ours(length: int, backend: str) -> Any:
    import jax
    import jax.numpy as jnp

    from model.attention import attend
    from model.mask import self_attention

    mask = self_attention(jnp.arange(length)[None], jnp.ones((1, length), jnp.int32))
    given = [jnp.asarray(x) for x in made(length)]
    both = jax.jit(lambda q, k, v, g: jax.vjp(lambda *x: attend(*x, mask, backend), q, k, v)[1](g))
    return lambda: jax.block_until_ready(both(*given))


def theirs(length: int) -> Any:
    import torch

    torch.set_num_threads(2)
    q, k, v, g = (torch.tensor(x).transpose(1, 2).contiguous() for x in made(length))
    k, v = (x.repeat_interleave(HEADS // KEYS, dim=1) for x in (k, v))
    for x in (q, k, v):
        x.requires_grad_()

    def both() -> Any:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.autograd.grad(out, (q, k, v), g)

    return both


def work(stack: str, length: int) -> None:
    """One stack's worker."""
    both = theirs(length) if stack == "torch" else ours(length, stack)
    grads: list[Any] = []

    def step() -> None:
        grads[:] = both()

    def squares(i: int, x: Any) -> float:
        x = np.asarray(x, np.float64)
        if stack == "torch" and i:  # of keys and values torch's are of each query head
            x = x.reshape(KEYS, HEADS // KEYS, length, WIDTH).sum(1)
        return float((x**2).sum())

    def answer() -> dict[str, Any]:
        return timed(step) | {"squares": [squares(i, x) for i, x in enumerate(grads)]}

    reply({})
    serve({"step": answer, "memory": peak_gib})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", default="256,512,1024,2048,4096")
    parser.add_argument("--work", nargs=2)
    args = parser.parse_args()
    if args.work:
        return work(args.work[0], int(args.work[1]))
    result: dict[str, Any] = {"bench": "attention"}
    for length in args.lengths.split(","):
        stacks = {"chunked": sys.executable, "reference": sys.executable, "torch": args.peer}
        workers = {name: Worker(python, "attention", "--work", name, length) for name, python in stacks.items()}
        try:
            taken = rounds(workers, args.rounds)
            memory = {name: worker.ask("memory")["peak_gib"] for name, worker in workers.items()}
        finally:
            for worker in workers.values():
                worker.close()
        first: dict[str, Any] = {name: steps[0]["squares"] for name, steps in taken.items()}
        for name in ("reference", "torch"):
            np.testing.assert_allclose(first["chunked"], first[name], rtol=1e-5)
        seconds = {name: [step["seconds"] for step in steps] for name, steps in taken.items()}
        ratio = lambda name: median(p / o for p, o in zip(seconds[name], seconds["chunked"], strict=True))  # noqa: B023, E731
        result[length] = {
            "milliseconds": round(median(seconds["chunked"]) * 1e3, 2),
            "peer": round(ratio("torch"), 2),
            "reference": round(ratio("reference"), 2),
            "gib": {name: round(peak, 2) for name, peak in memory.items()},
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
