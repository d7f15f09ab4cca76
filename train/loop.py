"""The one loop: resume, step, log, evaluate, save, export."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs.errors import RunError, UsageError
from configs.load import diff, dump, load
from configs.schema import Run
from data.examples import Examples
from data.loader import Loader
from data.tokenizer import Tokenizer
from model.flops import peak_flops, train_flops
from sharding.compile_cache import enable_compilation_cache
from sharding.place import place_batch
from sharding.processes import connect
from train.checkpoint import Checkpoints, cut_metrics
from train.evaluate import evaluate
from train.export import export
from train.metrics import Bar, Sinks, memory_gib
from train.preflight import check_memory, open_data, show_preflight
from train.samples import answer
from train.setup import Job, make_job, prepare
from train.state import State

# Changing these does not change what is learnt, or only where it runs: a run may resume with other values.
MAY_CHANGE = (
    "output", "mesh", "log", "checkpoint", "export", "model.attention", "model.remat", "model.scan_unroll",
    "train.microbatches", "train.compilation_cache", "train.eval_every", "data.prefetch", "data.eval", "objective.loss_chunk",
)  # fmt: skip


def train(run: Run) -> Path:
    """Do the whole run, or what is left of it; returns its folder."""
    connect()
    if run.train.compilation_cache:
        enable_compilation_cache()
    folder = Path(run.output)
    check_same_run(run, folder)
    source, mesh, rules, compute = prepare(run)
    loader, held_out = open_data(run, source)
    tokenizer = loader.examples.tokenizer
    steps = run.train.steps or loader.steps(run.train.epochs or 1)
    folder.mkdir(parents=True, exist_ok=True)
    with jax.set_mesh(mesh):
        job, state = make_job(run, source, mesh, rules, compute, steps)
        check_memory(job, state)
        if run.log.preflight and jax.process_index() == 0:
            show_preflight(job, state, loader)
        loop = Loop(job, loader, tokenizer, folder, held_out)
        with loop:
            state, finished = loop.run(state)
        if finished:
            if run.log.samples is not None:
                answer(job, state, tokenizer, "after", folder / "samples.json")
            if run.export.enabled:
                export(job, state, tokenizer, folder / "export")
    return folder


def check_same_run(run: Run, folder: Path) -> None:
    """Record the config in a new folder; in an old one refuse a run that would not continue what lies there."""
    path = folder / "config.yaml"
    if path.exists():
        lines = [line for line in diff(load(path), run) if not line.startswith(MAY_CHANGE)]
        if lines:
            raise UsageError(
                f"{folder} holds a run with another config; choose another output=..., or restore:\n  " + "\n  ".join(lines)
            )
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".tmp")
        beside.write_text(dump(run), encoding="utf-8")
        beside.replace(path)


@contextmanager
def stop_signal() -> Iterator[list[int]]:
    """A list that becomes non-empty when SIGTERM arrives (a pod's preemption, a scheduler's limit)."""
    received: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, previous)


@dataclass
class Loop:
    """The parts of one run that hold files, threads or time."""

    job: Job
    loader: Loader
    tokenizer: Tokenizer
    folder: Path
    held_out: Examples | None
    _tokens: int = 0
    _clock: float = field(default_factory=time.perf_counter)

    def __enter__(self) -> "Loop":
        run = self.job.run
        self.checkpoints = Checkpoints(self.folder, run.checkpoint.keep) if run.checkpoint.enabled else None
        return self

    def __exit__(self, *_: object) -> None:
        self.loader.close()
        if self.checkpoints is not None:
            self.checkpoints.close()

    def run(self, state: State) -> tuple[State, bool]:
        """Train from wherever the folder stands to the last step; (state, whether that was reached)."""
        job, run = self.job, self.job.run
        start, state = self._resume(state)
        cut_metrics(self.folder / "metrics.jsonl", start)
        if start == 0 and run.log.samples is not None:
            answer(job, state, self.tokenizer, "before", self.folder / "samples.json")
        if start >= job.steps:
            return state, True
        self._peak = peak_flops(job.compute.dtype) * jax.device_count()
        step = job.step_for(state)
        sinks, bar = Sinks(self.folder, run.log.tensorboard and jax.process_index() == 0), Bar(job.steps, start)
        batches = iter(self.loader)
        pending: dict[str, Any] | None = None
        self._clock = time.perf_counter()
        try:
            with stop_signal() as stopped:
                for number in range(start + 1, job.steps + 1):
                    batch = place_batch(next(batches), job.mesh, job.rules)
                    state, metrics = step(state, job.frozen, batch)
                    if pending is not None:  # read the step before, while this one runs
                        self._log(number - 1, pending, sinks, bar)
                    pending = metrics
                    evaluates = run.train.eval_every and number % run.train.eval_every == 0 and self.held_out is not None
                    saves = number % run.checkpoint.every == 0 or number == job.steps or stopped
                    if evaluates or saves:
                        extra = evaluate(job, state, self.held_out) if evaluates and self.held_out is not None else {}
                        self._log(number, {**pending, **extra}, sinks, bar)
                        pending = None
                    if saves and self.checkpoints is not None:
                        self._save(number, state)
                    if stopped and number < job.steps:
                        bar.console.print(f"SIGTERM: saved step {number}; the same command goes on from there")
                        return state, False
        finally:
            sinks.close()
            bar.close()
        return state, True

    def _resume(self, state: State) -> tuple[int, State]:
        if self.checkpoints is None or (step := self.checkpoints.latest()) is None:
            return 0, state
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        jax.tree.map(lambda x: x.delete(), state)  # its memory is for the restored one
        meta = self.checkpoints.meta(step)
        self.loader.restore(meta["data"])
        self._tokens = meta["tokens"]
        return step, self.checkpoints.restore(step, like)

    def _save(self, step: int, state: State) -> None:
        assert self.checkpoints is not None
        versions = {"jax": jax.__version__}
        meta = {"data": self.loader.state(), "tokens": self._tokens, "config": dump(self.job.run), "versions": versions}
        self.checkpoints.save(step, state, meta)

    def _log(self, step: int, metrics: dict[str, Any], sinks: Sinks, bar: Bar) -> None:
        """Wait for one step's numbers, derive the time fields, write and show them."""
        job = self.job
        values = {name: float(np.asarray(value)) for name, value in metrics.items()}
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        tokens, context = values.pop("tokens"), values.pop("context")
        self._tokens += int(tokens)
        flops = train_flops(job.arch, tokens, context, frozen=job.run.tune.method != "full")
        row = {
            "step": step,
            **values,
            "learning_rate": float(job.schedule(step - 1)),
            "tokens": self._tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": flops / seconds / self._peak,
            "memory_gib": memory_gib(),
        }
        if not np.isfinite(row["loss"]):
            raise RunError(f"step {step}: the loss is {row['loss']}; the last checkpoint is from before; usual causes: "
                           "optim.learning_rate too high, or model.dtype with too little range")  # fmt: skip
        if step % job.run.log.every == 0 and jax.process_index() == 0:
            sinks.write(row)
        if step == 1:
            bar.console.print(f"step-0 loss {row['loss']:.4f}; a uniform guess has ln(V) = {np.log(job.arch.vocab_size):.4f}")
        bar.update(row)
