"""purestep as a worker: `export FOLDER`, `full | lora MODEL [key=value ...]`, `pairs MODEL PATH`, or
`recipe NAME MODEL DATA [key=value ...]`."""

import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from tests.bench import rows
from tests.bench.duel import GEMM, MODEL, peak_gib, reply, serve, timed


def export(folder: str) -> None:
    from convert.hf import write_folder
    from convert.load import load_params, load_tokenizer, resolve

    source = resolve(MODEL)
    params = load_params(source, dtype="float32")
    write_folder(Path(folder), params, source.arch, config=source.config, tokenizer=load_tokenizer(source))
    reply({})


def gemm() -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    from model.flops import peak_flops

    m, k, n = GEMM
    product = jax.jit(jnp.matmul)
    x, w = jnp.ones((m, k)), jnp.ones((k, n))
    product(x, w).block_until_ready()
    shapes = timed(lambda: [product(x, w).block_until_ready() for _ in range(20)] and None)
    best = 2.0 * m * k * n / (shapes["seconds"] / 20)
    return {**shapes, "flops_per_second": max(best, peak_flops(jnp.float32))}


def pairs(model: str, path: str) -> None:
    """The identity recipe's pairs as tokens."""
    from configs.load import RECIPES, load
    from convert.load import load_tokenizer, resolve
    from data.formats import normalise
    from data.pairs import encode_pair

    tokenizer, data, made = load_tokenizer(resolve(model)), load("dpo_identity").data, []
    for row in rows.read(str(RECIPES / "identity" / "pairs.jsonl")):
        sides = encode_pair(normalise(row), tokenizer, data)
        start = int(sides[0]["weights"].argmax())
        texts = {"prompt_tokens": sides[0]["tokens"][:start]}
        texts |= {
            f"{name}_tokens": side["tokens"][start:] for name, side in zip(("chosen", "rejected"), sides, strict=True)
        }
        made.append({name: tokens.tolist() for name, tokens in texts.items()})
    rows.write(path, made)
    reply({})


def recipe(name: str, model: str, path: str, *overrides: str) -> None:
    """A shipped recipe on a data file, by the real loader; the reference's log-probs, if cached, are made first."""
    import jax

    from configs.load import load
    from model.flops import train_flops
    from sharding.place import place_batch
    from train.preflight import open_data
    from train.score import score_reference
    from train.setup import make_job, prepare

    fixed = [f"data.max_length={rows.LENGTH}", f"train.batch_size={rows.ROWS}", "train.epochs=100000"]
    constant = ["optim.schedule=constant", "optim.warmup_ratio=0", "optim.learning_rate=1e-6"]
    run = load(name, [f"model.source={model}", f"data.train={path}", *fixed, *constant, *overrides])
    source, mesh, rules, compute = prepare(run)
    loader, _ = open_data(run, source)
    with jax.set_mesh(mesh):
        job, state = make_job(run, source, mesh, rules, compute, 10_000)
        if job.recipe.reference is not None:
            score_reference(job, job.params(state), loader.examples)
        step, batches, held = job.step_for(state), iter(loader), [state]
        del state  # the step donates it

        def one() -> dict[str, float]:
            columns = next(batches)
            held[0], metrics = step(held[0], job.frozen, place_batch(columns, mesh, rules))
            positions, context = float(metrics["tokens"]), float(metrics["context"])
            flops = train_flops(job.arch, positions, context, run.tune.method != "full")
            return {"loss": float(metrics["loss"]), **rows.contents(columns), "positions": positions, "flops": flops}

        reply({"jax": jax.__version__})
        serve({"step": lambda: timed(one), "gemm": gemm, "memory": peak_gib})


