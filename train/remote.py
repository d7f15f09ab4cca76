"""Checkpoints copied to object storage and brought back, by fsspec URL."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.errors import UsageError
from convert.shards import MANIFEST, complete_steps, damage


class Remote:
    """A folder of checkpoints at a URL; one counts when its manifest is there, which is copied last."""

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            fs, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UsageError(f"checkpoint.remote={url}: {error}") from error
        self._fs: Any = fs
        self.url, self._root = url, str(root).rstrip("/")

    def steps(self) -> list[int]:
        """The complete ones, oldest first."""
        if not self._fs.exists(self._root):
            return []
        self._fs.invalidate_cache()
        names = [str(path).rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._root, detail=False)]
        found = [int(name) for name in names if name.isdigit()]
        return sorted(step for step in found if self._fs.exists(f"{self._root}/{step}/{MANIFEST}"))

    def copy(self, folder: Path, kept: Sequence[int]) -> None:
        """Copy a checkpoint there; of the others, those that are no longer `kept` here go."""
        there = f"{self._root}/{folder.name}"
        self._fs.makedirs(there, exist_ok=True)
        names = sorted(path.name for path in folder.iterdir())
        for name in [*(n for n in names if n != MANIFEST), MANIFEST]:
            self._fs.put_file(str(folder / name), f"{there}/{name}")
        for step in set(self.steps()) - set(kept):
            self._fs.rm(f"{self._root}/{step}/{MANIFEST}")
            self._fs.rm(f"{self._root}/{step}", recursive=True)

    def bring_newest(self, root: Path, mark: str) -> None:
        """Copy the newest good checkpoint into `root`, if it is newer than all that are there."""
        here = max(complete_steps(root), default=-1)
        any(self.bring(step, root, mark) for step in reversed(self.steps()) if step > here)

    def bring(self, step: int, root: Path, mark: str) -> bool:
        """Copy a checkpoint into `root`, where there is none of that step; whether there is a good one."""
        if step not in self.steps():
            return False
        part = root / f"{step}{mark}"
        part.mkdir(parents=True, exist_ok=True)
        for path in self._fs.ls(f"{self._root}/{step}", detail=False):
            self._fs.get_file(str(path), str(part / str(path).rpartition("/")[2]))
        if damage(part) is None:
            part.rename(root / str(step))
            return True
        shutil.rmtree(part)
        return False
