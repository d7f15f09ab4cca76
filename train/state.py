"""The training state, born where it will live: parameters and optimizer state sharded from the first byte."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sharding.place import replicated, state_shardings

Tree = Any


@partial(jax.tree_util.register_dataclass, data_fields=("step", "params", "opt"), meta_fields=())
@dataclass(frozen=True)
class State:
    """What a step changes: steps done, the trainable weights (None where frozen), the optimizer's state."""

    step: Any  # i32[]; not annotated, as a tree of shardings or shapes is a State too
    params: Tree
    opt: Tree


def init_state(params: Tree, tx: optax.GradientTransformation, mesh: Mesh) -> State:
    """A fresh state around placed trainable weights; the optimizer's moments lie where their weights lie."""
    shardings = state_shardings(jax.eval_shape(tx.init, params), params, mesh)
    opt = jax.jit(tx.init, out_shardings=shardings)(params)
    step = jax.device_put(jnp.zeros((), jnp.int32), replicated(mesh))
    return State(step, params, opt)


def shardings_of(tree: Tree) -> Tree:
    """The sharding of every leaf."""
    return jax.tree.map(lambda x: x.sharding, tree)
