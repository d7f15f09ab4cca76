"""The one step: every objective, any number of micro-batches, any mesh."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from model.tree import join
from train.state import State

Tree = Any
Batch = Mapping[str, Array]
Norms = Mapping[str, Float[Array, ""]]
Sums = Mapping[str, tuple[Float[Array, ""], Float[Array, ""]]]
Weights = Callable[[Batch], Norms]
Loss = Callable[[Tree, Batch, Norms], tuple[Float[Array, ""], Sums]]
Step = Callable[[State, Tree, Batch], tuple[State, dict[str, Float[Array, ""]]]]
Score = Callable[[Tree, Batch], dict[str, Array]]  # (params, rows) -> columns [B, T] of those rows
Gather = Callable[[Batch], dict[str, Array]]  # whole batch -> columns that need all of it


def make_step(
    loss: Loss,
    weights: Weights,
    tx: optax.GradientTransformation,
    microbatches: int = 1,
    max_grad_norm: float | None = None,
    shardings: Any = None,
    score: Score | None = None,
    gather: Gather | None = None,
) -> Step:
    """Jit (state, frozen, batch) -> (state, metrics); the state is donated, `shardings` keeps it where it is.

    Each term's denominator is summed over the whole batch first, so the result does not depend on how it is cut. For
    the same reason columns that the loss needs of the whole batch are made here: `score` (forward only, micro-batch by
    micro-batch), then `gather`.
    Metrics: the loss's own averages, `objective` (what was minimised), `grad_norm` before clipping, `tokens` (not
    padding) and `context` (keys seen, summed over tokens: what attention's FLOPs need).
    """
    gradient = jax.value_and_grad(
        lambda params, frozen, batch, norms: loss(join(params, frozen), batch, norms), has_aux=True
    )

    def step(state: State, frozen: Tree, batch: Batch) -> tuple[State, dict[str, Array]]:
        batch = with_columns(score, gather, join(state.params, frozen), batch, microbatches)
        norms = denominators(weights, batch)
        if microbatches == 1:
            (total, sums), grads = gradient(state.params, frozen, batch, norms)
        else:

            def add(carry: Any, piece: Batch) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, carry, gradient(state.params, frozen, piece, norms)), None

            pieces = split_batch(batch, microbatches)
            shapes = jax.eval_shape(gradient, state.params, frozen, jax.tree.map(lambda x: x[0], pieces), norms)
            # float32 sums of bfloat16 gradients: the small ones must not be lost beside the large
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), shapes)
            ((total, sums), grads), _ = jax.lax.scan(add, zeros, pieces)
        norm = optax.tree.norm(grads)
        if max_grad_norm is not None:
            shrink = jnp.minimum(1.0, max_grad_norm / jnp.maximum(norm, 1e-12))
            grads = jax.tree.map(lambda g: g * shrink.astype(g.dtype), grads)
        updates, opt = tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        real = batch["segments"] > 0
        counts = {"tokens": real.sum(), "context": jnp.where(real, batch["positions"] + 1.0, 0).sum()}
        return State(state.step + 1, params, opt), {**averages(sums), "objective": total, "grad_norm": norm, **counts}

    return jax.jit(step, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))


def make_eval(
    loss: Loss, weights: Weights, microbatches: int = 1, score: Score | None = None, gather: Gather | None = None
) -> Callable[[Tree, Batch], Sums]:
    """Jit (params, batch) -> {name: (sum, weight)}, the same loss without a gradient; the caller adds up batches."""

    def evaluate(params: Tree, batch: Batch) -> Sums:
        batch = with_columns(score, gather, params, batch, microbatches)
        return loss(params, batch, denominators(weights, batch))[1]

    return jax.jit(evaluate)


def with_columns(score: Score | None, gather: Gather | None, params: Tree, batch: Batch, pieces: int) -> Batch:
    """The batch with the columns that the loss needs of the model as it stands; no gradient."""
    params = jax.lax.stop_gradient(params)
    if score is not None:
        if pieces == 1:
            made = score(params, batch)
        else:
            made = join_batch(jax.lax.map(lambda piece: score(params, piece), split_batch(batch, pieces)))
        batch = {**batch, **made}
    return batch if gather is None else {**batch, **gather(batch)}


def denominators(weights: Weights, batch: Batch) -> Norms:
    """The norms of a whole batch; one that is 0 counts as 1 (nothing to learn is a gradient of 0, not NaN)."""
    return {name: jnp.where(w == 0, jnp.ones_like(w), w) for name, w in weights(batch).items()}


def split_batch(batch: Batch, pieces: int) -> Batch:
    """[B, ..] -> [pieces, B / pieces, ..] taking every pieces-th row, so that each device keeps its own rows."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]), 1, 0), batch)


def join_batch(pieces: Batch) -> Batch:
    """The inverse of split_batch."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), pieces)


def averages(sums: Sums) -> dict[str, Float[Array, ""]]:
    """sum / weight of every metric."""
    return {name: total / jnp.where(weight == 0, 1, weight) for name, (total, weight) in sums.items()}
