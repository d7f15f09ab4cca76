"""Where numbers go: metrics.jsonl, TensorBoard, and a progress bar (plain lines when piped)."""

import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

TIME_FIELDS = ("seconds", "tokens_per_second", "mfu", "memory_gib", "goodput")  # what differs between two equal runs


def is_time(name: str) -> bool:
    """Whether a metric, or a phase's, is of time."""
    return name.startswith("time/") or name.rpartition("/")[2] in TIME_FIELDS


class Goodput:
    """The share of the wall time since the loop began that went into steps proper.

    Not into: restoring, samples and evaluations, saving, the first call of the step (tracing, compilation), and waiting
    for a batch while the device has nothing to do. What an online objective samples and scores is part of its steps.
    """

    def __init__(self) -> None:
        self._began, self._lost = time.perf_counter(), 0.0

    @contextmanager
    def away(self) -> Iterator[None]:
        """What happens inside is no step."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.lose(time.perf_counter() - began)

    def lose(self, seconds: float) -> None:
        """So much of the time since the last call was no step."""
        self._lost += seconds

    def lose_all(self) -> None:
        """Nothing up to now was a step."""
        self._lost = time.perf_counter() - self._began

    def share(self) -> float:
        """Up to now."""
        return max(0.0, 1 - self._lost / (time.perf_counter() - self._began))


def finite(value: Any) -> Any:
    """None for a number that JSON does not know, in lists too."""
    if isinstance(value, list):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Sinks:
    """The files of one run's metrics; one line a step, flushed, so that a killed run keeps what it had."""

    def __init__(self, run: Path, tensorboard: bool, start: int = 0) -> None:
        self._file = open(run / "metrics.jsonl", "a", encoding="utf-8")  # open as long as the run
        self._board: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one step's numbers, lists of them too (a non-finite one is written as null: JSON has no NaN)."""
        clean = {name: finite(value) for name, value in row.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in clean.items():
                if name != "step" and value is not None and not isinstance(value, list):
                    self._board.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        """Flush and let go."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def memory_gib() -> float:
    """Peak memory so far in GiB: the fullest local device's, or the process's where devices do not tell (CPU)."""
    peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in jax.local_devices()]
    if any(peaks):
        return max(peaks) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Bar:
    """Progress on a terminal; without one, a plain line now and then."""

    def __init__(self, steps: int, start: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True)
        self._steps, self._quiet_until = steps, 0.0
        self._progress: Any = None
        if self.console.is_terminal:
            columns = (
                TextColumn("train"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=self.console)
            self._task = self._progress.add_task("train", total=steps, completed=start, text="compiling")
            self._progress.start()

    def update(self, row: Mapping[str, float | int]) -> None:
        """Show one step's numbers."""
        reward = f"reward {row['reward']:.3f}  " if "reward" in row else ""
        text = (
            f"{reward}loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tok/s  "
            f"MFU {row['mfu']:.1%}  {row['memory_gib']:.1f} GiB"
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=row["step"], text=text)
        elif time.monotonic() >= self._quiet_until or row["step"] == self._steps:
            self._quiet_until = time.monotonic() + 5
            line = f"step {row['step']}/{self._steps}  {text}  lr {row['learning_rate']:.2e}"
            print(line, file=sys.stderr, flush=True)

    def show(self, step: int, evaluation: Mapping[str, Any]) -> None:
        """Tell the numbers on held-out data."""
        numbers = {name.removeprefix("eval_"): x for name, x in evaluation.items() if not is_time(name)}
        said = ", ".join(f"{name} {np.round(x, 4)}" for name, x in numbers.items())
        self.say(f"step {step}: held out: {said}")

    def say(self, text: str) -> None:
        """Print a line as it is: a completion may hold what rich takes for markup."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._progress is not None:
            self._progress.stop()


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl after `step` (and a half-written last one): they will be written again."""
    if not path.exists():
        return
    kept = []
    # not splitlines: a text may hold other ends of lines
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] > step:
            break
        kept.append(line + "\n")
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(kept), encoding="utf-8")
    beside.replace(path)