def rollouts(model: str, path: str, *overrides: str) -> None:
    """GRPO on prompts: sample, score, pack, update; completions never end early, so that all sides make as many."""
    from dataclasses import replace

    import jax

    from configs.load import load
    from sharding.place import place_batch
    from train.feed import open_feed
    from train.heap import keep_memory
    from train.setup import make_job, prepare

    with tempfile.TemporaryDirectory() as folder:
        here = [
            f"model.source={model}",
            f"data.train={path}",
            f"output={folder}",
            "sample.reward=tests.bench.rows:letters",
            "sample.reward_timeout=null",
            "train.steps=9",
            "train.epochs=null",
        ]
        run = load("grpo", [*here, *overrides])
        if run.train.keep_memory:
            keep_memory()
        source, mesh, rules, compute = prepare(run)
        feed = replace(open_feed(run, source, mesh, rules), end_ids=())
        with jax.set_mesh(mesh):
            job, state = make_job(run, source, mesh, rules, compute, 10_000, feed.portion)
            feed.begin(job, state)
            step, held = job.step_for(state), [state]
            del state  # the step donates it

            def one() -> dict[str, float]:
                batch, told = feed.next(job, held[0], 1, lambda text: None)
                began = time.perf_counter()
                held[0], metrics = step(held[0], job.frozen, place_batch(batch, mesh, rules))
                loss, new = float(metrics["loss"]), run.train.batch_size * run.sample.num_generations
                times = {name: value for name, value in told.items() if name.startswith("time/")}
                made = {"tokens": float(new * run.sample.max_new_tokens), "positions": float(metrics["tokens"])}
                made["slots_live"] = told["rollout/slots_live"]
                return {"loss": loss, **made, **times, "time/update": time.perf_counter() - began}

            reply({"jax": jax.__version__})
            serve({"step": lambda: timed(one), "gemm": gemm, "memory": peak_gib})


def train(method: str, model: str, *overrides: str) -> None:
    import jax
    import numpy as np

    from configs.load import load
    from model.flops import train_flops
    from sharding.place import place_batch
    from train.setup import make_job, prepare

    with tempfile.NamedTemporaryFile(suffix=".jsonl") as data:
        here = [f"model.source={model}", f"data.train={data.name}", "optim.schedule=constant", "optim.warmup_ratio=0"]
        fixed = [f"data.max_length={rows.LENGTH}", f"train.batch_size={rows.ROWS}", "optim.learning_rate=1e-5"]
        run = load("sft_lora" if method == "lora" else "sft", [*here, *fixed, *overrides])
    source, mesh, rules, compute = prepare(run)
    batches = rows.batches(rows.uneven())
    with jax.set_mesh(mesh):
        job, state = make_job(run, source, mesh, rules, compute, 100)
        step = job.step_for(state)
        trained = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(state.params))
        held = [state]
        del state  # the step donates it

        def one() -> dict[str, float]:
            batch = place_batch(next(batches), mesh, rules)
            held[0], metrics = step(held[0], job.frozen, batch)
            tokens, context = float(metrics["tokens"]), float(metrics["context"])
            flops = train_flops(job.arch, tokens, context, method == "lora")
            return {"loss": float(metrics["loss"]), "tokens": tokens, "flops": flops}

        def loss(path: str) -> float:
            """The loss of a peer's batch under the weights as they are now; without a gradient."""
            batch = rows.from_peer(path)
            sums = jax.jit(lambda p, b: job.recipe.loss(p, b, job.recipe.weights(b))[1])(job.params(held[0]), batch)
            total, weight = sums["loss"]
            return float(total) / float(weight)

        def host() -> dict[str, float]:
            """Seconds the host takes to hand one step to the device, the device idle before and after."""
            columns = next(batches)
            jax.block_until_ready(held[0])
            start = time.perf_counter()
            batch = place_batch(columns, mesh, rules)
            placed = time.perf_counter() - start
            jax.block_until_ready(batch)
            start = time.perf_counter()
            held[0], metrics = step(held[0], job.frozen, batch)
            handed = time.perf_counter() - start
            jax.block_until_ready(metrics)
            traces = step._cache_size()  # type: ignore[attr-defined]
            return {"seconds": handed, "place": placed, "traces": float(traces)}

        reply({"jax": jax.__version__, "trained": trained})
        serve({"step": lambda: timed(one), "loss": loss, "gemm": gemm, "host": host, "memory": peak_gib})


if __name__ == "__main__":
    kind, *given = sys.argv[1:]
    {"export": export, "pairs": pairs, "recipe": recipe, "rollouts": rollouts}.get(kind, partial(train, kind))(*given)
