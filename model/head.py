"""What comes behind the last norm: the vocabulary head, chunk by chunk over tokens (no [B, T, V] array, in either
direction), or a reward model's score head."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from configs.errors import UsageError
from model.architecture import Architecture
from model.product import once
from model.vocabulary import Cut, Form
from model.weights import contract, materialise
from sharding.rules import DEFAULT, Rules


@partial(jax.tree_util.register_dataclass, data_fields=("weight",), meta_fields=("tied", "scale", "softcap", "rules"))
@dataclass(frozen=True)
class Head:
    """The output projection, how it makes logits (see Form), and the rules by which it is split."""

    weight: Any
    tied: bool
    scale: float = 1.0
    softcap: float | None = None
    rules: Rules = DEFAULT

    @property
    def form(self) -> Form:
        return Form(self.tied, self.scale, self.softcap, self.rules)


def head_of(arch: Architecture, params: Any, rules: Rules = DEFAULT) -> Head:
    """The head's weight, whichever leaf that is."""
    if arch.num_labels:
        raise UsageError("this is a reward model: it scores texts and has no language-model head")
    weight = params["embed" if arch.tie_embeddings else "head"]["weight"]
    return Head(weight, arch.tie_embeddings, arch.logit_scale, arch.logit_softcap, rules)


def scores(arch: Architecture, params: Any, hidden: Float[Array, "B T D"]) -> Float[Array, "B T C"]:
    """What a reward model says at every position, in float32 at least: a reward by each head, or with labels of tokens
    the log-odds of good over bad (C = 1)."""
    if not arch.num_labels:
        raise UsageError("this is a language model: it has no score head, which objective.type=reward trains")
    wide, score = jnp.promote_types(hidden.dtype, jnp.float32), params["score"]
    out = contract("BTD,DC->BTC", hidden.astype(wide), score["weight"])
    if arch.token_labels:
        bias = score["bias"].astype(wide)
        return out[..., 1:] - out[..., :1] + (bias[1] - bias[0])
    return out


