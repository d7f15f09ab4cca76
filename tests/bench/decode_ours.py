"""purestep as a worker of the decoding benchmark: `python -m tests.bench.decode_ours MODEL`."""

import sys

from tests.bench.decode_jobs import JOBS, NEW, prompts
from tests.bench.duel import peak_gib, reply, serve, timed


def main(path: str) -> None:
    import jax
    import jax.numpy as jnp

    from decode.generate import Sampling, generate
    from decode.load import load_model

    model = load_model(path, dtype="float32", unroll=True)
    size = sum(x.nbytes for x in jax.tree.leaves(model.params))

    def run(job: str, rows: int | None = None, new: int = NEW) -> dict[str, float]:
        count, beams, sampled = JOBS[job]
        count = rows or count
        sampling = Sampling(max_new_tokens=new, num_beams=beams, temperature=float(sampled), ignore_eos=True)
        data = prompts(count)
        made = [0]

        def work() -> None:
            made[0] = sum(len(c.tokens) for c in generate(model, data, sampling))

        result = timed(work)
        assert made[0] == count * new
        return {**result, "tokens": made[0]}

    def read() -> dict[str, float]:
        """Bytes a second at which this process reads memory: a column sum over as many bytes as the weights have."""
        x = jnp.ones((2, size // 8 // 1024, 1024))
        add = jax.jit(lambda x: x.sum(1))
        add(x).block_until_ready()

        def once() -> None:
            add(x).block_until_ready()

        best = min(timed(once)["seconds"] for _ in range(5))
        return {"bytes_per_second": x.nbytes / best}

    reply({"jax": jax.__version__, "weights": size})
    serve({"job": run, "memory": peak_gib, "read": read})


if __name__ == "__main__":
    main(sys.argv[1])
