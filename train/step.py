"""The one step: every objective, any number of micro-batches, any mesh."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from model.product import narrow_gradients
from model.tree import join
from sharding.place import fetch
from train.guard import KEY, Guard, keep_good, start_guard
from train.state import State

Tree = Any
Batch = Mapping[str, Array]
Norms = Mapping[str, Float[Array, ""]]
Sums = Mapping[str, tuple[Float[Array, ""], Float[Array, ""]]]
Weights = Callable[[Batch], Norms]
Loss = Callable[[Tree, Batch, Norms], tuple[Float[Array, ""], Sums]]
Step = Callable[[State, Tree, Batch], tuple[State, dict[str, Float[Array, ""]]]]


@dataclass(frozen=True)
class Columns:
    """What a loss needs of the model as it stands, made just before each step; no gradient flows through it.

    carried: what outlives a step beside the weights, part of the state; "reference" is a policy that follows (its
    trainable weights).
    """

    score: Callable[[Tree, Tree, Batch], dict[str, Array]] | None = None  # (params, reference, rows) -> columns
    gather: Callable[[Tree, Batch], tuple[dict[str, Array], Tree]] | None = None  # whole batch -> columns, new carried
    start: Callable[[Tree], Tree] | None = None  # trainable weights -> what is carried at first
    follow: Callable[[Tree, Tree, Array], Tree] | None = None  # (carried, new weights, steps done) -> carried


NOTHING = Columns()


def real(batch: Batch) -> Bool[Array, "*B T"]:
    """Positions that are not padding."""
    return batch["segments"] > 0


def make_step(
    loss: Loss,
    weights: Weights,
    tx: optax.GradientTransformation,
    microbatches: int = 1,
    max_grad_norm: float | None = None,
    shardings: Any = None,
    columns: Columns = NOTHING,
    learns: Callable[[Batch], Bool[Array, "*B T"]] = real,
    guard: Guard | None = None,
    norms_of: Callable[[str, Tree], dict[str, Array]] | None = None,
    narrow: bool = False,
) -> Step:
    """Jit (state, frozen, batch) -> (state, metrics); the state is donated, `shardings` keeps it where it is.

    Each term's denominator is summed over the whole batch first, so the result does not depend on how it is cut. For
    the same reason columns that the loss needs of the whole batch are made here: `columns.score` (forward only,
    micro-batch by micro-batch), then `columns.gather`.
    Micro-batches behind the last one with a position that `learns` are not computed: their gradient is 0.
    Metrics, of what is computed: the loss's own averages, `objective` (what was minimised), `grad_norm` before
    clipping, `tokens` (not padding) and `context` (keys seen, summed over tokens: what attention's FLOPs need).
    guard: bad steps change nothing but the count of steps; its numbers are carried (`guarded`).
    narrow: gradients are summed over devices in the dtype of the activations (model/product.py).
    norms_of: (name, tree) -> more norms to tell, of the gradient before clipping, the update and the weights after it.
    """

    def gradient(*given: Tree) -> Any:
        whole = lambda params, frozen, batch, norms: loss(join(params, frozen), batch, norms)  # noqa: E731
        with narrow_gradients(narrow):
            return jax.value_and_grad(whole, has_aux=True)(*given)

    def step(state: State, frozen: Tree, batch: Batch) -> tuple[State, dict[str, Array]]:
        if shardings is not None:
            state = replace(state, opt=fetch(state.opt, shardings.opt))
        batch, carried = with_columns(columns, state.params, frozen, state.carried, batch, microbatches)
        norms, computed = denominators(weights, batch), real(batch)
        if microbatches == 1:
            (total, sums), grads = gradient(state.params, frozen, batch, norms)
        else:
            pieces = split_batch(batch, microbatches)
            shapes = jax.eval_shape(gradient, state.params, frozen, jax.tree.map(lambda x: x[0], pieces), norms)
            # float32 sums of bfloat16 gradients: the small ones must not be lost beside the large
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), shapes)
            (total, sums), grads = zeros
            empty = {name: (value + EMPTY.get(last_of(name), 0), weight) for name, (value, weight) in sums.items()}

            def add(i: Array, carry: Any) -> Any:
                made = gradient(state.params, frozen, jax.tree.map(lambda x: x[i], pieces), norms)
                ((total, sums), grads), ((more, others), new) = carry, made
                return (total + more, merge_sums(sums, others)), jax.tree.map(jnp.add, grads, new)

            count = filled(learns(pieces))
            (total, sums), grads = jax.lax.fori_loop(0, count, add, ((total, empty), grads))
            computed &= (jnp.arange(len(computed)) % microbatches < count)[:, None]
        norm = optax.tree.norm(grads)
        raw = norms_of("grad_norm", grads) if norms_of is not None else {}
        if max_grad_norm is not None:
            shrink = jnp.minimum(1.0, max_grad_norm / jnp.maximum(norm, 1e-12))
            grads = jax.tree.map(lambda g: g * shrink.astype(g.dtype), grads)
        updates, opt = tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        if columns.follow is not None:
            carried = columns.follow(carried, params, state.step + 1)
        counts = {"tokens": computed.sum(), "context": jnp.where(computed, batch["positions"] + 1.0, 0).sum()}
        metrics = {**averages(sums), "objective": total, "grad_norm": norm, **counts}
        new = State(state.step + 1, params, opt, carried)
        if guard is not None:
            new, told = keep_good(guard, state, new, total, norm)
            metrics |= told
        if norms_of is not None:  # an update that is skipped is told, too: it may be what was wrong
            metrics |= raw | norms_of("update_norm", updates) | norms_of("weight_norm", new.params)
        return new, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))


def guarded(start: Callable[[Tree], Tree] | None) -> Callable[[Tree], Tree]:
    """What is carried at first, and the guard's numbers with it."""
    return lambda params: {**(start(params) if start else {}), KEY: start_guard()}


def make_eval(
    loss: Loss, weights: Weights, microbatches: int = 1, columns: Columns = NOTHING
) -> Callable[[State, Tree, Batch], Sums]:
    """Jit (state, frozen, batch) -> {name: (sum, weight)}, the same loss, no gradient; the caller adds batches."""

    def evaluate(state: State, frozen: Tree, batch: Batch) -> Sums:
        batch, _ = with_columns(columns, state.params, frozen, state.carried, batch, microbatches)
        return loss(join(state.params, frozen), batch, denominators(weights, batch))[1]

    return jax.jit(evaluate)


def with_columns(
    columns: Columns, params: Tree, frozen: Tree, carried: Tree, batch: Batch, pieces: int
) -> tuple[Batch, Tree]:
    """The batch with the columns that the loss needs of the model as it stands, and what is carried on; no gradient."""
    params, carried = jax.lax.stop_gradient((params, carried))
    if columns.score is not None:
        reference = join(carried["reference"], frozen) if "reference" in carried else None
        batch = {**batch, **map_pieces(partial(columns.score, join(params, frozen), reference), batch, pieces)}
    if columns.gather is None:
        return batch, carried
    made, carried = columns.gather(carried, batch)
    return {**batch, **made}, carried


def denominators(weights: Weights, batch: Batch) -> Norms:
    """The norms of a whole batch; one that is 0 counts as 1 (nothing to learn is a gradient of 0, not NaN)."""
    return {name: jnp.where(w == 0, jnp.ones_like(w), w) for name, w in weights(batch).items()}


def split_batch(batch: Batch, pieces: int) -> Batch:
    """[B, ..] -> [pieces, B / pieces, ..] taking every pieces-th row, so that each device keeps its own rows."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]), 1, 0), batch)


def join_batch(pieces: Batch) -> Batch:
    """The inverse of split_batch."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), pieces)


def filled(counts: Bool[Array, "pieces rows T"]) -> Int[Array, ""]:
    """How many pieces there are up to the last one in which a position counts, at least one: the others need not be
    computed."""
    used = counts.any((1, 2))
    return jnp.where(used, jnp.arange(1, used.size + 1), 1).max()


def map_pieces(make: Callable[[Batch], dict[str, Array]], batch: Batch, count: int) -> dict[str, Array]:
    """make(batch), `count` pieces one after the other; zeros where a piece is nothing but padding."""
    if count == 1:
        return make(batch)
    pieces = split_batch(batch, count)
    pick = lambda i: jax.tree.map(lambda x: x[i], pieces)  # noqa: E731
    zeros = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), jax.eval_shape(make, pick(0)))
    put = lambda i, made: jax.tree.map(lambda whole, part: whole.at[i].set(part), made, make(pick(i)))  # noqa: E731
    return dict(join_batch(jax.lax.fori_loop(0, filled(real(pieces)), put, zeros)))


# Metrics whose names end in /max or /min are (value, 1): extremes, that are not added up.


EMPTY = {"max": -jnp.inf, "min": jnp.inf}


def last_of(name: str) -> str:
    """The last part of a metric's name, which says what is done with two values of it."""
    return name.rpartition("/")[2]


def merge_sums(sums: Mapping[str, Any], more: Mapping[str, Any], of: Any = jnp) -> dict[str, Any]:
    """The metrics of two parts of a batch together; of: the library of arrays."""
    how = {"max": of.maximum, "min": of.minimum}
    return {name: jax.tree.map(how.get(last_of(name), of.add), pair, more[name]) for name, pair in sums.items()}


def averages(sums: Sums) -> dict[str, Float[Array, ""]]:
    """sum / weight of every metric."""
    return {name: total / jnp.where(weight == 0, 1, weight) for name, (total, weight) in sums.items()}
