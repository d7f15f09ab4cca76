"""Run folders: which export or checkpoint is newest, and the params of a checkpoint (never its optimizer state)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UsageError
from convert.orbax_folder import open_orbax, orbax_steps
from convert.shards import complete_steps, damage, open_checkpoint

CONFIG, CHECKPOINTS, EXPORT = "config.yaml", "checkpoints", "export"
START = "start"  # config.json and tokenizer of a run that began otherwise than its model.source (train/loop.py)
PREFIX = "params/"  # of the weights among {path: array} in a checkpoint
AVERAGE = "opt/value/"  # where the optimizer keeps a moving average of the weights (train/optim.py Average)
FREE, FREE_B1 = "opt/z/", "opt/b1"  # schedule-free: what is trained is b1 * average + (1 - b1) * z


@dataclass(frozen=True)
class Saved:
    """An array in a checkpoint."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def is_run(folder: Path) -> bool:
    """Whether a folder was made by training."""
    return (folder / CONFIG).is_file() and any((folder / name).is_dir() for name in (CHECKPOINTS, EXPORT))


def read_run_config(folder: Path) -> dict[str, Any]:
    """config.yaml of a run as plain data, with at least `model.source`."""
    import yaml

    path = folder / CONFIG
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict) or not config["model"].get("source"):
        raise UsageError(f"{path}: model.source is missing: this is not the config of a run")
    return config


def find_export(folder: Path) -> Path | None:
    """The run's export; it got its name only when it was complete."""
    export = folder / EXPORT
    marks = ("config.json", "adapter_config.json")
    return export if any((export / mark).is_file() for mark in marks) else None


def newest_checkpoint(folder: Path) -> Path:
    """The folder of the newest complete checkpoint."""
    root = folder / CHECKPOINTS
    steps = sorted({*complete_steps(root), *orbax_steps(root)})
    if not steps:
        raise UsageError(
            f"{folder} is a run that has saved nothing yet: no complete checkpoint in {root} and no export"
        )
    return root / str(steps[-1])


def open_params(folder: Path) -> dict[str, Saved]:
    """{our path: Saved} of the weights in the newest checkpoint, their averages where it keeps such; each is read from
    disk when asked."""
    path = newest_checkpoint(folder)
    if int(path.name) in orbax_steps(path.parent):
        found: Mapping[str, Any] = open_orbax(path)
    elif (what := damage(path, hashes=False)) is not None:
        raise UsageError(f"{path}: the checkpoint is damaged: {what}; remove it: the one before it is used then")
    else:
        found = open_checkpoint(path)

    def find(key: str) -> Saved:
        return Saved(found[key].shape, found[key].dtype, found[key].read)

    saved = {}
    for key in found:
        if key.startswith(PREFIX):
            name, weights = key.removeprefix(PREFIX), find(key)
            if AVERAGE + name in found:
                weights = replace(weights, read=find(AVERAGE + name).read)
            elif FREE + name in found:
                weights = replace(weights, read=partial(_average, weights, find(FREE + name), find(FREE_B1)))
            saved[name] = weights
    if not saved:
        raise UsageError(f"{path}: no weights under '{PREFIX}' (not a checkpoint of this program?)")
    return saved


def _average(trained: Saved, other: Saved, b1: Saved) -> np.ndarray:
    """The average that a schedule-free optimizer (arXiv 2405.15682) trains."""
    share = b1.read()
    return (trained.read().astype(np.float32) - (1 - share) * other.read()) / share


def restore_params(folder: Path) -> dict[str, np.ndarray]:
    """{our path: array} of everything under params/ in a run's newest checkpoint, on the host."""
    return {path: saved.read() for path, saved in open_params(folder).items()}
