"""What decoding takes on a target: its cache, the step that is compiled for it, and what memory's speed allows."""

import re
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from configs.errors import UsageError
from decode.rows import advance, empty
from decode.rule import make_rule
from decode.sampling import Sampling
from sharding.platform import targeting
from train.planner.abstract import Planned
from train.planner.costs import bytes_of, decode_floor, flows_of
from train.planner.program import Program

PROMPT = 32  # slots of a prompt, the least that decoding makes


def parse_cache(text: str) -> tuple[int, int]:
    """'64x4096' -> (rows, length)."""
    found = re.fullmatch(r"(\d+)x(\d+)", text.strip())
    rows, length = map(int, found.groups()) if found else (0, 0)
    if rows < 1 or length <= PROMPT:
        raise UsageError(f"--decode is {text!r}, allowed: ROWSxLENGTH, as 64x4096; a length above {PROMPT}")
    return rows, length


def rollout_of(planned: Planned) -> tuple[int, int]:
    """Rows that a recipe's rollouts decode at a time, and how long they may get."""
    run = planned.job.run
    return run.sample.batch_size, run.data.max_length + 1


def plan_decoding(planned: Planned, rows: int, length: int, compiled: bool) -> dict[str, Any]:
    """Cache, floor and, compiled, the peak and the collectives of one step of `rows` at `length` tokens."""
    arch = planned.job.arch
    if length > arch.max_position:
        raise UsageError(f"--decode: rows of {length} tokens are beyond the model's context of {arch.max_position}")
    cache, seconds, rate = decode_floor(planned, rows, length)
    made: dict[str, Any] = {"rows": rows, "length": length, "cache": cache, "step_seconds": seconds}
    made["tokens_per_second"] = rate
    if not compiled:
        return made
    from train.planner.plan import peak_of

    program, held = compile_decoding(planned, rows, length)
    peak = peak_of(program.memory_analysis())
    flows = flows_of(Program(program.as_text()).collectives, dict(planned.job.mesh.shape))
    return made | {
        "cache_per_device": held, "peak": peak, "fits": peak <= planned.target.memory,
        "collectives": [asdict(flow) for flow in flows],
    }  # fmt: skip


def compile_decoding(planned: Planned, rows: int, length: int) -> tuple[Any, int]:
    """(the program that decoding runs between two looks at its rows, bytes of the cache on a device)."""
    job = planned.job
    run, mesh = job.run, job.mesh
    compute = replace(job.compute, remat="none")
    sampling = Sampling(temperature=run.sample.temperature, max_new_tokens=length - PROMPT)
    rule = make_rule([sampling] * rows, [PROMPT] * rows, [(0, 0)] * rows, (0,), job.arch.vocab_size)
    blank = partial(
        empty, job.arch, compute, prompts=0, prompt_slots=PROMPT, slots=length - PROMPT, dtype=compute.dtype
    )
    with targeting(planned.target.chip.kind), jax.set_mesh(mesh):
        structure, names = None, []

        def leaves_of(rule: Any) -> list[Any]:
            nonlocal structure, names
            named, structure = jax.tree_util.tree_flatten_with_path(blank(rule))
            names = [jax.tree_util.keystr(path) for path, _ in named]
            return [leaf for _, leaf in named]

        shapes = jax.eval_shape(leaves_of, rule)
        where = jax.jit(leaves_of).lower(rule).compile().output_shardings  # where a real run's lie, too
        put = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
        state = [put(x, sharding) for x, sharding in zip(shapes, where, strict=True)]

        def step(params: Any, leaves: list[Any], most: Any, stop: Any) -> Any:
            return advance(job.arch, compute, params, jax.tree.unflatten(structure, leaves), most, stop)

        number = jax.ShapeDtypeStruct((), jnp.int32)
        lowered = jax.jit(step, donate_argnums=1).lower(job.params(planned.state), state, number, number)
        held = [x for name, x in zip(names, state, strict=True) if name in (".cache.k", ".cache.v")]
        return lowered.compile(), bytes_of(held)
