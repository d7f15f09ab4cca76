"""Weights that stay where they are until they are written: at most one stacked leaf is in memory."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from configs.errors import UsageError
from convert.load import load_flat
from convert.source import Read, Source

Pairs = Mapping[str, tuple["Held", "Held"]]


class Held:
    """A leaf that is read when its first layer (or layer and expert) is asked for, and forgotten with its last."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, read: Read):
        self.shape, self.dtype, self.read = shape, np.dtype(dtype), read
        self._now: np.ndarray | None = None

    def __getitem__(self, index: int | tuple[int, ...]) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        if self._now is None:
            self._now = self.read(())
        value = self._now[index]
        if all(at == n - 1 for at, n in zip(index, self.shape, strict=False)):
            self._now = None
        return value

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(()), dtype)


class Merged:
    """A leaf and its adapter, added up layer by layer by the same function that merges whole models."""

    def __init__(self, node: Any):
        self.node, self.shape, self.dtype = node, node.base.shape, node.base.dtype

    def __getitem__(self, index: int | tuple[int, ...]) -> np.ndarray:
        import jax

        from model.weights import Lora, materialise

        base, a, b = (part[index] for part in (self.node.base, self.node.a, self.node.b))
        if np.dtype(jax.dtypes.canonicalize_dtype(self.dtype)) != self.dtype:
            raise UsageError(
                f"adapters are added to {self.dtype.name} weights only with JAX_ENABLE_X64=1 in the environment"
            )
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            base, a, b = map(jax.numpy.asarray, (base, a, b))
            return np.asarray(materialise(Lora(base, a, b, self.node.scale)))


def hold(source: Source) -> dict[str, Any]:
    """Our tree of any MODEL, with Held leaves, Merged where there is an adapter."""
    from model.transformer import nest

    flat = load_flat(source, lambda path, shape, dtype, read: Held(shape, dtype, read))
    return nest(
        {path: leaf if isinstance(leaf, Held) else Merged(_single(path, leaf, source)) for path, leaf in flat.items()}
    )


def hold_adapter(source: Source) -> Pairs:
    """{our path: (a, b)} of a run with adapters, or of an adapter folder."""
    flat = load_flat(source, lambda path, shape, dtype, read: Held(shape, dtype, read))
    nodes = {path: _single(path, leaf, source) for path, leaf in flat.items() if not isinstance(leaf, Held)}
    if not nodes:
        raise UsageError(f"MODEL '{source.name}' has no adapters (it is {KINDS[source.kind]}): leave --adapter out")
    return {path: (node.a, node.b) for path, node in nodes.items()}


KINDS = {
    "hf": "a Hugging Face folder",
    "gguf": "a GGUF file",
    "adapter": "an adapter folder",
    "run": "a run folder whose weights were all trained",
    "new": "a new model",
    "grown": "a model with more tokens",
}


def _single(path: str, node: Any, source: Source) -> Any:
    if not isinstance(node.base, Held):
        raise UsageError(
            f"MODEL '{source.name}': {path} has adapters on top of adapters: convert its base to a folder first "
            "and name that as the base"
        )
    return node
