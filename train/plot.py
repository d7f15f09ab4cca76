"""Curves of metrics.jsonl as a PNG."""

import difflib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.errors import UsageError

Curve = tuple[list[int], list[float]]  # steps, values


def read_curves(run: Path) -> dict[str, Curve]:
    """{metric: its curve} of a run folder; what is no number at a step is left out."""
    path = run / "metrics.jsonl" if run.is_dir() else run
    if not path.is_file():
        raise UsageError(f"{run}: no metrics.jsonl there; a run folder, or such a file, is to be given")
    curves: dict[str, Curve] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        try:
            row = json.loads(line) if line else {}
        except json.JSONDecodeError:
            continue  # a kill may have cut a line in half
        if not isinstance(row, dict) or (row and "step" not in row):
            raise UsageError(f"{path}:{number}: no row of metrics: an object with a step is expected")
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(float(value))
    if not curves:
        raise UsageError(f"{path}: no step has been written yet")
    return curves


def make_panels(known: Sequence[str], metrics: Sequence[str] = ()) -> dict[str, list[str]]:
    """{title: metrics that share a panel}. Without wishes: loss, evaluations, learning rate, reward.

    eval_old_loss and eval_new_loss share one: that old things are forgotten is to be seen beside what is learnt.
    """
    for name in metrics:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise UsageError(f"--metric {name}: not among these runs' metrics; the nearest is {near[0]}")
    if metrics:
        return {name: [name] for name in metrics}
    panels = {"loss": ["loss"]}
    for name in sorted(name for name in known if name.startswith("eval_")):
        panels.setdefault(f"eval {evaluated(name)}", []).append(name)
    panels |= {name: [name] for name in ("learning_rate", "reward")}
    return {title: kept for title, names in panels.items() if (kept := [name for name in names if name in known])}


def evaluated(name: str) -> str:
    """What an evaluation's metric measures, whichever its set is: eval_old_loss -> loss."""
    rest = name.removeprefix("eval_")
    for known in ("token_accuracy", "accuracy", "perplexity", "loss", "reward"):
        if rest == known or rest.endswith((f"_{known}", f"/{known}")):
            return known
    return rest


def smooth(values: Sequence[float], count: int) -> list[float]:
    """The mean of the last `count` values at each place, of fewer at the start."""
    return [sum(values[max(0, i - count) : i]) / min(i, count) for i in range(1, len(values) + 1)]


def plot(runs: Sequence[Path], output: Path, metrics: Sequence[str] = (), count: int = 1) -> dict[str, list[str]]:
    """Draw the runs' curves over each other, a panel for each kind of metric; returns the panels."""
    read = {run: read_curves(run) for run in runs}
    panels = make_panels(list(dict.fromkeys(name for curves in read.values() for name in curves)), metrics)
    if not panels:
        raise UsageError("these runs have none of loss, eval_*, learning_rate, reward: name others with --metric")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"--output {output}: its folder does not exist")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: no window, no global state
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6.4 * columns, 4.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (title, names) in enumerate(panels.items(), 1):
        axes: Any = figure.add_subplot(rows, columns, place, title=title, xlabel="step")
        for run, curves in read.items():
            for name in (name for name in names if name in curves):
                steps, values = curves[name]
                label = " ".join([str(run)] * (len(runs) > 1) + [name] * (len(names) > 1 or len(runs) == 1))
                axes.plot(steps, smooth(values, count), label=label, marker="." if len(steps) < 30 else "")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(output, dpi=120, format="png")
    return panels
