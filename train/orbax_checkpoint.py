"""Checkpoints in orbax's layout, behind the face of train/checkpoint.py: for other tools that read it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from configs.checkpoint import Checkpoint
from convert.orbax_folder import ITEM, open_orbax
from model.tree import flatten, unflatten
from train.checkpoint import FOLDER, check_fits
from train.state import State


class OrbaxCheckpoints:
    """The checkpoints of one run. Item 'state': the flat State; item 'meta': JSON (data position, config, versions)."""

    def __init__(self, run: Path, knobs: Checkpoint | None = None) -> None:
        self.knobs = knobs or Checkpoint()
        options = ocp.CheckpointManagerOptions(max_to_keep=self.knobs.keep, cleanup_tmp_directories=True)
        self.folder = run.absolute() / FOLDER
        handlers = {ITEM: ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def latest(self, at_most: int | None = None, like: State | None = None) -> int | None:
        """The newest complete step (up to `at_most`), or None."""
        return max((s for s in self._manager.all_steps() if at_most is None or s <= at_most), default=None)

    def save(self, step: int, state: State, meta: Mapping[str, Any], metrics: Mapping[str, float] | None = None,
             shared: bool = True) -> None:  # fmt: skip
        """Copy to the host, then write in the background; an unfinished save never counts as one."""
        items = ocp.args.Composite(state=ocp.args.StandardSave(flatten(state)), meta=ocp.args.JsonSave(dict(meta)))
        if shared:
            self._manager.save(step, args=items, force=True)

    def best(self, root: Path | None = None) -> tuple[int | None, float | None]:
        """None is marked as the best."""
        return None, None

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON saved beside a step."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def arrays(self, step: int) -> dict[str, np.ndarray]:
        """{path: whole array} of a step, on the host."""
        return {path: x.read() for path, x in open_orbax(self.folder / str(step)).items()}

    def restore(self, step: int, like: State) -> State:
        """The state of a step with the structure and the shardings of `like`, on whatever mesh that lies."""
        flat, metadata = flatten(like), self._manager.item_metadata(step)[ITEM]
        check_fits(self.folder / str(step), dict(getattr(metadata, "tree", None) or metadata), flat)
        abstract = {p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for p, x in flat.items()}
        items = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        return unflatten(items[ITEM], like)

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._manager.is_saving_in_progress()

    def wait(self, seconds: float | None = None) -> bool:
        """Until every save has reached the disk; orbax knows no shorter wait."""
        self._manager.wait_until_finished()
        return True

    def failure(self) -> str | None:
        """Orbax raises what has gone wrong with a save at the next one."""
        return None

    def close(self) -> None:
        """Wait and let go."""
        self._manager.close()
