"""What tells whether a run's data is still the same."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.loader import Loader
from data.sources import Records

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
