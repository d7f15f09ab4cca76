"""Mixture of experts: a router picks top_k of E experts for each token, none is dropped, and their outputs are weighed.

M tokens (all of a batch), D model, E experts, F an expert's ffn, k experts a token.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name as keep
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from model.architecture import Architecture, Experts
from model.compute import Compute
from model.exchange import Apart, apart, by_exchange
from model.layers import Birth, Linear, weight
from model.weights import materialise, ragged
from sharding.place import constrain, per_device
from sharding.platform import platform
from sharding.rules import Rules

BACKENDS = ("auto", "ragged", "blocks", "dense")
Glu = Callable[[Array, Array], Array]  # (gate, up) -> hidden


def clipped_glu(gate: Array, up: Array, *, alpha: float, limit: float) -> Array:
    """gpt-oss's SwiGLU: (up + 1) gate sigmoid(alpha gate), gate at most `limit`, up within it."""
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(alpha * gate)


def route(
    logits: Float[Array, "M E"], how: Experts, correction: Float[Array, "E"] | None = None
) -> tuple[Int[Array, "M k"], Float[Array, "M k"]]:
    """The chosen experts of each token and their weights.

    correction: added to the scores for choosing only (arXiv 2408.15664); no gradient reaches it. With groups of
    experts only those of the best groups are candidates (DeepSeek-V2, arXiv 2405.04434; V3, arXiv 2412.19437).
    """
    kinds = {"softmax": partial(jax.nn.softmax, axis=-1), "sigmoid": jax.nn.sigmoid, "chosen": lambda x: x}
    scores = kinds[how.scores](logits)
    choice = jax.lax.stop_gradient(scores if correction is None else scores + correction[None])
    if how.groups > 1:
        grouped = choice.reshape(len(choice), how.groups, -1)
        best = jax.lax.top_k(grouped, how.group_best)[0].sum(-1)
        kept = jax.nn.one_hot(jax.lax.top_k(best, how.groups_kept)[1], how.groups, dtype=bool).any(1)
        choice = jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(choice.shape)
    chosen = jax.lax.top_k(choice, how.top_k)[1]
    weights = jnp.take_along_axis(scores, chosen, axis=1)
    if how.scores == "chosen":
        weights = jax.nn.softmax(weights, axis=-1)
    elif how.normalise:
        weights = weights / weights.sum(-1, keepdims=True)
    return chosen, how.scale * weights


@partial(jax.tree_util.register_dataclass, data_fields=("gate", "up", "down", "biases"), meta_fields=())
@dataclass(frozen=True)
class Bank:
    """The experts' weights: gate and up [E, D, F], down [E, F, D]; biases of the three [E, F], [E, F], [E, D]."""

    gate: Any
    up: Any
    down: Any
    biases: tuple[Any, Any, Any] | None = None


def apply_experts(
    x: Float[Array, "M D"],
    chosen: Int[Array, "M k"],
    weights: Float[Array, "M k"],
    bank: Bank,
    glu: Glu,
    backend: str = "auto",
    here: Bool[Array, "M k"] | None = None,
) -> Float[Array, "M D"]:
    """Sum over a token's experts of weight * down(glu(gate(x), up(x))); no token is dropped.

    ragged: tokens sorted by expert, one grouped product. blocks: the same in blocks of one expert each, of which there
    are at most twice as many as needed: a CPU has no grouped product (XLA makes E masked ones of all rows there).
    dense: every expert computes every token, the reference.

    here: which choices count; the others are of experts elsewhere.
    """
    if backend == "auto":
        backend = _choose(chosen.shape[0], chosen.shape[1], bank.gate.shape[0]) if platform() == "cpu" else "ragged"
    ways = {"ragged": _ragged, "blocks": _blocks, "dense": _dense}
    if backend not in ways:
        raise ValueError(f"experts' backend '{backend}' is unknown; allowed: {', '.join(BACKENDS)}")
    if here is not None:  # one more expert, whom the bank has not
        chosen, weights = jnp.where(here, chosen, bank.gate.shape[0]), jnp.where(here, weights, 0)
    return ways[backend](x, chosen, weights, bank, glu, here is not None)


def _choose(M: int, k: int, E: int) -> str:
    """What is faster on a CPU: there reading a weight takes as long as 10 products with it, gathering one thrice that.

    blocks against dense, 2 cores, a gradient: 2.4 x for 2 of 8 experts and 1024 tokens, 4.9 x for 4 of 32; forward of
    one token through 4 of 64 100 x, but of 8 tokens through 2 of 8 0.25 x.
    """
    size, count = _cut(M * k, E)
    return "dense" if E * (M + 10) < count * (size + 30) else "blocks"


