"""The one loop: resume, step, log, evaluate, save, export."""

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from configs.errors import RunError, UsageError
from configs.load import diff, dump, load
from configs.schema import Run
from convert.folder import write_json, written_beside
from convert.load import Source
from convert.run import START
from data.tokenizer import Tokenizer
from model.flops import peak_flops, train_flops
from sharding.compile_cache import enable_compilation_cache
from sharding.place import place_batch
from sharding.processes import connect
from train.checkpoint import Checkpoints, cut_metrics, differences
from train.export import check_export, export, remove_export
from train.feed import Feed, open_feed
from train.heap import keep_memory
from train.metrics import Bar, Sinks, memory_gib
from train.preflight import check_memory, show_model
from train.recipes import Alarm
from train.samples import answer, read_samples
from train.setup import Job, make_job, prepare
from train.state import State

# Changing these does not change what is learnt, or only where it runs: a run may resume with other values.
MAY_CHANGE = (
    "output", "mesh", "log", "checkpoint", "export", "model.attention", "model.remat", "model.scan_unroll",
    "train.microbatches", "train.compilation_cache", "train.keep_memory", "train.eval_every", "train.eval_on_start",
    "data.prefetch",
    "data.eval",
    "objective.loss_chunk",
)  # fmt: skip
PATIENCE = 10  # steps whose mean an alarm looks at


def train(run: Run) -> Path:
    """Do the whole run, or what is left of it; returns its folder. Nothing is written before all is in order."""
    if run.train.keep_memory:
        keep_memory()
    connect()
    if run.train.compilation_cache:
        enable_compilation_cache()
    folder = Path(run.output)
    check_same_run(run, folder)
    source, mesh, rules, compute = prepare(run)
    feed = open_feed(run, source, mesh, rules)
    steps = run.train.steps or feed.steps(run.train.epochs or 1)
    with jax.set_mesh(mesh):
        job, state = make_job(run, source, mesh, rules, compute, steps, feed.portion)
        check_memory(job, state)
        if run.log.preflight and jax.process_index() == 0:
            feed.show(job)
            show_model(job, state)
        feed.begin(job, state)
        if jax.process_index() == 0:
            if source.kind in ("new", "grown") or source.tokenizer is not None:
                keep_start(source, feed.tokenizer, folder)
            record(run, folder)
        loop = Loop(job, feed, folder)
        with loop:
            state, finished = loop.run(state)
        if finished:
            state = job.averaged(state)
            if run.log.samples is not None:
                answer(job, state, feed.tokenizer, "after", folder / "samples.json")
            if run.export.enabled:
                export(job, state, feed.tokenizer, folder / "export")
    return folder


def check_same_run(run: Run, folder: Path) -> None:
    """Refuse a folder that cannot be written, or holds a run that this one would not continue; changes nothing."""
    path = folder / "config.yaml"
    inside = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not inside.is_dir():
        raise UsageError(f"output={folder}: {inside} is a file, a folder is to be written there")
    if not os.access(inside, os.W_OK):
        raise UsageError(f"output={folder}: {inside} may not be written to")
    if path.exists():
        if lines := [line for line in diff(load(path), run) if not line.startswith(MAY_CHANGE)]:
            said = f"{folder} holds a run with another config; choose another output=..., or restore:"
            raise UsageError("\n  ".join([said, *lines]))
    if run.export.enabled:
        check_export(folder / "export")
    if run.log.samples is not None:
        read_samples(Path(run.log.samples))


