"""Schedules, the optimizer chain and averages of the weights, from the config."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from configs.errors import UsageError
from configs.schema import Optim
from model.tree import flatten, path_string, select
from sharding.rules import STACKED

Tree = Any
Decays = Callable[[Tree], Tree]  # weights -> whether each decays
Side = tuple[tuple[int, ...], tuple[int, ...]] | None  # a matrix's axes of inputs and of outputs
Sides = Mapping[str, Side]  # by path, in ascending order of axes
RMS = 0.2  # of a Muon update, that of AdamW's as measured (arXiv 2502.16982): one learning rate serves both


def make_schedule(optim: Optim, steps: int) -> optax.Schedule:
    """updates done -> learning rate: linear warmup from 0, then `optim.schedule` towards final_ratio.

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
        "wsd": lambda: _wsd(optim, rest, min(rest, max(1, math.ceil(optim.decay_ratio * steps)))),
        "inverse_sqrt": lambda: _inverse_sqrt(peak, max(1, warmup)),
    }[optim.schedule]()
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


DECAYS = {
    "linear": lambda done: 1 - done,
    "sqrt": lambda done: 1 - jnp.sqrt(done),
    "cosine": lambda done: 0.5 * (1 + jnp.cos(jnp.pi * done)),
}


def _wsd(optim: Optim, rest: int, decay: int) -> optax.Schedule:
    """Warmup-stable-decay (arXiv 2404.06395; the shapes: arXiv 2405.18392): constant, then down in the last steps."""
    peak, end, shape = optim.learning_rate, optim.learning_rate * optim.final_ratio, DECAYS[optim.decay_shape]

    def rate(count: Any) -> Any:
        done = jnp.clip((count - (rest - decay)) / decay, 0.0, 1.0)
        return end + (peak - end) * shape(done)

    return rate


def _inverse_sqrt(peak: float, warmup: int) -> optax.Schedule:
    """peak * sqrt(warmup / step) (arXiv 1706.03762): goes on for any number of steps."""
    return lambda count: peak * jnp.sqrt(warmup / (count + warmup))


def _adamw(optim: Optim, rate: optax.Schedule, decays: Decays, sides: Sides) -> optax.GradientTransformation:
    """arXiv 1711.05101."""
    return optax.adamw(
        rate, b1=optim.b1, b2=_b2(optim), eps=optim.eps, mu_dtype=_moment(optim), weight_decay=optim.weight_decay,
        mask=decays,
    )  # fmt: skip


def _lion(optim: Optim, rate: optax.Schedule, decays: Decays, sides: Sides) -> optax.GradientTransformation:
    """arXiv 2302.06675."""
    return optax.lion(
        rate, b1=optim.b1, b2=_b2(optim), mu_dtype=_moment(optim), weight_decay=optim.weight_decay, mask=decays
    )


def _adafactor(optim: Optim, rate: optax.Schedule, decays: Decays, sides: Sides) -> optax.GradientTransformation:
    """arXiv 1804.04235, at the given learning rate (not relative to the weights' size) and without a first moment."""
    rms = _as_matrices(optax.scale_by_factored_rms(), sides)
    decay = optax.add_decayed_weights(optim.weight_decay, decays)
    return optax.chain(rms, optax.clip_by_block_rms(1.0), decay, optax.scale_by_learning_rate(rate))


def _as_matrices(tx: optax.GradientTransformation, sides: Sides) -> optax.GradientTransformation:
    """tx for leaves [L, inputs, outputs]: heads are no axis of their own, else second moments would hardly factor."""

    def flat(tree: Tree) -> Tree:
        def of(path: Any, x: Array) -> Array:
            if (side := sides[path_string(path)]) is None:
                return x
            return x.reshape(x.shape[0], *(math.prod(x.shape[i] for i in axes) for axes in side))

        return jax.tree_util.tree_map_with_path(of, tree)

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        made, state = tx.update(flat(updates), state, flat(params))
        return jax.tree.map(lambda x, like: x.reshape(like.shape), made, updates), state

    return optax.GradientTransformation(lambda params: tx.init(flat(params)), update)


def _muon(optim: Optim, rate: optax.Schedule, decays: Decays, sides: Sides) -> optax.GradientTransformation:
    """Muon (Jordan 2024; arXiv 2502.16982) for the matrices of layers, AdamW for all else.

    Of a stacked leaf [L, ...] each layer is a matrix of its own: optax left to itself would give such leaves to Adam.
    """
    if not any(sides.values()):
        raise UsageError(
            "optim.name is muon, but no weight that is trained is a matrix of a layer (adapters are not): use adamw"
        )
    dimensions = {path: side and optax.contrib.MuonDimensionNumbers(*side) for path, side in sides.items()}
    matrices = optax.contrib.muon(
        rate, beta=optim.momentum, weight_decay=optim.weight_decay, weight_decay_mask=decays, mu_dtype=_moment(optim),
        consistent_rms=RMS, muon_weight_dimension_numbers=lambda tree: _by_path(dimensions, tree),
    )  # fmt: skip
    labels = {path: "matrix" if side else "rest" for path, side in sides.items()}
    parts: dict[Any, optax.GradientTransformation] = {"matrix": matrices, "rest": _adamw(optim, rate, decays, sides)}
    return optax.partition(parts, lambda tree: _by_path(labels, tree))


