"""Schedules and the optimizer chain, from the config."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from configs.schema import Optim
from model.tree import flatten, path_string, select


def make_schedule(optim: Optim, steps: int) -> optax.Schedule:
    """updates done -> learning rate: linear warmup from 0, then constant, linear or cosine towards final_ratio.

    As in transformers: with a warmup the very first update has rate 0, and the end would be reached by the update after
    the last.
    """
    peak, end = optim.learning_rate, optim.learning_rate * optim.final_ratio
    warmup = optim.warmup_steps or math.ceil(optim.warmup_ratio * steps)
    rest = max(1, steps - warmup)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, end, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, optim.final_ratio),
    }[optim.schedule]()
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(optim: Optim, steps: int, params: Any) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) for the trainable tree `params`; only weights matched by decay_patterns decay."""
    paths = list(flatten(params))
    decayed = select(paths, optim.decay_patterns, "optim.decay_patterns") if optim.weight_decay else set()
    adamw = optax.adamw(
        make_schedule(optim, steps),
        b1=optim.b1,
        b2=optim.b2,
        eps=optim.eps,
        mu_dtype=jnp.dtype(optim.state_dtype) if optim.state_dtype != "float32" else None,
        weight_decay=optim.weight_decay,
        mask=lambda tree: jax.tree_util.tree_map_with_path(lambda p, _: path_string(p) in decayed, tree),
    )
    return in_float32(adamw)


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same update, moments and arithmetic in float32 at least whatever the weights' dtype (bfloat16 forgets)."""

    def widen(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return tx.update(widen(updates), state, None if params is None else widen(params))

    return optax.GradientTransformation(lambda params: tx.init(widen(params)), update)