def keep_start(source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    """Write down what MODEL=RUN needs besides a checkpoint: presets and tokenizers may be elsewhere one day."""
    place = folder / START
    if not place.exists():
        with written_beside(place) as part:
            write_json(part / "config.json", source.config)
            if source.generation_config is not None:
                write_json(part / "generation_config.json", source.generation_config)
            tokenizer.save(part)


def record(run: Run, folder: Path) -> None:
    """Write config.yaml: from here on the folder is a run."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    beside = path.with_suffix(".tmp")
    beside.write_text(dump(run), encoding="utf-8")
    beside.replace(path)


@contextmanager
def stop_signal() -> Iterator[Callable[[int], bool]]:
    """step -> whether SIGTERM has arrived (preemption, a scheduler's limit); all processes agree on the step."""
    if jax.process_count() > 1:  # jax.distributed listens to the signal itself
        yield multihost_utils.reached_preemption_sync_point
        return
    received: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield lambda step: bool(received)
    finally:
        signal.signal(signal.SIGTERM, previous)


@dataclass
class Loop:
    """The parts of one run that hold files, threads or time."""

    job: Job
    feed: Feed
    folder: Path
    _tokens: int = 0
    _clock: float = field(default_factory=time.perf_counter)
    _seen: dict[Alarm, deque[float]] = field(default_factory=dict)
    _rung: set[Alarm] = field(default_factory=set)

    def __enter__(self) -> "Loop":
        run = self.job.run
        self.checkpoints = Checkpoints(self.folder, run.checkpoint.keep) if run.checkpoint.enabled else None
        self._marks = self.feed.marks() if run.checkpoint.enabled else {}
        return self

    def __exit__(self, *_: object) -> None:
        self.feed.close()
        if self.checkpoints is not None:
            self.checkpoints.close()

    def run(self, state: State) -> tuple[State, bool]:
        """Train from wherever the folder stands to the last step; (state, whether that was reached)."""
        job, run = self.job, self.job.run
        start, state = self._resume(state)
        lead = jax.process_index() == 0
        if lead:
            cut_metrics(self.folder / "metrics.jsonl", start)
        if start == 0 and run.log.samples is not None:
            answer(job, state, self.feed.tokenizer, "before", self.folder / "samples.json")
        if start >= job.steps:
            return state, True
        if lead:
            remove_export(self.folder / "export")  # of an earlier end: it would be taken for the result
        self._peak = peak_flops(job.compute.dtype) * jax.device_count()
        self._rates = np.asarray(jax.jit(jax.vmap(job.schedule))(np.arange(job.steps)))
        step = job.step_for(state)
        sinks = Sinks(self.folder, run.log.tensorboard, start) if lead else None
        bar = Bar(job.steps, start) if lead else None
        say = bar.say if bar is not None else lambda text: None
        pending: dict[str, Any] | None = None
        try:
            if start == 0 and run.train.eval_on_start and self.feed.evaluates:
                before = self._evaluate(state, {})
                if sinks is not None and bar is not None:
                    sinks.write({"step": 0, **before})
                    bar.show(0, before)
            self._clock = time.perf_counter()
            with stop_signal() as stopped:
                for number in range(start + 1, job.steps + 1):
                    batch, told = self.feed.next(job, state, number, say)
                    state, metrics = step(state, job.frozen, place_batch(batch, job.mesh, job.rules))
                    if pending is not None:  # read the step before, while this one runs
                        self._log(number - 1, pending, sinks, bar)
                    pending = {**metrics, **told}
                    every = run.train.eval_every if self.feed.evaluates else 0
                    evaluates = every and number % every == 0
                    stops = stopped(number) and number < job.steps  # asked once: it may arrive at any moment
                    saves = number % run.checkpoint.every == 0 or number == job.steps or stops
                    if evaluates or saves or told:  # what is told of a step is of the time before it, too
                        extra = self._evaluate(state, pending) if evaluates else {}
                        self._log(number, {**pending, **extra}, sinks, bar)
                        pending = None
                        if extra and bar is not None:
                            bar.show(number, extra)
                    if saves and self.checkpoints is not None:
                        self._save(number, state)
                    if stops:
                        self._say_stopped(number, bar)
                        return state, False
        finally:
            if sinks is not None and bar is not None:
                sinks.close()
                bar.close()
        return state, True

    def _evaluate(self, state: State, pending: Mapping[str, Any]) -> dict[str, Any]:
        """Numbers on held-out data, and the time that they took, which is not the step's."""
        jax.block_until_ready(pending)
        began = time.perf_counter()
        found = self.feed.evaluate(self.job, self.job.averaged(state))
        seconds = time.perf_counter() - began
        self._clock += seconds
        return {**found, "time/evaluate": seconds}

    def _resume(self, state: State) -> tuple[int, State]:
        if self.checkpoints is None or (step := self.checkpoints.latest()) is None:
            return 0, state
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        jax.tree.map(lambda x: x.delete(), state)  # its memory is for the restored one
        meta = self.checkpoints.meta(step)
        if lines := differences(meta["data_marks"], self._marks):
            raise UsageError(
                f"the data is not what {self.folder} was trained on up to step {step}; restore the files, or choose "
                "another output=...:\n  " + "\n  ".join(lines)
            )
        self.feed.restore(meta["data"], step)
        self._tokens = meta["tokens"]
        return step, self.checkpoints.restore(step, like)

    def _save(self, step: int, state: State) -> None:
        assert self.checkpoints is not None
        versions = {"jax": jax.__version__}
        meta = {
            "data": self.feed.position(),
            "data_marks": self._marks,
            "tokens": self._tokens,
            "config": dump(self.job.run),
            "versions": versions,
        }
        self.checkpoints.save(step, state, meta)

    def _alarms(self, row: Mapping[str, Any]) -> list[Alarm]:
        """Those that are due: each once, when the mean of the last PATIENCE steps is above its bound."""
        due = []
        for alarm in self.job.recipe.alarms:
            last = self._seen.setdefault(alarm, deque(maxlen=PATIENCE))
            if alarm.metric not in row:
                continue
            last.append(row[alarm.metric])
            if len(last) == PATIENCE and sum(last) / PATIENCE > alarm.above and alarm not in self._rung:
                self._rung.add(alarm)
                due.append(alarm)
        return due

    def _say_stopped(self, step: int, bar: Bar | None) -> None:
        if bar is not None:
            kept = f"saved step {step}; the same command goes on from there" if self.checkpoints else "nothing is saved"
            bar.console.print(f"SIGTERM: {kept}")

    def _log(self, step: int, metrics: dict[str, Any], sinks: Sinks | None, bar: Bar | None) -> None:
        """Wait for one step's numbers, derive the time fields, write and show them."""
        job = self.job
        values: dict[str, Any] = {name: np.asarray(value).astype(float).tolist() for name, value in metrics.items()}
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        tokens, context = values.pop("tokens"), values.pop("context")
        self._tokens += int(tokens)
        phases = sum(value for name, value in values.items() if name.startswith("time/") and name != "time/evaluate")
        flops = train_flops(job.arch, tokens, context, frozen=job.run.tune.method != "full")
        row: dict[str, Any] = {
            "step": step,
            **values,
            "learning_rate": float(self._rates[step - 1]),
            "tokens": self._tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": flops / seconds / self._peak,
            "memory_gib": memory_gib(),
            **({"time/update": seconds - phases} if phases else {}),
        }
        if bad := [name for name in ("loss", "grad_norm") if not np.isfinite(row[name])]:
            raise RunError(
                f"step {step}: {bad[0]} is {row[bad[0]]}; the last checkpoint is from before; usual causes: "
                "optim.learning_rate too high, or model.dtype with too little range"
            )
        expected = job.recipe.start
        if step == 1 and expected is not None and abs(row["loss"] - expected) > 1e-3:
            raise RunError(
                f"the loss of the first step is {row['loss']:.4f}, but a policy that equals its reference has "
                f"{expected:.4f}: the reference's log-probs are of another model; usual causes: tune.init_adapter with "
                "objective.reference=adapterless, or model.dtype with too little range"
            )
        if sinks is None or bar is None:  # another process writes
            return
        for alarm in self._alarms(row):
            bar.console.print(f"step {step}: {alarm.metric} is above {alarm.above}: {alarm.text}", style="yellow")
        if step % job.run.log.every == 0:
            sinks.write(row)
        if step == 1:
            outcomes = job.recipe.outcomes
            guess = f"; a uniform guess has ln({outcomes}) = {np.log(outcomes):.4f}" if outcomes else ""
            bar.console.print(f"step-0 loss {row['loss']:.4f}{guess}")
        bar.update(row)
