"""Run folders: which export or checkpoint is newest, and the params of a checkpoint (never its optimizer state)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UsageError

CONFIG, CHECKPOINTS, EXPORT = "config.yaml", "checkpoints", "export"
START = "start"  # config.json and tokenizer of a run that began otherwise than its model.source (train/loop.py)
ITEM, PREFIX = "state", "params/"  # train/checkpoint.py saves {path: array} under this item
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
    """The folder of the newest complete checkpoint; unfinished ones have a name that is no number."""
    root = folder / CHECKPOINTS
    steps = [int(p.name) for p in root.iterdir() if p.name.isdigit() and (p / ITEM).is_dir()] if root.is_dir() else []
    if not steps:
        raise UsageError(
            f"{folder} is a run that has saved nothing yet: no complete checkpoint in {root} and no export"
        )
    return root / str(max(steps))


def open_params(folder: Path) -> dict[str, Saved]:
    """{our path: Saved} of the weights in the newest checkpoint, their averages where it keeps such; each is read from
    disk when asked."""
    import jax
    import orbax.checkpoint as ocp

    path: Any = (newest_checkpoint(folder) / ITEM).resolve()  # orbax asks for an absolute one
    handler = ocp.PyTreeCheckpointHandler()
    try:
        found = handler.metadata(path).tree
    except Exception as error:  # orbax raises many kinds
        raise UsageError(f"{path}: the checkpoint cannot be read: {error}") from error

    def reader(key: str, shape: Any) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            restore = ocp.args.PyTreeRestore(
                item={key: shape}, restore_args={key: ocp.RestoreArgs(restore_type=np.ndarray)}, partial_restore=True
            )
            return handler.restore(path, args=restore)[key]

        return read

    def find(key: str) -> Saved:
        shape, dtype = tuple(found[key].shape), np.dtype(found[key].dtype)
        return Saved(shape, dtype, reader(key, jax.ShapeDtypeStruct(shape, dtype)))

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
