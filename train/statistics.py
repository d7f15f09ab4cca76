"""How a model is doing: norms by group of weights, and the size of what flows through its layers."""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from model.architecture import Architecture
from model.compute import Compute
from model.transformer import activations
from model.tree import flatten
from train.step import Batch, split_batch

Tree = Any


def group_of(path: str) -> str:
    """embed, attention, mlp, norms, head, adapters, or the first part of a path that is none of these."""
    parts = path.split("/")
    if parts[-1] in ("a", "b"):
        return "adapters"
    if any(part.endswith("norm") for part in parts):
        return "norms"
    part = parts[1] if parts[0].endswith("layers") else parts[0]
    return {"attn": "attention", "score": "head"}.get(part, part)


def group_norms(name: str, tree: Tree) -> dict[str, Float[Array, ""]]:
    """{name/group: the norm of all its leaves}, in float32 at least."""
    groups: dict[str, list[Array]] = {}
    for path, leaf in flatten(tree).items():
        groups.setdefault(group_of(path), []).append(leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)))
    return {f"{name}/{group}": optax.tree.norm(leaves) for group, leaves in sorted(groups.items())}


def watch_activations(
    arch: Architecture, compute: Compute, microbatches: int, params: Tree, batch: Batch
) -> dict[str, Float[Array, "L"]]:
    """{activations/<what>_rms, _max: by layer} over the tokens of a batch's first micro-batch."""
    names = ("tokens", "positions", "segments", "branches")
    first = {name: x[0] for name, x in split_batch({k: batch[k] for k in names if k in batch}, microbatches).items()}
    made = activations(arch, compute, params, **first)
    return {f"activations/{name}": value for name, value in made.items()}
