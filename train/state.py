"""The training state, born where it will live: parameters and optimizer state sharded from the first byte."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sharding.place import born, is_abstract, replicated, state_shardings

Tree = Any


@partial(jax.tree_util.register_dataclass, data_fields=("step", "params", "opt", "carried"), meta_fields=())
@dataclass(frozen=True)
class State:
    """What a step changes: steps done, the trainable weights (None where frozen), the optimizer's state."""

    step: Any  # i32[]; not annotated, as a tree of shardings or shapes is a State too
    params: Tree
    opt: Tree
    carried: Tree = field(default_factory=dict)  # what else outlives a step, by name (train/step.py Columns)


def init_state(
    params: Tree, tx: optax.GradientTransformation, mesh: Mesh, carried: Callable[[Tree], Tree] | None = None
) -> State:
    """A fresh state around placed trainable weights, or the shapes of one around theirs; what is made of them (moments,
    carried) lies where they lie."""

    def made(start: Callable[[Tree], Tree]) -> Tree:
        return born(start, state_shardings(jax.eval_shape(start, params), params, mesh), params)

    if is_abstract(params):
        step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    else:
        step = jax.device_put(jnp.zeros((), jnp.int32), replicated(mesh))
    return State(step, params, made(tx.init), made(carried) if carried else {})


def shardings_of(tree: Tree) -> Tree:
    """The sharding of every leaf."""
    return jax.tree.map(lambda x: x.sharding, tree)
