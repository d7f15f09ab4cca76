"""A model from nothing: its config from a preset or any config.json, its weights drawn from a seed."""

import difflib
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UsageError
from convert.folder import read_json
from convert.tables import rows
from model.architecture import Architecture

PRESETS = Path(__file__).parent.with_name("configs") / "models"
ROWS = 64  # the vocabulary is rounded up to a multiple: it divides over devices and fills the units of matrix products
BLOCK = 1 << 22  # numbers drawn at once, at least


def preset_names() -> list[str]:
    """The models of configs/models, the smallest first."""
    sizes = {"m": 1, "b": 1000}
    return sorted((path.stem for path in PRESETS.glob("*.yaml")), key=lambda n: float(n[:-1]) * sizes[n[-1]])


def read_new_config(name: str, of_model: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """The contents of config.json of a preset, a config.json file or a folder with one, or of any MODEL."""
    import yaml

    path = Path(name).expanduser()
    if name in (names := preset_names()):
        return yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))
    if path.is_file() and path.suffix == ".json":
        return read_json(path)
    if (path / "config.json").is_file():
        return read_json(path / "config.json")
    try:
        return of_model(name)
    except UsageError as error:
        near = difflib.get_close_matches(name.lower(), names, 1, 0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(
            f"model.init is random, and model.source '{name}' is no preset ({', '.join(names)}){hint}, no config.json "
            f"and no MODEL: {error}"
        ) from error


def rounded(tokens: int) -> int:
    """Rows for so many tokens."""
    return -(-tokens // ROWS) * ROWS


@dataclass(frozen=True)
class Drawn:
    """A weight that is drawn when it is read: from its path and the seed, so the same on any mesh.

    Its values are normal with deviation `std`, or all `value` where that is 0. Each row of the first axis (rows of a
    vocabulary by the thousand) has a stream of its own, so that a part costs hardly more than itself.
    """

    path: str
    shape: tuple[int, ...]
    std: float
    value: float = 0.0
    seed: int = 0

    def read(self, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
        """The part that a tuple of slices selects, () for all."""
        first = range(*index[0].indices(self.shape[0])) if index else range(self.shape[0])
        if not self.std:
            shape = [len(range(*cut.indices(n))) for cut, n in zip(index, self.shape, strict=False)]
            return np.full((*shape, *self.shape[len(shape) :]), self.value, dtype)
        size = max(1, min(self.shape[0], BLOCK // max(1, math.prod(self.shape[1:])))) if len(self.shape) == 2 else 1
        made = np.empty((len(first), *self.shape[1:]), dtype)
        for block in range(first.start // size, -(-first.stop // size) if len(first) else 0):
            begin, end = block * size, min((block + 1) * size, self.shape[0])
            stream = zlib.crc32(self.path.encode()) << 32 | block
            rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, stream], np.uint64)))
            part = rng.standard_normal((end - begin, *self.shape[1:]), np.float32) * np.float32(self.std)
            low, high = max(begin, first.start), min(end, first.stop)
            made[low - first.start : high - first.start] = part[low - begin : high - begin]
        return made[(slice(None), *index[1:])]


def draw(arch: Architecture, seed: int, scheme: str) -> dict[str, Drawn]:
    """{path: weight} of a new model: normal matrices, norms that multiply by 1, biases of 0.

    scheme: "scaled" divides what is added to the residual stream by sqrt(2 * layers), so that the stream does not grow
    with depth (GPT-2; Llama's training codes do so, too); "normal" does not.
    """
    found = {}
    for row in rows(arch):
        path, std, value = row.ours, arch.init_std, 0.0
        if path.endswith("/bias"):
            std = 0.0
        elif path.endswith("/scale"):
            std, value = 0.0, 1.0 - arch.norm_offset
        elif scheme == "scaled" and path.endswith(("attn/o/weight", "mlp/down/weight")):
            std /= math.sqrt(2 * arch.num_layers)
        found[path] = Drawn(path, row.shape(arch), std, value, seed)
    return found