def logits(hidden: Float[Array, "B T D"], head: Head) -> Float[Array, "B T V"]:
    """All logits, in float32 at least (for decoding and tests; losses go by chunks)."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    return head.form.bent(contract(head.form.spec, hidden, head.weight).astype(wide))


def chunk_length(batch: int, length: int, chunk: int) -> int:
    """Time steps per chunk so that a chunk holds about `chunk` tokens and chunks divide the row evenly."""
    pieces = max(1, -(-length * batch // chunk))
    return -(-length // pieces)


def _split(x: Array, size: int) -> Array:
    """[B, T, ..] -> [n, B, size, ..], padded with zeros; the batch axis keeps its sharding."""
    pad = -x.shape[1] % size
    x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _merge(x: Array, length: int) -> Array:
    """The inverse of _split."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Head,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk: int = 512,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum of weights * (-log p(target) + z_loss * log(Z)^2), in nats; sum of weights * [no logit beats the target's]).

    The gradient is made in the forward pass, while a chunk's logits are at hand; a frozen head gets none.
    """
    dense = materialise(head.weight)
    return _cross_entropy(hidden, dense, targets, weights, head.form, chunk, z_loss)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _cross_entropy(x: Any, w: Any, y: Any, m: Any, form: Form, chunk: int, z: float) -> Any:
    return _scan(x, w, y, m, form, chunk, z, False, False)[0]


def _forward(x: Any, w: Any, y: Any, m: Any, form: Form, chunk: int, z: float) -> Any:
    return _scan(x.value, w.value, y.value, m.value, form, chunk, z, x.perturbed, w.perturbed)


def _backward(form: Form, chunk: int, z: float, residuals: Any, cotangent: Any) -> Any:
    g, dx, dw = cotangent[0], *residuals
    if isinstance(g, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    scale = lambda d: None if d is None else (d * g).astype(d.dtype)  # noqa: E731
    return scale(dx), scale(dw), None, None


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _scan(x: Any, w: Any, y: Any, m: Any, form: Form, chunk: int, z: float, want_dx: bool, want_dw: bool) -> Any:
    """((loss sum, correct sum), (dx, dw)): one pass over chunks of tokens; dx and dw only if wanted."""
    fn = partial(_pass, form=form, chunk=chunk, z=z, want_dx=want_dx, want_dw=want_dw)
    return form.per_device(fn, x, w, 2, lambda rows, table: (P(), (rows, table)))(x, w, y, m)


def _pass(x: Any, w: Any, y: Any, m: Any, *, form: Form, chunk: int, z: float, want_dx: bool, want_dw: bool, cut: Cut
          ) -> Any:  # fmt: skip
    """_scan of a device's tokens and part of the vocabulary: gathered once, and summed over devices once."""
    size = chunk_length(x.shape[0], x.shape[1], chunk)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    wx = form.whole(w, x.dtype, cut)

    def body(carry: Any, piece: Any) -> Any:
        loss, correct, dw = carry
        xc, yc, mc = piece
        logit = form.logits(xc, wx)
        top = cut.largest(logit.max(axis=-1))
        odds = once(jnp.exp(logit - top[..., None]))
        total, chosen = cut.summed((odds.sum(axis=-1), _chosen(logit, yc, cut)))
        log_z = jnp.log(total) + top
        loss += (mc * (log_z - chosen + z * log_z**2)).sum()
        correct += (mc * (chosen >= top)).sum()  # an argmax would be one more pass, and a slow one
        dx = None
        if want_dx or want_dw:
            p = odds * (mc * (1 + 2 * z * log_z) / total)[..., None]
            p = form.by_product(jnp.where(_hit(logit, yc, cut), p - mc[..., None], p), logit).astype(x.dtype)
            dx = form.by_hidden(p, wx) if want_dx else None
            if want_dw:  # [D, V] for a tied head too: only x, the small one, is transposed for the product
                dw = dw + jnp.einsum("BTD,BTV->DV", xc, p, preferred_element_type=wide)
        return (loss, correct, dw), dx

    zero = jnp.zeros((), wide)
    start = (zero, zero, jnp.zeros(wx.shape[::-1] if form.tied else wx.shape, wide) if want_dw else None)
    pieces = (_split(x, size), _split(y, size), _split(m.astype(wide), size))
    (loss, correct, dw), dx = jax.lax.scan(body, start, pieces)
    dx = cut.summed(_merge(dx, x.shape[1])) if want_dx else None
    return cut.of_all((loss, correct)), (dx, None if dw is None else form.gradient(dw, w.dtype, cut))


def _hit(logit: Array, y: Array, cut: Cut) -> Array:
    """Which logits are those of y."""
    at = cut.local(y, logit.shape[-1])
    return jax.lax.broadcasted_iota(y.dtype, logit.shape, 2) == at[..., None]


def _chosen(logit: Array, y: Array, cut: Cut) -> Array:
    """The logit of y, 0 where another device has it."""
    if cut.vocab.size > 1:
        return jnp.where(_hit(logit, y, cut), logit, 0).sum(axis=-1)
    return jnp.take_along_axis(logit, y[..., None], axis=-1)[..., 0]