def _schedule_free(optim: Optim, rate: optax.Schedule, decays: Decays, sides: Sides) -> optax.GradientTransformation:
    """Schedule-free AdamW (arXiv 2405.15682): the weights are trained at y, used at the average x."""
    adam = optax.scale_by_rms(_b2(optim), optim.eps, eps_in_sqrt=False, bias_correction=True)
    decay = optax.add_decayed_weights(optim.weight_decay, decays)
    base = _scaled(optax.chain(adam, decay, optax.scale_by_learning_rate(rate)), optim, list(sides))
    return optax.contrib.schedule_free(base, rate, b1=optim.b1)


OPTIMIZERS: dict[str, Callable[[Optim, optax.Schedule, Decays, Sides], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "lion": _lion,
    "adafactor": _adafactor,
    "muon": _muon,
    "schedule_free": _schedule_free,
}


def _b2(optim: Optim) -> float:
    return optim.b2 if optim.b2 is not None else 0.99 if optim.name == "lion" else 0.999


def _moment(optim: Optim) -> Any:
    return None if optim.state_dtype == "float32" else jnp.dtype(optim.state_dtype)


def _by_path(values: Mapping[str, Any], tree: Tree) -> Tree:
    """A tree of `values`, one for each leaf; what optax has masked out stays so."""
    masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if masked(leaf) else values[path_string(path)], tree, is_leaf=masked
    )


def sides_of(axes: Sequence[str], ndim: int) -> Side:
    """(input axes, output axes) of a layer's matrix stacked on a leading axis; None for what is not one."""
    width = [i for i, name in enumerate(axes) if name == "embed"]
    rest = tuple(i for i, name in enumerate(axes) if name not in ("embed", *STACKED))
    if not axes or axes[0] not in STACKED or "expert" in axes or len(width) != 1 or not rest or len(axes) != ndim:
        return None
    return (tuple(width), rest) if width[0] < rest[0] else (rest, tuple(width))


def make_optimizer(
    optim: Optim, steps: int, params: Tree, axes: Mapping[str, Sequence[str]] | None = None
) -> optax.GradientTransformation:
    """The optimizer for the trainable tree `params`; only weights matched by decay_patterns decay.

    axes: the logical axes of each weight, by path, for what treats matrices otherwise than other weights.
    """
    leaves = flatten(params)
    decayed = select(list(leaves), optim.decay_patterns, "optim.decay_patterns") if optim.weight_decay else set()
    decays = lambda tree: _by_path({path: path in decayed for path in leaves}, tree)  # noqa: E731
    sides = {path: sides_of((axes or {}).get(path, ()), leaf.ndim) for path, leaf in leaves.items()}
    tx = OPTIMIZERS[optim.name](optim, make_schedule(optim, steps), decays, sides)
    if optim.name != "schedule_free":
        tx = _scaled(tx, optim, list(leaves))
    tx = in_float32(tx)
    return tx if optim.ema_decay is None else with_average(tx, optim.ema_decay)


def _scaled(tx: optax.GradientTransformation, optim: Optim, paths: list[str]) -> optax.GradientTransformation:
    """The same with each weight's own learning rate, optim.rates: the last pattern that matches a weight counts."""
    if not optim.rates:
        return tx
    factors = dict.fromkeys(paths, 1.0)
    for pattern, factor in optim.rates.items():
        factors |= dict.fromkeys(select(paths, [pattern], "optim.rates"), factor)

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        updates, state = tx.update(updates, state, params)
        return jax.tree.map(lambda u, factor: u * factor, updates, _by_path(factors, updates)), state

    return optax.GradientTransformation(tx.init, update)


def _widen(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same update, moments and arithmetic in float32 at least whatever the weights' dtype (bfloat16 forgets)."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return tx.update(_widen(updates), state, None if params is None else _widen(params))

    return optax.GradientTransformation(lambda params: tx.init(_widen(params)), update)


class Average(NamedTuple):
    """An optimizer's state with the moving average of the weights beside it."""

    inner: Any
    count: Any  # i32[]
    value: Tree  # float32 at least


def with_average(tx: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """Also keep an exponential moving average of the weights; of the first steps it is a plainer mean,
    min(decay, (1 + n) / (10 + n)), so that where it began is soon forgotten."""

    def init(params: Tree) -> Average:
        return Average(tx.init(params), jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, _widen(params)))

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Average]:
        updates, inner = tx.update(updates, state.inner, params)
        kept = jnp.minimum(decay, (1.0 + state.count) / (10.0 + state.count))
        value = jax.tree.map(lambda a, p, u: a + (1 - kept) * (p + u - a), state.value, _widen(params), updates)
        return updates, Average(inner, state.count + 1, value)

    return optax.GradientTransformation(init, update)


def averaged(params: Tree, opt: Any) -> Tree:
    """The weights to use: their average, where the optimizer keeps one; else as they are."""
    if isinstance(opt, Average):
        return jax.tree.map(lambda value, p: value.astype(p.dtype), opt.value, params)
    if isinstance(opt, optax.contrib.ScheduleFreeState):
        made = optax.contrib.schedule_free_eval_params(opt, _widen(params))
        return jax.tree.map(lambda value, p: value.astype(p.dtype), made, params)
    return params