def _cut(rows: int, E: int) -> tuple[int, int]:
    """The size of a block of rows, and how many there are at most."""
    size = max(1, rows // E)
    return size, rows if size == 1 else rows // size + E


def _dense(x: Array, chosen: Array, weights: Array, bank: Bank, glu: Glu, some: bool) -> Array:
    gate, up, down = (materialise(w).astype(x.dtype) for w in (bank.gate, bank.up, bank.down))
    b_gate, b_up, b_down = (None,) * 3 if bank.biases is None else (b.astype(x.dtype)[:, None] for b in bank.biases)
    hidden = glu(
        keep(_plus(jnp.einsum("MD,EDF->EMF", x, gate), b_gate), "gate_up"),
        keep(_plus(jnp.einsum("MD,EDF->EMF", x, up), b_up), "gate_up"),
    )
    out = _plus(jnp.einsum("EMF,EFD->EMD", hidden, down), b_down)
    hit = jax.nn.one_hot(chosen, gate.shape[0], dtype=weights.dtype)
    share = jnp.einsum("Mk,MkE->ME", weights, hit)
    return jnp.einsum("EMD,ME->MD", out, share).astype(x.dtype)


def _ragged(x: Array, chosen: Array, weights: Array, bank: Bank, glu: Glu, some: bool) -> Array:
    order, expert, sizes = _sorted(chosen, bank.gate.shape[0])
    known = (expert < bank.gate.shape[0])[:, None] if some else True  # the product of others' rows may be anything
    rows = jnp.where(known, _pick(jnp.repeat(x, chosen.shape[1], axis=0), order), 0)
    bias = lambda i: None if bank.biases is None else bank.biases[i].astype(x.dtype)[expert]  # noqa: E731
    hidden = glu(
        keep(_plus(ragged(rows, bank.gate, sizes), bias(0)), "gate_up"),
        keep(_plus(ragged(rows, bank.up, sizes), bias(1)), "gate_up"),
    )
    out = jnp.where(known, _plus(ragged(hidden, bank.down, sizes), bias(2)), 0)
    return _weigh(_pick(out, jnp.argsort(order)), weights, x)


def _blocks(x: Array, chosen: Array, weights: Array, bank: Bank, glu: Glu, some: bool) -> Array:
    E, rows = bank.gate.shape[0], chosen.size
    order, expert, sizes = _sorted(chosen, E + some)
    size, count = _cut(rows, E + some)
    whole = -(-sizes // size)  # blocks of each expert
    ends = jnp.cumsum(whole)
    place = (ends - whole)[expert] * size + jnp.arange(rows) - (jnp.cumsum(sizes) - sizes)[expert]
    owner = jnp.minimum(jnp.searchsorted(ends, jnp.arange(count), side="right"), E - 1)
    put = jnp.zeros((count * size, x.shape[1]), x.dtype).at[place]
    tokens = put.set(_pick(jnp.repeat(x, chosen.shape[1], axis=0), order), unique_indices=True)
    of = lambda w: materialise(w)[owner].astype(x.dtype)  # noqa: E731
    bias = lambda i: None if bank.biases is None else of(bank.biases[i])[:, None]  # noqa: E731
    tokens = tokens.reshape(count, size, -1)
    hidden = glu(
        keep(_plus(jnp.einsum("BRD,BDF->BRF", tokens, of(bank.gate)), bias(0)), "gate_up"),
        keep(_plus(jnp.einsum("BRD,BDF->BRF", tokens, of(bank.up)), bias(1)), "gate_up"),
    )
    out = _plus(jnp.einsum("BRF,BFD->BRD", hidden, of(bank.down)), bias(2)).reshape(count * size, -1)
    return _weigh(_pick(out, place[jnp.argsort(order)]), weights, x)


def _sorted(chosen: Array, E: int) -> tuple[Array, Array, Array]:
    """Each token's choices by expert: their order, the expert of each, and how many each expert has."""
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    return order, flat[order], jnp.bincount(flat, length=E).astype(jnp.int32)


def _pick(rows: Array, at: Array) -> Array:
    """rows[at] of places that differ and exist: then the gradient is a plain scatter."""
    return rows.at[at].get(unique_indices=True, mode="promise_in_bounds")


def _weigh(rows: Array, weights: Array, x: Array) -> Array:
    """The weighted sum of each token's rows."""
    return jnp.einsum("MkD,Mk->MD", rows.reshape(*weights.shape, -1), weights).astype(x.dtype)


def _plus(x: Array, bias: Array | None) -> Array:
    return x if bias is None else x + bias


def mix(
    x: Float[Array, "B T D"],
    logits: Float[Array, "B T E"],
    correction: Float[Array, "E"] | None,
    bank: Bank,
    how: Experts,
    glu: Glu,
    backend: str,
    rules: Rules,
) -> tuple[Float[Array, "B T D"], Int[Array, "B T k"]]:
    """What the experts make of tokens that choose them by the logits, and which they choose; over the mesh in context.

    No token is dropped, whatever the balance. With experts on more devices than a token has experts, tokens go to the
    devices of theirs and back (where there is such a collective). Else each device computes for the tokens of all what
    its own experts have to say, and the parts are summed where the token is: a token then goes to fewer devices so.
    """
    bank = Bank(materialise(bank.gate), materialise(bank.up), materialise(bank.down), bank.biases)
    cut = apart(rules, x.shape, bank.gate.shape)
    fn = partial(_mixed, how=how, glu=glu, backend=backend, cut=cut)
    if cut is None:
        return fn(x, logits, correction, bank)
    wide, narrow = P(cut.expert, cut.embed, cut.mlp), P(cut.expert, cut.mlp, cut.embed)
    hidden, out = P(cut.expert, cut.mlp), P(cut.expert, cut.embed)
    biases = None if bank.biases is None else (hidden, hidden, out)
    tokens = P(cut.batch, cut.along)
    return per_device(fn, (tokens, tokens, P(), Bank(wide, wide, narrow, biases)), (tokens, tokens))(
        x, logits, correction, bank
    )


def _mixed(x: Any, logits: Any, correction: Any, bank: Bank, *, how: Experts, glu: Glu, backend: str, cut: Apart | None
           ) -> Any:  # fmt: skip
    chosen, weights = route(logits.reshape(-1, how.count), how, correction)
    rows, picked = x.reshape(-1, x.shape[-1]), chosen
    if cut is None:
        return apply_experts(rows, chosen, weights, bank, glu, backend).reshape(x.shape), _of(x, chosen)
    bank = _whole(bank, x.dtype, cut)
    sent = cut.sent(how.top_k)
    shared = tuple(axis for axis in cut.shared if not sent or axis not in cut.expert)
    if shared:
        rows, picked, weights = jax.lax.all_gather((rows, picked, weights), shared, tiled=True)
    if sent:
        one = lambda rows, expert, here: apply_experts(  # noqa: E731
            rows, expert, jnp.ones(expert.shape, weights.dtype), bank, glu, backend, here
        )
        out = _weigh(by_exchange(rows, picked, bank.gate.shape[0], cut.expert[0], one), weights, rows)
    elif cut.expert:
        count = bank.gate.shape[0]
        picked = picked - jax.lax.axis_index(cut.expert) * count
        here = (picked >= 0) & (picked < count)
        first = jnp.argsort(~here, axis=1, stable=True)[:, : min(how.top_k, count)]  # no more can be of a device
        picked, weights, here = (jnp.take_along_axis(part, first, axis=1) for part in (picked, weights, here))
        out = apply_experts(rows, picked, weights, bank, glu, backend, here)
    else:
        out = apply_experts(rows, picked, weights, bank, glu, backend)
    if shared:
        out = jax.lax.psum_scatter(out, shared, scatter_dimension=0, tiled=True)
    return (jax.lax.psum(out, cut.summed) if cut.summed else out).reshape(x.shape), _of(x, chosen)


def _of(x: Array, chosen: Array) -> Array:
    return chosen.reshape(*x.shape[:2], -1)


def _whole(bank: Bank, dtype: Any, cut: Apart) -> Bank:
    """This device's experts at their full width; of several that share an expert's ffn one has the last bias."""
    full = lambda w, axis: (  # noqa: E731
        jax.lax.all_gather(w.astype(dtype), cut.embed, axis=axis, tiled=True) if cut.embed else w.astype(dtype)
    )
    biases = bank.biases
    if biases is not None:
        last = full(biases[2], 1)
        last = jnp.where(jax.lax.axis_index(cut.mlp) == 0, last, 0) if cut.mlp else last
        biases = biases[0], biases[1], last
    return Bank(full(bank.gate, 1), full(bank.up, 1), full(bank.down, 2), biases)


class Moe(nn.Module):
    """A layer's routed experts, and the shared ones beside them. With the collection `router` mutable it tells what the
    router did with the tokens that are `real`."""

    arch: Architecture
    compute: Compute
    mlp: Callable[..., nn.Module]  # (arch, compute) -> an MLP
    activation: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Any, real: Any = None) -> Any:
        a, e = self.arch, self.arch.experts
        assert e is not None
        rules, wide = self.compute.rules, jnp.promote_types(x.dtype, jnp.float32)
        shape, axes = (a.d_model, e.count), ("embed", "router")
        logits = Linear("BTD,DE->BTE", shape, axes, 1, e.router_bias, a.init_std, name="router")(x.astype(wide))
        correction = weight(self, "correction", (e.count,), ("router",), Birth()) if e.correction else None
        correction = None if correction is None else correction.astype(wide)
        bank = _Bank(e, a.d_model, a.init_std, name="experts")()
        glu = partial(clipped_glu, alpha=e.glu[0], limit=e.glu[1]) if e.glu else partial(_glu, self.activation)
        mixed = partial(mix, how=e, glu=glu, backend=self.compute.experts, rules=rules)
        out, chosen = mixed(x, logits, correction, bank)
        if self.is_mutable_collection("router"):
            self.sow("router", "seen", seen(logits, chosen, real))
        if e.shared_d_ff:
            x = constrain(x, rules, "batch", "seq", "width")
            more = self.mlp(replace(a, d_ff=e.shared_d_ff, mlp_bias=False), self.compute, name="shared")(x)
            if e.shared_gate:
                gate = Linear("BTD,DC->BTC", (a.d_model, 1), ("embed", "router"), std=a.init_std, name="shared_gate")
                more = jax.nn.sigmoid(gate(x)) * more
            out = out + more
        return out


def _glu(activation: Callable[[Array], Array], gate: Array, up: Array) -> Array:
    return activation(gate) * up


class _Bank(nn.Module):
    """Declares the experts' weights."""

    experts: Experts
    width: int
    std: float

    @nn.compact
    def __call__(self) -> Bank:
        e = self.experts
        wide, wide_axes = (e.count, self.width, e.d_ff), ("expert", "expert_embed", "mlp")
        narrow, narrow_axes = (e.count, e.d_ff, self.width), ("expert", "mlp", "expert_embed")
        gate, b_gate = _Leaves(wide, wide_axes, e.bias, self.std, name="gate")()
        up, b_up = _Leaves(wide, wide_axes, e.bias, self.std, name="up")()
        down, b_down = _Leaves(narrow, narrow_axes, e.bias, self.std, name="down")()
        return Bank(gate, up, down, (b_gate, b_up, b_down) if e.bias else None)


class _Leaves(nn.Module):
    """One of the experts' three weights, and its bias."""

    shape: tuple[int, int, int]
    axes: tuple[str, str, str]
    bias: bool
    std: float

    @nn.compact
    def __call__(self) -> Any:
        w = weight(self, "weight", self.shape, self.axes, Birth(self.std))
        shape, axes = (self.shape[0], self.shape[2]), (self.axes[0], self.axes[2])
        return w, weight(self, "bias", shape, axes, Birth()) if self.bias else None


@partial(jax.tree_util.register_dataclass, data_fields=("load", "probs", "squares", "tokens"), meta_fields=())
@dataclass(frozen=True)
class Seen:
    """Sums over the real tokens of a layer (stacked: of layers): times chosen, softmax of the logits, log(Z)^2."""

    load: Float[Array, "*L E"]
    probs: Float[Array, "*L E"]
    squares: Float[Array, "*L"]
    tokens: Float[Array, "*L"]


def seen(logits: Float[Array, "*M E"], chosen: Int[Array, "*M k"], real: Bool[Array, "*M"] | None) -> Seen:
    """What the router did with the real tokens: padding does not count."""
    counts = jnp.ones(logits.shape[:-1], logits.dtype) if real is None else real.astype(logits.dtype)
    hits = jax.nn.one_hot(chosen, logits.shape[-1], dtype=logits.dtype).sum(-2)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    total = partial(jnp.tensordot, counts, axes=counts.ndim)
    return Seen(total(hits), total(jax.nn.softmax(logits, axis=-1)), total(log_z**2), counts.sum())


def balance_loss(seen: Seen) -> Float[Array, ""]:
    """E * sum over experts of (times chosen a token) * (mean probability), means over tokens and layers: k at best
    (Switch, arXiv 2101.03961, eq. 4 to 6; transformers' load_balancing_loss_func)."""
    rows = jnp.maximum(seen.tokens.sum(), 1)
    return seen.load.shape[-1] * (seen.load.sum(0) / rows * (seen.probs.sum(0) / rows)).sum()


def z_loss(seen: Seen) -> Float[Array, ""]:
    """The mean of log(Z)^2 of the router's logits over tokens and layers (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return seen.squares.sum() / jnp.maximum(seen.tokens.sum(), 1)


def largest_load(seen: Seen) -> Float[Array, ""]:
    """The share of a layer's choices that its busiest expert takes, of the worst layer; 1 / E is balance."""
    return (seen.load.max(-1) / jnp.maximum(seen.load.sum(-1), 1)).max()
