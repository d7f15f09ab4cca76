"""The one loop: resume, step, log, evaluate, save, export."""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs.errors import RunError, UsageError
from configs.load import dump
from configs.schema import Run
from model.flops import peak_flops, train_flops
from sharding.compile_cache import enable_compilation_cache
from sharding.flags import use_flags
from sharding.place import place_batch
from sharding.processes import connect
from train.checkpoint import open_checkpoints, versions
from train.export import export, remove_export
from train.faults import StopSignal, Watch, blame, leave_if_lost, stop_signal
from train.feed import Feed, open_feed
from train.folder import check_same_run, keep_start, record
from train.guard import count_of, roll_back
from train.heap import keep_memory
from train.marks import differences
from train.metrics import Bar, Goodput, Sinks, cut_metrics, memory_gib
from train.preflight import check_memory, show_model
from train.recipes import Alarm
from train.samples import answer
from train.setup import Job, make_job, prepare
from train.state import State
from train.statistics import watch_activations
from train.trace import Trace, check_span

PATIENCE = 10  # steps whose mean an alarm looks at


def train(run: Run) -> Path:
    """Do the whole run, or what is left of it; returns its folder. Nothing is written before all is in order."""
    if run.train.keep_memory:
        keep_memory()
    if added := use_flags(run.train.xla_flags):
        print(f"XLA_FLAGS: added {' '.join(added)} (train.xla_flags)", file=sys.stderr)
    connect(run.train.heartbeat_timeout, run.train.join_timeout)
    try:
        return _train(run)
    except jax.errors.JaxRuntimeError as error:
        leave_if_lost(error)
        raise


