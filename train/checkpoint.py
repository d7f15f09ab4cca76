"""Checkpoints: saved in the background by every process, verified, restored onto any mesh.

Everything is a flat {path: array}; convert/shards.py has the files. Tiers: the run's folder, which all processes see;
checkpoint.local, a folder on each host's own disk, saved to more often; checkpoint.remote, copies of the first.
"""

import math
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs.checkpoint import Checkpoint
from configs.errors import RunError
from convert import shards as files
from convert.orbax_folder import orbax_steps
from convert.shards import PART, Shard, damage
from model.tree import diff, flatten, unflatten
from sharding.processes import agreed_steps, all_agree, same_number
from train.remote import Remote
from train.state import State

FOLDER = "checkpoints"
SHOWN = 12  # differences in a message
PATIENCE = 600.0  # seconds that the first process waits for the files of the others
ALIGN = 64  # bytes


class Checkpoints:
    """The checkpoints of one run. All processes make one and call it alike; one save is under way at a time."""

    def __init__(self, run: Path, knobs: Checkpoint | None = None) -> None:
        self.knobs = knobs or Checkpoint()
        self.folder = run.absolute() / FOLDER
        self._me, self._lead = jax.process_index(), jax.process_index() == 0
        self._mark = f".tmp-{same_number(time.time_ns() % 10**9)}"  # a file of an earlier, killed process is not ours
        self._remote = Remote(self.knobs.remote) if self.knobs.remote is not None else None
        self._local: Path | None = None
        if self.knobs.local is not None:
            name = f"{run.absolute().name}-{zlib.crc32(str(run.absolute()).encode()):08x}"
            self._local = Path(self.knobs.local).absolute() / name / f"process_{self._me}"
        self._buffer = np.empty(0, np.uint8)
        self._thread: threading.Thread | None = None
        self._failures: list[str] = []
        self._at: dict[int, Path] = {}
        for root in [self.folder] * self._lead + [self._local] * (self._local is not None):
            for left in root.glob("*.tmp-*") if root else ():
                shutil.rmtree(left, ignore_errors=True)

    def latest(self, at_most: int | None = None, like: State | None = None) -> int | None:
        """The newest step (up to `at_most`) whose checkpoint is whole, or None; it says which ones are damaged.

        The local tier counts only with `like`, whose shards on this process it must hold.
        """
        if self._remote is not None and at_most is None and self._lead:
            self._remote.bring_newest(self.folder, self._mark)
        bound = math.inf if at_most is None else at_most
        shared = [s for s in agreed_steps(files.complete_steps(self.folder) if self._lead else None) if s <= bound]
        local: list[int] = []
        if self._local is not None and like is not None:
            local = agreed_steps([s for s in self._good_local(like) if s <= bound], everywhere=True)
        for step in sorted({*shared, *local}, reverse=True):
            if step in local and self._local is not None:
                self._at[step] = self._local / str(step)
                return step
            if self._is_good(step):
                self._at[step] = self.folder / str(step)
                return step
        damaged = [] if self._local is None else list(self._local.glob("*.damaged"))
        if shared or not all_agree(not damaged):
            where = self.folder if shared else self.knobs.local
            raise RunError(f"every checkpoint in {where} is damaged; remove the folder to begin anew")
        return None

    def _is_good(self, step: int) -> bool:
        """Whether all processes find a checkpoint of the run's folder whole; what is damaged is set aside, and the
        remote copy of it brought instead."""
        folder = self.folder / str(step)
        if (what := damage(folder, (self._me, jax.process_count()))) is not None:
            _say(f"checkpoint {step} is damaged and left out: {what}")
        if all_agree(what is None):
            return True
        brought = False
        if self._lead:
            _set_aside(folder)
            brought = self._remote is not None and self._remote.bring(step, self.folder, self._mark)
        if brought := bool(same_number(brought)):
            _say(f"checkpoint {step} is here again, from {self.knobs.remote}")
        return brought

    def _good_local(self, like: State) -> list[int]:
        """The steps of the local tier that are whole and hold all that this process needs."""
        assert self._local is not None
        good, flat = [], flatten(like)
        for step in files.complete_steps(self._local):
            if (what := damage(self._local / str(step))) is not None:
                _say(f"checkpoint {step} is damaged and left out: {what}")
                _set_aside(self._local / str(step))
                continue
            stored = files.open_checkpoint(self._local / str(step))
            needs = (
                (path, i)
                for path, x in flat.items()
                for i in x.sharding.addressable_devices_indices_map(x.shape).values()
            )
            if all(path in stored and stored[path].holds(index) for path, index in needs):
                good.append(step)
        return good

    def save(self, step: int, state: State, meta: Mapping[str, Any], metrics: Mapping[str, float] | None = None,
             shared: bool = True) -> None:  # fmt: skip
        """Copy to the host, then write in the background; an unfinished save never counts as one.

        shared: into the run's folder; else only to the local tier, where it is left out while a save is under way.
        """
        if not shared and (self._local is None or self.busy):
            return
        self.wait()
        flat = flatten(state)
        pieces = self._copy(flat)
        about = {"step": step, "processes": jax.process_count(), "metrics": dict(metrics or {})}
        arguments = (step, pieces, files.index_of(flat), dict(meta), about, shared)
        self._thread = threading.Thread(target=self._write, args=arguments, name=f"save of step {step}")
        self._thread.start()

    def _copy(self, flat: Mapping[str, jax.Array]) -> list[tuple[Shard, bool]]:
        """(shard on the host, whether it is this process's to save in the run's folder) of every distinct piece."""
        found: list[tuple[str, jax.Array, tuple[int, ...], jax.Array, bool]] = []
        for path, x in flat.items():
            pieces: dict[tuple[int, ...], Any] = {}
            for piece in x.addressable_shards:
                start = tuple(s.start or 0 for s in piece.index)
                if piece.replica_id == 0 or (self._local is not None and start not in pieces):
                    pieces[start] = piece
            found += [(path, x, start, p.data, p.replica_id == 0) for start, p in pieces.items()]
        onhost = all(next(iter(data.sharding.device_set)).platform == "cpu" for *_, data, _ in found[:1])
        if onhost:  # the step after this one takes the memory: copied, into the same buffer each time
            values = self._into_buffer([np.asarray(data) for *_, data, _ in found])
        else:
            for *_, data, _ in found:
                data.copy_to_host_async()
            values = [np.asarray(data) for *_, data, _ in found]
        return [
            (Shard(path, start, value, value.shape == x.shape), ours)
            for (path, x, start, _, ours), value in zip(found, values, strict=True)
        ]

    def _into_buffer(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        ends = np.cumsum([-(-x.nbytes // ALIGN) * ALIGN for x in arrays]).tolist()
        if self._buffer.size != (total := ends[-1] if ends else 0):
            self._buffer = np.empty(total, np.uint8)
        copies = []
        for x, begin in zip(arrays, [0, *ends], strict=False):
            copies.append(self._buffer[begin : begin + x.nbytes].view(x.dtype).reshape(x.shape))
            np.copyto(copies[-1], x)
        return copies

    def _write(self, step: int, pieces: Sequence[tuple[Shard, bool]], index: Any, meta: Any, about: Any, shared: bool) -> None:  # fmt: skip  # noqa: E501
        if sys.platform == "linux":  # this thread and its children give way to training
            with suppress(OSError):  # a container may forbid it
                os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        try:
            if self._local is not None:
                part = self._local / f"{step}{self._mark}"
                self._fill(part, [shard for shard, _ in pieces])
                self._commit(part, self._local / str(step), index, meta, about)
                self._prune(self._local)
            if shared:
                part = self.folder / f"{step}{self._mark}"
                self._fill(part, [shard for shard, ours in pieces if ours])
                if self._lead:
                    self._await_others(part)
                    self._commit(part, self.folder / str(step), index, meta, about)
                    self._prune(self.folder)
                    if self._remote is not None:
                        self._remote.copy(self.folder / str(step), files.complete_steps(self.folder))
        except Exception as error:  # a thread's would be lost
            reason = getattr(error, "strerror", None) or error
            self._failures.append(f"the save of step {step} failed: {reason}; earlier checkpoints are as they were")

    def _fill(self, part: Path, shards: Sequence[Shard]) -> None:
        """This process's file, then the note that it is whole."""
        name = PART.format(self._me)
        try:
            part.mkdir(parents=True, exist_ok=True)
            told = files.write_part(part / name, shards)
            files.write_text(part / f"{name}.part", told)
            (part / f"{name}.part").rename(part / f"{name}.json")
        except OSError:
            if self._lead or part.parent == self._local:
                shutil.rmtree(part, ignore_errors=True)
            else:
                (part / name).unlink(missing_ok=True)
                (part / f"{name}.failed").touch()
            raise

    def _await_others(self, part: Path) -> None:
        end, names = time.monotonic() + PATIENCE, {PART.format(k): k for k in range(jax.process_count())}
        while missing := [k for name, k in names.items() if not (part / f"{name}.json").exists()]:
            failed = [k for k in missing if (part / f"{PART.format(k)}.failed").exists()]
            if failed or time.monotonic() > end:
                shutil.rmtree(part, ignore_errors=True)
                what = "could not write their files" if failed else f"wrote nothing within {PATIENCE:.0f} s"
                raise RunError(f"processes {failed or missing} {what} (is {self.folder} the same folder on all hosts?)")
            time.sleep(0.02)

    def _commit(self, part: Path, folder: Path, index: Any, meta: Any, about: Mapping[str, Any]) -> None:
        """Index, meta and manifest; then the folder gets its name."""
        try:
            told = {}
            for note in sorted(part.glob("*.json")):
                told[note.name.removesuffix(".json")] = files.read_json(note)
                note.unlink()
            told[files.INDEX] = files.write_text(part / files.INDEX, index)
            told[files.META] = files.write_text(part / files.META, meta)
            files.write_text(part / files.MANIFEST, {"files": told, **about})
            old = folder.with_name(f"{folder.name}.old{self._mark}")
            if folder.exists():
                folder.rename(old)
            part.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
        except OSError:
            shutil.rmtree(part, ignore_errors=True)
            raise

    def _prune(self, root: Path) -> None:
        """Only the newest ones stay, and the best."""
        steps = files.complete_steps(root)
        kept = {*steps[-self.knobs.keep :], self.best(root)[0] if self.knobs.keep_best else None}
        for step in set(steps) - kept:
            gone = root / f"{step}.old{self._mark}"
            (root / str(step)).rename(gone)  # half removed, it would look damaged
            shutil.rmtree(gone, ignore_errors=True)

    def best(self, root: Path | None = None) -> tuple[int | None, float | None]:
        """(step, value) of the checkpoint with the best checkpoint.keep_best."""
        root, name = root or self.folder, self.knobs.keep_best
        sign = 1 if self.knobs.best == "lowest" else -1
        values = {}
        for step in files.complete_steps(root):
            value = files.read_json(root / str(step) / files.MANIFEST).get("metrics", {}).get(name)
            if value is not None and math.isfinite(value):
                values[step] = value
        at = min(values, key=lambda step: sign * values[step], default=None)
        return at, None if at is None else values[at]

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON saved beside a step."""
        return files.read_json(self._where(step) / files.META)

    def arrays(self, step: int) -> dict[str, np.ndarray]:
        """{path: whole array} of a step, on the host."""
        return {path: x.read() for path, x in files.open_checkpoint(self._where(step)).items()}

    def restore(self, step: int, like: Any, partial: bool = False) -> Any:
        """The state of a step with the structure and the shardings of `like`, on whatever mesh that lies.

        partial: `like` may be less, as {"params": ..}; only that is read.
        """
        flat, saved = flatten(like), files.open_checkpoint(self._where(step))
        if partial:
            saved = {path: x for path, x in saved.items() if path in flat}
        check_fits(self._where(step), saved, flat)
        placed = {
            path: jax.make_array_from_callback(x.shape, x.sharding, saved[path].read, dtype=x.dtype)
            for path, x in flat.items()
        }
        return unflatten(placed, like)

    def _where(self, step: int) -> Path:
        return self._at.get(step, self.folder / str(step))

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self, seconds: float | None = None) -> bool:
        """Until the save under way has reached the disk, or so long; whether it has ended."""
        if self._thread is not None:
            self._thread.join(seconds)
        return not self.busy

    def failure(self) -> str | None:
        """What has gone wrong with a save since it was asked last."""
        return self._failures.pop(0) if self._failures else None

    def close(self) -> None:
        """Wait for what is under way."""
        self.wait()


def open_checkpoints(run: Path, knobs: Checkpoint) -> Any:
    """The checkpoints of a run in the format that it has begun with, or that checkpoint.format says."""
    root = run.absolute() / FOLDER
    if orbax_steps(root) or (knobs.format == "orbax" and not files.complete_steps(root)):
        from train.orbax_checkpoint import OrbaxCheckpoints  # imports orbax, which takes its time

        return OrbaxCheckpoints(run, knobs)
    return Checkpoints(run, knobs)


def check_fits(folder: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise RunError where the arrays of a checkpoint have other names, shapes or dtypes."""
    if lines := sorted(diff(dict(saved), dict(wanted)), key=lambda line: "opt/" in line):  # moments follow weights
        what = f"{folder} does not fit this run (has the model in model.source changed?):"
        more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        raise RunError("\n  ".join([what, *lines[:SHOWN], *more]))


@cache
def versions() -> dict[str, str]:
    """What made a checkpoint: our version and commit, and the libraries'."""
    found = {"python": platform.python_version()}
    for name in ("purestep", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    root = Path(__file__).parents[1]
    if (root / ".git").exists():  # a checkout
        told = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
                              capture_output=True, text=True, timeout=30, check=False)  # fmt: skip
        found["commit"] = told.stdout.strip() or "unknown"
    return found


def _say(text: str) -> None:
    print(f"purestep: {text}", file=sys.stderr, flush=True)


def _set_aside(folder: Path) -> None:
    """A damaged checkpoint keeps its files under a name that nothing takes for a checkpoint."""
    beside = folder.with_name(f"{folder.name}.damaged")
    shutil.rmtree(beside, ignore_errors=True)
    if folder.exists():
        folder.rename(beside)