def token_logprobs(
    hidden: Float[Array, "B T D"],
    head: Head,
    targets: Int[Array, "B T"],
    chunk: int = 512,
    temperature: float = 1.0,
    where: Bool[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """log softmax(logits / temperature)[target] of the positions in `where` (all), in nats; 0 elsewhere, at no cost.

    The gradient of the hidden states is made in the forward pass, up to a factor a token; only a head that learns needs
    its logits once more.
    """
    return _token_values(hidden, head, targets, where, _Reading(head.form, chunk, temperature))[0]


def token_logprobs_and(
    statistic: str,
    hidden: Float[Array, "B T D"],
    head: Head,
    targets: Int[Array, "B T"],
    chunk: int = 512,
    temperature: float = 1.0,
    where: Bool[Array, "B T"] | None = None,
    learn: bool = False,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """token_logprobs, and another number of the same softmax: "entropy" in nats, or "squares", log of the sum of p^2.

    No gradient flows through that number unless `learn` (the entropy's may; it takes one more product with the head).
    """
    reading = _Reading(head.form, chunk, temperature, statistic, learn)
    if learn and STATISTICS[statistic].slope is None:
        raise ValueError(f"the statistic {statistic} has no gradient")
    return _token_values(hidden, head, targets, where, reading)


@dataclass(frozen=True)
class Statistic:
    """A number of a softmax p: from odds = exp(shifted), their sum and what sums over the vocabulary; its derivative by
    the logits, from p, log p and the number."""

    value: Callable[[Array, Array, Array, Callable[[Array], Array]], Array]
    slope: Callable[[Array, Array, Array], Array] | None = None


STATISTICS = {
    "squares": Statistic(lambda odds, total, _, summed: jnp.log(summed(odds**2)) - 2 * jnp.log(total)),
    "entropy": Statistic(
        lambda odds, total, shifted, summed: jnp.log(total) - summed(odds * shifted) / total,
        lambda p, logp, entropy: -p * (logp + entropy[..., None]),
    ),
}


@dataclass(frozen=True)
class _Reading:
    """How the logits of a chunk are read."""

    form: Form
    chunk: int
    temperature: float
    statistic: str | None = None
    learn: bool = False


def _token_values(x: Any, head: Head, y: Any, where: Any, how: _Reading) -> Any:
    where = jnp.ones(y.shape, bool) if where is None else where
    return _logprobs(x, materialise(head.weight), y, where, how)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _logprobs(x: Any, w: Any, y: Any, m: Any, how: _Reading) -> Any:
    return _walk(x, w, y, m, how, False)[0]


def _logprobs_forward(x: Any, w: Any, y: Any, m: Any, how: _Reading) -> Any:
    given = x.value, w.value, y.value, m.value
    found, dx, log_z = _walk(*given, how, x.perturbed)
    return found, (dx, m.value, (*given, log_z, found[1]) if w.perturbed else None)


def _logprobs_backward(how: _Reading, residuals: Any, cotangents: Any) -> Any:
    dx, m, again = residuals
    wanted = [
        None if isinstance(g, jax.custom_derivatives.SymbolicZero) else jnp.where(m, g, 0)
        for g in cotangents[: 1 + how.learn]
    ]
    if all(g is None for g in wanted):
        return None, None, None, None
    if dx is not None:
        parts: list[Array] = [d * g[..., None] for d, g in zip(dx, wanted, strict=True) if g is not None]
        dx = sum(parts[1:], start=parts[0]).astype(dx[0].dtype)
    if again is None:
        return dx, None, None, None
    x, w, y, m, log_z, number = again
    gs = [jnp.zeros_like(log_z) if g is None else g for g in wanted]
    columns = (y, m, log_z, number, *gs)
    fn = how.form.per_device(partial(_learn, how=how), x, w, len(columns), lambda _, table: table)
    return dx, fn(x, w, *columns), None, None


def _learn(x: Any, w: Any, y: Any, m: Any, log_z: Any, number: Any, *gs: Any, how: _Reading, cut: Cut) -> Any:
    """The gradient of the head, of gradients gs of the log-probs (and the statistic): its logits are made once more."""
    wide, wx = jnp.promote_types(x.dtype, jnp.float32), how.form.whole(w, x.dtype, cut)

    def learn(dw: Array, xc: Array, yc: Array, zc: Array, nc: Array, *gs: Array) -> Array:
        logit = how.form.logits(xc, wx)
        logp = logit / how.temperature - zc[..., None]
        slopes = _slopes(jnp.exp(logp), logp, yc, nc, how, cut)
        parts = [slope * (g / how.temperature)[..., None] for slope, g in zip(slopes, gs, strict=True)]
        d = how.form.by_product(sum(parts[1:], start=parts[0]), logit).astype(x.dtype)
        return dw + jnp.einsum("BTD,BTV->DV", xc, d, preferred_element_type=wide)

    def body(dw: Array, piece: Any) -> Any:
        mc, *rest = piece
        return jax.lax.cond(mc.any(), learn, lambda dw, *_: dw, dw, *rest), None

    start = jnp.zeros(wx.shape[::-1] if how.form.tied else wx.shape, wide)
    dw, _ = jax.lax.scan(body, start, _gather(m, (m, x, y, log_z, number, *gs), how.chunk)[0])
    return how.form.gradient(dw, w.dtype, cut)


_logprobs.defvjp(_logprobs_forward, _logprobs_backward, symbolic_zeros=True)


def _slopes(p: Array, logp: Array, y: Array, number: Array, how: _Reading, cut: Cut) -> list[Array]:
    """Derivatives by logits / temperature: of the log-prob of y, and of the statistic if its gradient is wanted."""
    slopes = [jnp.where(_hit(p, y, cut), 1 - p, -p)]
    if how.learn and (slope := STATISTICS[how.statistic or ""].slope) is not None:
        slopes.append(slope(p, logp, number))
    return slopes


def _gather(m: Array, columns: tuple[Array, ...], chunk: int) -> tuple[tuple[Array, ...], Array]:
    """Chunks of the columns, each row's positions in `m` first, so that the last chunks are empty; and the way back."""
    order = jnp.argsort(~m, axis=1, stable=True)
    size = chunk_length(m.shape[0], m.shape[1], chunk)
    pick = lambda x: jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)  # noqa: E731
    return tuple(_split(pick(x), size) for x in columns), jnp.argsort(order, axis=1)


def _walk(x: Any, w: Any, y: Any, m: Any, how: _Reading, want_dx: bool) -> Any:
    """((log p, statistic), their derivatives by x, log Z): one pass over chunks of tokens; what is not wanted is None
    or 0."""
    fn = partial(_read, how=how, want_dx=want_dx)
    return how.form.per_device(fn, x, w, 2, lambda rows, _: rows)(x, w, y, m)


def _read(x: Any, w: Any, y: Any, m: Any, *, how: _Reading, want_dx: bool, cut: Cut) -> Any:
    """_walk of a device's tokens and part of the vocabulary."""
    wide, wx = jnp.promote_types(x.dtype, jnp.float32), how.form.whole(w, x.dtype, cut)

    def read(xc: Array, yc: Array) -> Any:
        logits = how.form.logits(xc, wx)
        logit = logits / how.temperature
        top = cut.largest(logit.max(axis=-1))
        shifted = logit - top[..., None]
        odds = once(jnp.exp(shifted))
        total, chosen = cut.summed((odds.sum(axis=-1), _chosen(logit, yc, cut)))
        log_z = jnp.log(total) + top
        logp = chosen - log_z
        number = jnp.zeros_like(logp)
        if how.statistic is not None:
            number = STATISTICS[how.statistic].value(odds, total, shifted, lambda x: cut.summed(x.sum(axis=-1)))
        dx = None
        if want_dx:
            slopes = _slopes(odds / total[..., None], logit - log_z[..., None], yc, number, how, cut)
            products = [how.form.by_product(slope / how.temperature, logits).astype(x.dtype) for slope in slopes]
            dx = [how.form.by_hidden(d, wx) for d in products]
        return (logp, number), dx, log_z

    def skip(xc: Array, yc: Array) -> Any:
        zeros = jnp.zeros(yc.shape, wide)
        return (zeros, zeros), [jnp.zeros_like(xc)] * (1 + how.learn) if want_dx else None, zeros

    pieces, way = _gather(m, (m, x, y), how.chunk)
    some = cut.anywhere(pieces[0].any(axis=(1, 2)))  # all devices take one way: there are sums over them in it
    found = jax.lax.map(lambda piece: jax.lax.cond(piece[0], read, skip, *piece[1:]), (some, *pieces[1:]))
    merged = jax.tree.map(lambda part: _merge(part, x.shape[1]), found)
    spread = lambda x: jnp.take_along_axis(x, way.reshape(*way.shape, *(1,) * (x.ndim - 2)), axis=1)  # noqa: E731
    values, dx, log_z = jax.tree.map(spread, merged)
    dx = jax.tree.map(cut.summed, dx)
    return jax.tree.map(lambda value: jnp.where(m, value, 0), values), dx, log_z
