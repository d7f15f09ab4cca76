"""The decoder-only transformer: a scan over blocks. Declares every weight; all maths is in free functions.

B batch, T query time, S key time, D model, N query heads, K kv heads, H head dim, F ffn, V vocab, L layers.
"""

from dataclasses import dataclass, replace
from functools import cache as memoise
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model import cache as kv
from model.architecture import Architecture
from model.block import Block, layers
from model.cache import Buffer, Cache
from model.cached_attention import Sight, look
from model.compute import Compute
from model.context import straight, zigzag
from model.layers import Birth, Linear, Norm, Table
from model.mask import Mask, self_attention
from model.moe import Seen
from model.pattern import angles_of, layers_of
from model.pipeline import PIPELINED, Schedule, pipeline, planned
from model.tree import flatten
from model.vocabulary import look_up
from model.weights import take
from sharding.place import constrain


class Transformer(nn.Module):
    """Tokens to the final hidden state (after the last norm), and the cache with the new keys and values.

    collect: instead of a cache, the keys and values of all layers, [L, B, K, T, H] each.
    """

    arch: Architecture
    compute: Compute
    collect: bool = False

    @nn.compact
    def __call__(self, tokens: Any, positions: Any, mask: Mask | Sight, cache: Cache | None) -> Any:
        a, c = self.arch, self.compute
        table = Table((a.vocab_size, a.d_model), ("vocab", "vocab_embed"), a.init_std, name="embed")()
        with jax.named_scope("embed"):
            x = look_up(table, tokens, c.rules)
            if a.embed_scale != 1:
                x = x * jnp.asarray(a.embed_scale, x.dtype)
            if a.learned_positions:
                shape, axes = (a.max_position, a.d_model), ("positions", "vocab_embed")
                table = Table(shape, axes, a.init_std, name="positions")()
                x = x + take(table, jnp.minimum(positions, a.max_position - 1))  # of rows that are done, any will do
            x = constrain(x.astype(c.dtype), c.rules, "batch", "stream", "width")
        angles = angles_of(a, positions, c.dtype, mask.q_segments if isinstance(mask, Mask) else None)
        if c.apart:
            (x, cache), made = self.one_by_one((x, cache), mask, angles)
        else:
            parts, schedule = [], self.schedule(x) if cache is None and isinstance(mask, Mask) else None
            for name, some in a.groups.items():
                if schedule is not None and name == PIPELINED:
                    weights, routed = self.get_variable("params", name), self.is_mutable_collection("router")
                    x, seen = pipeline(a, c, schedule, weights, x, mask, routed)  # type: ignore[arg-type]
                    if routed:
                        self.put_variable("router", name, {"mlp": {"seen": (seen,)}})
                    continue
                stack = layers(a.of_group(name), c, self.collect, cache is None, name, len(some))
                (x, cache), part = stack((x, cache), layers_of(a, some), mask, angles)
                parts.append(part)
            join = lambda *x: x[0] if len(x) == 1 else jnp.concatenate(x)  # noqa: E731
            made = jax.tree.map(join, *parts) if schedule is None else None
        hidden = Norm((a.d_model,), a.norm_eps, a.norm, a.norm_offset, a.norm_bias, name="norm")(x)
        hidden = constrain(hidden, c.rules, "batch", "seq", "width")
        if self.is_initializing():  # read by model/head.py, not here
            self.declare_head(hidden)
        return hidden, made if self.collect else cache

    def schedule(self, x: Any) -> Schedule | None:
        """How the layers are pipelined, if they are: not where each has more to tell than its output."""
        if self.is_initializing() or self.collect or self.is_mutable_collection("intermediates"):
            return None
        return planned(self.arch, self.compute, x.shape[0])

    def declare_head(self, hidden: Any) -> None:
        """The weights behind the last norm, if any are its own: a score head, or an untied language-model head."""
        a = self.arch
        if a.num_labels:
            shape, axes = (a.d_model, a.num_labels), ("embed", "labels")
            Linear("BTD,DC->BTC", shape, axes, 1, a.token_labels, a.init_std, name="score")(hidden)
        elif not a.tie_embeddings:
            Table((a.d_model, a.vocab_size), ("vocab_embed", "vocab"), a.init_std, name="head")()

    def one_by_one(self, carry: Any, mask: Mask | Sight, angles: Any) -> Any:
        """The scan over layers, for weights apart."""
        made: list[Any] = []
        for name, members in self.arch.groups.items():
            block = Block(self.arch.of_group(name), self.compute, self.collect, parent=None)
            for index, weights in zip(members, self.get_variable("params", name), strict=True):
                layer = replace(jax.tree.map(lambda x: x[index], layers_of(self.arch)), index=index)  # noqa: B023
                carry, keys_values = block.apply({"params": weights}, carry, layer, mask, angles)
                made.append(keys_values)
        return carry, tuple(zip(*made, strict=True)) if self.collect else None