def _train(run: Run) -> Path:
    if run.train.compilation_cache:
        enable_compilation_cache()
    folder = Path(run.output)
    check_same_run(run, folder)
    source, mesh, rules, compute = prepare(run)
    feed = open_feed(run, source, mesh, rules)
    steps = run.train.steps or feed.steps(run.train.epochs or 1)
    check_span(run.train.profile_steps, steps)
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
    _goodput: Goodput = field(default_factory=Goodput)
    _bad: int = 0  # bad steps in a row, up to the last one that was read
    _rows: dict[int, Mapping[str, np.ndarray]] = field(default_factory=dict)  # of the last steps, as they were read

    def __enter__(self) -> "Loop":
        run = self.job.run
        self.checkpoints = open_checkpoints(self.folder, run.checkpoint) if run.checkpoint.enabled else None
        self._best = self.checkpoints.best()[1] if self.checkpoints and run.checkpoint.keep_best else None
        self._marks = self.feed.marks() if run.checkpoint.enabled else {}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is not None and isinstance(error, jax.errors.JaxRuntimeError):
            leave_if_lost(error)  # nor wait for its part of a checkpoint
        self.feed.close()
        if self.checkpoints is not None:
            self.checkpoints.wait()
            if kind is None:
                self._look_at_saves()

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
        self._watching = jax.jit(partial(watch_activations, job.arch, job.compute, job.portion.microbatches))
        self._bad = count_of(state, "bad")
        step = job.step_for(state)
        sinks = Sinks(self.folder, run.log.tensorboard, start) if lead else None
        bar = Bar(job.steps, start) if lead else None
        say = bar.say if bar is not None else lambda text: None
        trace = Trace(self.folder / "profile", run.train.profile_steps)
        pending: dict[str, Any] | None = None
        try:
            if start == 0 and run.train.eval_on_start and self.feed.evaluates:
                before = self._evaluate(state, {})
                if sinks is not None and bar is not None:
                    sinks.write({"step": 0, **before})
                    bar.show(0, before)
            self._clock = time.perf_counter()
            self._goodput.lose_all()
            with stop_signal() as stopped, Watch(run.train.hang_timeout) as watch:
                for number in range(start + 1, job.steps + 1):
                    trace.begin(number)
                    batch, told, more = self._next(state, number, pending, say)
                    with self._goodput.away() if number == start + 1 else nullcontext():  # it compiles
                        state, metrics = step(state, job.frozen, batch)
                    trace.end(number, metrics)
                    if pending is not None:  # read the step before, while this one runs
                        self._log(number - 1, pending, sinks, bar)
                    pending = {**metrics, **told, **more}
                    every = run.train.eval_every if self.feed.evaluates else 0
                    evaluates = every and number % every == 0
                    stops = stopped(number) and number < job.steps  # asked once: it may arrive at any moment
                    saves = number % run.checkpoint.every == 0 or number == job.steps or stops
                    locally = run.checkpoint.local is not None and number % run.checkpoint.local_every == 0
                    last_chance = self._bad + 1 >= self._most_bad  # nothing may be built on a step too many
                    timed = any(name.startswith("time/") for name in told)  # of what the step had to wait for
                    extra: dict[str, Any] = {}
                    if evaluates or saves or locally or timed or last_chance:
                        extra = self._evaluate(state, pending) if evaluates else {}
                        self._log(number, {**pending, **extra}, sinks, bar)
                        pending = None
                        if extra and bar is not None:
                            bar.show(number, extra)
                    if self._bad >= self._most_bad:
                        state = self._roll_back(number, state, say)
                    # not amid bad steps: the checkpoints kept are to be from before them
                    shared = self._improves(extra) or saves
                    if (shared or locally) and (not self._bad or stops or number == job.steps):
                        self._save(number, state, extra, shared)
                    self._look_at_saves()
                    watch.beat(number)
                    if stops:
                        self._say_stopped(number, bar, stopped)
                        return state, False
        finally:
            trace.close()
            if sinks is not None and bar is not None:
                sinks.close()
                bar.close()
        return state, True

    @property
    def _most_bad(self) -> float:
        """Bad steps in a row that are too many."""
        train = self.job.run.train
        return float(train.max_bad_steps) if train.on_bad_step == "skip" else math.inf

    def _next(
        self, state: State, step: int, pending: Mapping[str, Any] | None, say: Callable[[str], None]
    ) -> tuple[dict[str, jax.Array], Mapping[str, Any], dict[str, Any]]:
        """The placed batch of a step, what its feed tells of it, and more to log: the wait, activations when due."""
        job, every = self.job, self.job.run.log.activations_every
        began = time.perf_counter()
        rows, told = self.feed.next(job, state, step, say)
        waited = time.perf_counter() - began - sum(value for name, value in told.items() if name.startswith("time/"))
        if pending is None or pending["objective"].is_ready():  # else the device was at work
            self._goodput.lose(waited)
        batch = place_batch(rows, job.mesh, job.rules)
        self._rows = {step - 1: self._rows.get(step - 1, {}), step: rows}
        more: dict[str, Any] = {"time/data": max(0.0, waited)}
        if every and step % every == 0:
            more |= self._watching(job.params(state), batch)
        return batch, told, more

    def _roll_back(self, step: int, state: State, say: Callable[[str], None]) -> State:
        """Too many bad steps in a row: the weights of the last checkpoint before them, the data behind them."""
        done, most = count_of(state, "rollbacks"), self.job.run.train.max_rollbacks
        loss, norm = self._last
        what = f"step {step}: {self._bad} bad steps in a row, the last with loss {loss:.4g} and grad_norm {norm:.4g}"
        at = None
        if self.checkpoints is not None:
            self.checkpoints.wait()
            at = self.checkpoints.latest(step - self._bad)
        if self.checkpoints is None or at is None:
            raise RunError(f"{what}; there is no checkpoint from before them (checkpoint.every) to go back to")
        if done >= most:
            raise RunError(
                f"{what}, after {done} rollbacks of train.max_rollbacks={most}; usual causes: optim.learning_rate too "
                "high, model.dtype with too little range, a train.spike_factor too low"
            )
        say(f"{what}: back to the weights of step {at}, on with the data after {step} (rollback {done + 1} of {most})")
        with self._goodput.away():
            state = roll_back(self._restore(at, state), step, done + 1)
        self._bad = 0
        return state

    def _evaluate(self, state: State, pending: Mapping[str, Any]) -> dict[str, Any]:
        """Numbers on held-out data, and the time that they took, which is not the step's."""
        jax.block_until_ready(pending)
        began = time.perf_counter()
        found = self.feed.evaluate(self.job, self.job.averaged(state))
        seconds = time.perf_counter() - began
        self._clock += seconds
        self._goodput.lose(seconds)
        return {**found, "time/evaluate": seconds}

    def _resume(self, state: State) -> tuple[int, State]:
        if self.checkpoints is None or (step := self.checkpoints.latest(like=state)) is None:
            return 0, state
        meta = self.checkpoints.meta(step)
        if lines := differences(meta["data_marks"], self._marks):
            raise UsageError(
                f"the data is not what {self.folder} was trained on up to step {step}; restore the files, or choose "
                "another output=...:\n  " + "\n  ".join(lines)
            )
        self.feed.restore(meta["data"], step)
        self._tokens = meta["tokens"]
        return step, self._restore(step, state)

    def _restore(self, step: int, state: State) -> State:
        """The state of a checkpoint, where `state` lies, which is gone."""
        assert self.checkpoints is not None
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        jax.tree.map(lambda x: x.delete(), state)  # its memory is for the restored one
        return self.checkpoints.restore(step, like)

    def _save(self, step: int, state: State, evaluated: Mapping[str, Any], shared: bool) -> None:
        if self.checkpoints is None:
            return
        meta = {
            "data": self.feed.position(),
            "data_marks": self._marks,
            "tokens": self._tokens,
            "config": dump(self.job.run),
            "versions": versions(),
        }
        numbers = {name: float(value) for name, value in evaluated.items() if isinstance(value, int | float)}
        with self._goodput.away():
            self.checkpoints.save(step, state, meta, numbers, shared)

    def _improves(self, evaluated: Mapping[str, Any]) -> bool:
        """Whether an evaluation is the best so far by checkpoint.keep_best."""
        knobs = self.job.run.checkpoint
        if knobs.keep_best is None or not evaluated:
            return False
        if knobs.keep_best not in evaluated:
            raise UsageError(f"checkpoint.keep_best={knobs.keep_best}: evaluations tell {', '.join(evaluated)}")
        value, sign = float(evaluated[knobs.keep_best]), 1 if knobs.best == "lowest" else -1
        if not math.isfinite(value) or (self._best is not None and sign * value >= sign * self._best):
            return False
        self._best = value
        return True

    def _look_at_saves(self) -> None:
        """Tell of a save that has failed, or stop."""
        if self.checkpoints is None or (what := self.checkpoints.failure()) is None:
            return
        if self.job.run.checkpoint.on_error == "stop":
            raise RunError(f"{what} (checkpoint.on_error=stop)")
        print(f"purestep: {what}; training goes on", file=sys.stderr, flush=True)

    def _alarms(self, row: Mapping[str, Any]) -> list[Alarm]:
        """Those that are due: each once, when the mean of the last PATIENCE steps is above its bound."""
        due = []
        for alarm in self.job.recipe.alarms:
            last = self._seen.setdefault(alarm, deque(maxlen=PATIENCE))
            if alarm.metric not in row or row.get("skipped"):
                continue
            last.append(row[alarm.metric])
            if len(last) == PATIENCE and sum(last) / PATIENCE > alarm.above and alarm not in self._rung:
                self._rung.add(alarm)
                due.append(alarm)
        return due

    def _check(self, row: Mapping[str, Any]) -> None:
        """Stop at a bad step, unless such steps are to be left out."""
        train, step = self.job.run.train, row["step"]
        if train.on_bad_step == "skip":
            return
        if bad := [name for name in ("loss", "grad_norm") if not np.isfinite(row[name])]:
            raise RunError(
                f"step {step}: {bad[0]} is {row[bad[0]]} ({blame(self._rows[step])}); the last checkpoint is from "
                "before; usual causes: optim.learning_rate too high, or model.dtype with too little range"
            )
        if row.get("skipped"):
            raise RunError(
                f"step {step}: grad_norm {row['grad_norm']:.4g} is above train.spike_factor={train.spike_factor:g} x "
                f"the running average {row['grad_norm_average']:.4g}; the last checkpoint is from before; "
                "train.on_bad_step=skip leaves such steps out"
            )

    def _say_stopped(self, step: int, bar: Bar | None, stopped: StopSignal) -> None:
        """After the save, or as soon as it is late."""
        say = bar.console.print if bar is not None else lambda text: None
        if self.checkpoints is None:
            return say("SIGTERM: nothing is saved")
        deadline = self.job.run.checkpoint.deadline
        if not self.checkpoints.wait(max(0.0, deadline - stopped.age())):
            say(f"SIGTERM: step {step} is not saved within checkpoint.deadline={deadline:g} s; still being written")
            self.checkpoints.wait()
        if what := self.checkpoints.failure():
            raise RunError(f"SIGTERM: {what}; the same command goes on from there")
        say(f"SIGTERM: saved step {step}; the same command goes on from there")

    def _log(self, step: int, metrics: dict[str, Any], sinks: Sinks | None, bar: Bar | None) -> None:
        """Wait for one step's numbers, derive the time fields, write and show them."""
        job = self.job
        values: dict[str, Any] = {name: np.asarray(value).astype(float).tolist() for name, value in metrics.items()}
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        tokens, context = values.pop("tokens"), values.pop("context")
        self._tokens += int(tokens)
        others = ("time/evaluate", "time/data")
        phases = sum(value for name, value in values.items() if name.startswith("time/") and name not in others)
        self._bad = int(values.pop("bad_steps", 0))
        self._last = values["loss"], values["grad_norm"]
        values |= {name: int(values[name]) for name in ("skipped", "skipped_steps") if name in values}
        before = values.get("skipped_steps", 0) - values.get("skipped", 0)  # the schedule does not know of them
        flops = train_flops(job.arch, tokens, context, frozen=job.run.tune.method != "full")
        row: dict[str, Any] = {
            "step": step,
            **values,
            "learning_rate": float(self._rates[step - 1 - before]),
            "tokens": self._tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": flops / seconds / self._peak,
            "memory_gib": memory_gib(),
            "goodput": self._goodput.share(),
            **({"time/update": seconds - phases} if phases else {}),
        }
        self._check(row)
        expected = job.recipe.start
        if step == 1 and expected is not None and abs(row["loss"] - expected) > 1e-3:
            raise RunError(
                f"the loss of the first step is {row['loss']:.4f}, but a policy that equals its reference has "
                f"{expected:.4f}: the reference's log-probs are of another model; usual causes: tune.init_adapter with "
                "objective.reference=adapterless, or model.dtype with too little range"
            )
        if sinks is None or bar is None:  # another process writes
            return
        if row.get("skipped"):
            bar.say(f"step {step}: left out: loss {row['loss']:.4g}, grad_norm {row['grad_norm']:.4g}")
        for alarm in self._alarms(row):
            bar.console.print(f"step {step}: {alarm.metric} is above {alarm.above}: {alarm.text}", style="yellow")
        if step % job.run.log.every == 0:
            sinks.write(row)
        if step == 1:
            outcomes = job.recipe.outcomes
            guess = f"; a uniform guess has ln({outcomes}) = {np.log(outcomes):.4f}" if outcomes else ""
            bar.console.print(f"step-0 loss {row['loss']:.4f}{guess}")
        bar.update(row)
