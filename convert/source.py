"""What a MODEL turned out to be, and how its weights are placed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.tokenizer import Tokenizer
from model.architecture import Architecture

Index = tuple[slice, ...]
Read = Callable[[Index], np.ndarray]
Placer = Callable[[str, tuple[int, ...], Any, Read], Any]  # -> a jax.Array, or what stands for one


@dataclass(frozen=True)
class Source:
    """Where a model's weights are and what they are."""

    kind: Literal["hf", "gguf", "adapter", "run", "new", "grown"]
    name: str  # as the user wrote it
    path: Path
    arch: Architecture
    config: dict[str, Any]  # config.json's contents
    generation_config: dict[str, Any] | None
    base: "Source | None" = None  # adapter, run, grown: the model they started from
    fresh: Mapping[str, Any] = field(default_factory=dict)  # weights that lie nowhere yet: arrays, or Drawn ones
    tokenizer: Tokenizer | None = None  # where it is not the one that lies at `path`
