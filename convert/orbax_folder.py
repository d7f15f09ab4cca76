"""Checkpoints in orbax's layout (checkpoint.format=orbax, and runs of before it was a choice): read, array by array."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UsageError

ITEM = "state"  # the flat {path: array} beside a JSON item "meta"


@dataclass(frozen=True)
class Lazy:
    """An array that is read when asked."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], np.ndarray]


def orbax_steps(root: Path) -> list[int]:
    """The steps of the checkpoints in a folder, oldest first; unfinished ones have a name that is no number."""
    return sorted(int(p.name) for p in _folders(root) if p.name.isdigit() and (p / ITEM).is_dir())


def _folders(root: Path) -> Iterable[Path]:
    return root.iterdir() if root.is_dir() else ()


def open_orbax(folder: Path) -> dict[str, Lazy]:
    """{path: Lazy} of the checkpoint of a step."""
    import jax
    import orbax.checkpoint as ocp

    path: Any = (folder / ITEM).resolve()  # orbax asks for an absolute one
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

    def lazy(key: str) -> Lazy:
        shape, dtype = tuple(found[key].shape), np.dtype(found[key].dtype)
        return Lazy(shape, dtype, reader(key, jax.ShapeDtypeStruct(shape, dtype)))

    return {key: lazy(key) for key in found}
