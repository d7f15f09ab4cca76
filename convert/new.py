"""Models from nothing: an architecture and a tokenizer, every weight drawn where and when it is placed."""

import itertools
import math
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UsageError
from convert.source import Index, Source
from convert.vocabulary import check_vocabulary, round_up, token_ids
from data.tokenizer import Tokenizer
from model.architecture import Architecture
from model.families import architecture_from_hf, hf_config_from

# What ends a branch of the residual stream, to which each layer adds two of them.
RESIDUAL = ("layers/attn/o/weight", "layers/mlp/down/weight", "/experts/down/weight", "/shared/down/weight")
# A weight is drawn in 16 tiles along each axis, as meshes cut it, so that few numbers are drawn for nothing; sides of
# at least 8 keep the number of generators low, of at most 512 the memory of the threads.
TILES, SHORTEST, LONGEST = 16, 8, 512


def make_new(
    name: str, config: dict[str, Any], tokenizer: Tokenizer, *, seed: int, scheme: str = "scaled", grow: bool = False
) -> Source:
    """A model of a config.json's architecture whose weights are still to be drawn.

    Without a vocab_size, or with `grow` and one that is too small, it has the tokenizer's.
    """
    size = config.get("vocab_size")
    if size is None or (grow and size < tokenizer.vocab_size):
        size = round_up(tokenizer.vocab_size)
    try:
        read = architecture_from_hf({**config, "vocab_size": size})
    except ValueError as error:
        raise UsageError(f"model.source={name}: {error}") from error
    arch = replace(read, num_labels=0, token_labels=False)
    check_vocabulary(tokenizer, arch)
    ids = token_ids(tokenizer)
    return Source(
        "new",
        name,
        Path(name),
        arch,
        hf_config_from(arch, **ids),
        ids,
        fresh=draw(arch, seed, scheme),
        tokenizer=tokenizer,
    )


def draw(arch: Architecture, seed: int, scheme: str = "scaled") -> dict[str, "Drawn"]:
    """{path: weight} as model/transformer.py declares each; scaled: as GPT-2 (section 2.3) and Llama's code begin.

    There each layer adds two branches to the residual stream: its variance would grow with the depth, were they not
    divided by the square root of their number.
    """
    from model.transformer import declare

    shrunk = 1 / math.sqrt(2 * arch.num_layers) if scheme == "scaled" else 1.0
    drawn = {}
    for path, declared in declare(arch).items():
        born = declared.born
        assert born is not None
        std = born.std * (shrunk if path.endswith(RESIDUAL) else 1.0)
        drawn[path] = Drawn(path, declared.shape, std, born.mean, seed)
    return drawn


@dataclass(frozen=True)
class Drawn:
    """A weight that is drawn when it is read, any part of it by itself: the same numbers on any mesh, in float32.

    Each tile has a generator of its own, seeded by (seed, path, place): a device draws the tiles that its part touches.
    One numpy draws the same always; NEP 19 lets another version draw others.
    """

    path: str
    shape: tuple[int, ...]
    std: float
    mean: float
    seed: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """As it is drawn."""
        return np.dtype(np.float32)

    def __getitem__(self, index: Index) -> np.ndarray:
        index = (*index, *[slice(None)] * (len(self.shape) - len(index)))
        wanted = [range(*cut.indices(n)) for cut, n in zip(index, self.shape, strict=True)]
        out = np.full([len(part) for part in wanted], self.mean, np.float32)

        def fill(place: tuple[int, ...]) -> None:
            tile, start = self._tile(place)
            low = [max(part.start - at, 0) for part, at in zip(wanted, start, strict=True)]
            high = [min(part.stop - at, n) for part, at, n in zip(wanted, start, tile.shape, strict=True)]
            shift = [at - part.start for part, at in zip(wanted, start, strict=True)]
            there = tuple(slice(a + s, b + s) for a, b, s in zip(low, high, shift, strict=True))
            out[there] = tile[tuple(map(slice, low, high))]

        if self.std and out.size:
            with ThreadPoolExecutor() as pool:  # numpy draws without the interpreter's lock
                for _ in pool.map(fill, self._places(wanted)):
                    pass
        return out

    def _sides(self) -> list[int]:
        return [min(n, LONGEST, max(SHORTEST, -(-n // TILES))) for n in self.shape]

    def _places(self, wanted: list[range]) -> Iterator[tuple[int, ...]]:
        """Of the tiles that a part touches."""
        sides = self._sides()
        return itertools.product(*(range(w.start // n, -(-w.stop // n)) for w, n in zip(wanted, sides, strict=True)))

    def _tile(self, place: tuple[int, ...]) -> tuple[np.ndarray, list[int]]:
        """One tile, and where it begins."""
        start = [at * n for at, n in zip(place, self._sides(), strict=True)]
        shape = [min(n, whole - at) for at, n, whole in zip(start, self._sides(), self.shape, strict=True)]
        seed = np.random.SeedSequence(self.seed, spawn_key=(zlib.crc32(self.path.encode()), *place))
        tile = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape, np.float32)
        tile *= np.float32(self.std)
        return tile, start
