"""Orbax behind a small face: save asynchronously, resume, restore onto any mesh. Everything is a flat {path: array}."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from configs.errors import RunError
from data.loader import Loader
from data.sources import Records
from model.tree import diff, flatten, unflatten
from train.state import State

FOLDER = "checkpoints"
SHOWN = 12  # differences in a message


class Checkpoints:
    """The checkpoints of one run. Item 'state': the flat State; item 'meta': JSON (data position, config, versions)."""

    def __init__(self, run: Path, keep: int = 2) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self.folder = run.absolute() / FOLDER
        handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def latest(self, at_most: int | None = None) -> int | None:
        """The newest complete step (up to `at_most`), or None."""
        if at_most is None:
            return self._manager.latest_step()
        return max((step for step in self._manager.all_steps() if step <= at_most), default=None)

    def save(self, step: int, state: State, meta: dict[str, Any]) -> None:
        """Copy to the host, then write in the background; an unfinished save never counts as one."""
        items = ocp.args.Composite(state=ocp.args.StandardSave(flatten(state)), meta=ocp.args.JsonSave(meta))
        self._manager.save(step, args=items, force=True)

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON saved beside a step."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore(self, step: int, like: State) -> State:
        """The state of a step with the structure and the shardings of `like`, on whatever mesh that lies."""
        flat = flatten(like)
        saved = self._saved(step)
        if lines := sorted(diff(saved, flat), key=lambda line: "opt/" in line):  # weights first: moments follow them
            what = f"{self.folder / str(step)} does not fit this run (has the model in model.source changed?):"
            more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
            raise RunError("\n  ".join([what, *lines[:SHOWN], *more]))
        abstract = {p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for p, x in flat.items()}
        items = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        return unflatten(items["state"], like)

    def _saved(self, step: int) -> dict[str, Any]:
        """{path: metadata with shape and dtype} of what lies on disk."""
        metadata = self._manager.item_metadata(step)["state"]
        tree = getattr(metadata, "tree", None) or metadata
        return dict(tree)

    def wait(self) -> None:
        """Until every save has reached the disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait and let go."""
        self._manager.close()


BLOCK, BLOCKS, FIRST = 2**20, 128, 64


def data_marks(loader: Loader) -> dict[str, Any]:
    """What tells whether the data is still the same: its order's settings, its files, its first examples' tokens.

    At most about 128 blocks of 1 MiB are read, spread evenly over the files; smaller data is read whole.
    """
    found = _files(loader)
    blocks = max(2, BLOCKS // max(1, sum(len(file.marked) for file in found)))
    files = {f"{i} {file.path.name}": _marks(file.marked, blocks) for i, file in enumerate(found)}
    first = (loader.examples[i] for i in range(min(FIRST, len(loader.examples))))
    code = 0
    for example in (e for e in first if e is not None):
        code = zlib.crc32(example["weights"].tobytes(), zlib.crc32(example["tokens"].tobytes(), code))
    return {**loader.fingerprint(), **files, "first examples, tokenised": f"{code:08x}"}


def _files(loader: Loader) -> list[Any]:
    records = loader.examples.records
    return records.files if isinstance(records, Records) else []


def _marks(paths: Sequence[Path], blocks: int) -> str:
    if len(paths) == 1:
        return _mark(paths[0], blocks)
    code = zlib.crc32("\n".join(f"{path.name} {_mark(path, blocks)}" for path in paths).encode())
    return f"{len(paths)} files, crc {code:08x}"


def _mark(path: Path, blocks: int) -> str:
    size, code = path.stat().st_size, 0
    with path.open("rb") as file:
        for i in range(blocks):
            file.seek(max(i * BLOCK, (size - BLOCK) * i // (blocks - 1)))
            code = zlib.crc32(file.read(BLOCK), code)
    return f"{size} bytes, crc {code:08x}"


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each key whose value differs."""
    changed = [k for k in {**old, **new} if old.get(k) != new.get(k)]
    return [f"{k}: {old.get(k, 'absent')} -> {new.get(k, 'absent')}" for k in changed]


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
