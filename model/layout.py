"""The layout of weights for decoding: chosen by measurement, one node a weight, so that no layer knows."""

from typing import Any

import jax
import jax.numpy as jnp

from model.architecture import Architecture
from model.transformer import Declared, declare
from model.tree import path_string
from model.weights import OutFirst


def out_first(arch: Architecture, params: Any) -> Any:
    """The same weights with every matrix of the layers kept [out, in]; a copy of those."""
    declared = declare(arch)

    def turn(path: Any, leaf: Any) -> Any:
        name = path_string(path)
        order = _order(declared.get(name.removesuffix("/base")))
        if order is None:
            return leaf
        return OutFirst(jnp.transpose(leaf, (0, *(1 + i for i in order))), order)

    return jax.tree_util.tree_map_with_path(turn, params)


def _order(weight: Declared | None) -> tuple[int, ...] | None:
    """The dimensions of a layer's matrix, output first; None for what is not such a matrix."""
    if weight is None or weight.axes[0] != "layers" or len(weight.shape) < 3:
        return None
    axes = weight.axes[1:]
    count = len(axes)
    inputs = 1 if axes[0] == "embed" else count - 1  # from the residual stream, or back into it
    return (*range(inputs, count), *range(inputs))