@dataclass(frozen=True)
class Declared:
    """A weight as the model declares it."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    born: Birth | None = None


def _init_boxed(arch: Architecture, key: Any) -> Any:
    from model.encoder import init_encoder  # built of this file's blocks

    zero = jnp.zeros((1, 1), jnp.int32)
    if not arch.causal:
        return init_encoder(arch, key)
    return Transformer(arch, Compute()).init(key, zero, zero, self_attention(zero, zero + 1), None)["params"]


@memoise
def declare(arch: Architecture) -> dict[str, Declared]:
    """{path: shape, axes and beginning} of every weight; shardings, conversion, counts and plans derive from it."""
    boxed = jax.eval_shape(partial(_init_boxed, arch), jax.random.key(0))
    is_box = lambda x: isinstance(x, nn.Partitioned)  # noqa: E731
    flat = flatten(jax.tree.map(lambda box: Declared(box.value.shape, box.names, box.born), boxed, is_leaf=is_box))
    return flat


def init(arch: Architecture, key: Any, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Random weights; jit it with out_shardings to have them born sharded."""
    return jax.tree.map(lambda x: x.astype(dtype), nn.meta.unbox(_init_boxed(arch, key)))


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """{'a/b': x} -> {'a': {'b': x}}: a parameter tree from paths."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree


def forward(
    arch: Architecture,
    compute: Compute,
    params: Any,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    branches: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """Final hidden states of whole rows (packed or not); branches as in Mask."""
    tokens, positions, segments, branches = zigzag(compute, tokens, positions, segments, branches)
    mask = self_attention(positions, segments, branches=branches)
    out = Transformer(arch, compute).apply({"params": params}, tokens, positions, mask, None)
    return straight(compute, out[0])  # type: ignore[index]


def forward_routed(
    arch: Architecture,
    compute: Compute,
    params: Any,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
) -> tuple[Float[Array, "B T D"], Seen]:
    """The same of a mixture of experts, and what its routers did, by layer."""
    tokens, positions, segments = zigzag(compute, tokens, positions, segments)
    model, mask = Transformer(arch, compute), self_attention(positions, segments)
    made: Any = model.apply({"params": params}, tokens, positions, mask, None, mutable=["router"])
    out, told = made
    (found,) = told["router"]["layers"]["mlp"]["seen"]
    return straight(compute, out[0]), found


def activations(
    arch: Architecture,
    compute: Compute,
    params: Any,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    branches: Int[Array, "B T"] | None = None,
) -> dict[str, Float[Array, "L"]]:
    """{<what>_rms and <what>_max, the largest absolute value: by layer} over positions that are not padding, of the
    residual stream behind a layer and of what attention and MLP add to it."""
    mask = self_attention(positions, segments, branches=branches)
    model, wanted = Transformer(arch, compute), ["intermediates"]
    made: Any = model.apply({"params": params}, tokens, positions, mask, None, mutable=wanted)[1]
    real, found = (segments > 0)[None], {}
    groups = [made["intermediates"][name] for name in arch.groups]
    for name, [(squares, largest)] in jax.tree.map(lambda *x: jnp.concatenate(x), *groups).items():
        name = name.removesuffix("_out")  # a submodule has the bare name
        found[f"{name}_rms"] = jnp.sqrt(jnp.where(real, squares, 0).sum((1, 2)) / jnp.maximum(real.sum(), 1))
        found[f"{name}_max"] = jnp.where(real, largest, 0).max((1, 2))
    return found


def read(
    arch: Architecture, compute: Compute, params: Any, tokens: Int[Array, "B T"], segments: Int[Array, "B T"]
) -> tuple[Float[Array, "B T D"], Buffer, Buffer]:
    """Final hidden states of whole rows (padding, segment 0, on the right only), and their keys and values
    [L, B, K, T, H] (or apart) for a cache."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    mask = self_attention(positions, segments)
    model = Transformer(arch, compute, collect=True)
    hidden, (k, v) = model.apply({"params": params}, tokens, positions, mask, None)  # type: ignore[misc]
    return hidden, k, v


def extend(
    arch: Architecture,
    compute: Compute,
    params: Any,
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    cache: Cache,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Hidden states of new tokens (padding, segment 0, on the right only) after the cache's, and it with them."""
    steps = jnp.arange(tokens.shape[1])[None]
    if arch.rope.by_length or arch.learned_positions:  # padding makes no sequence longer, and has no row in a table
        steps = jnp.minimum(steps, jnp.maximum((segments > 0).sum(1, keepdims=True) - 1, 0))
    positions = cache.positions[:, None] + steps
    model = Transformer(arch, compute)
    sight = look(cache, tokens.shape[1])
    hidden, cache = model.apply({"params": params}, tokens, positions, sight, cache)  # type: ignore[misc]
    return hidden, kv.advance(cache, segments)
