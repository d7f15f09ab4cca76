"""The decoder-only transformer: a scan over blocks. Declares every weight; all maths is in free functions.

B batch, T query time, S key time, D model, N query heads, K kv heads, H head dim, F ffn, V vocab, L layers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache as memoise
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name as keep
from jaxtyping import Array, Float, Int

from model import cache as kv
from model.architecture import Architecture
from model.attention import attend
from model.cache import Buffer, Cache
from model.cached_attention import Sight, attend_cached, look
from model.layers import Birth, Linear, Norm, Table, weight
from model.mask import Mask, self_attention
from model.mla import LatentAttention
from model.moe import Moe, Seen
from model.pattern import Layer, angles_of, at_layer, layers_of
from model.rope import rotate
from model.tree import flatten
from model.weights import take
from sharding.place import constrain
from sharding.rules import DEFAULT, Rules

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": partial(nn.gelu, approximate=True),
}
# What the backward pass keeps of the forward pass.
REMAT: dict[str, Any] = {
    "none": None,  # everything
    "full": jax.checkpoint_policies.nothing_saveable,  # a block's input only
    # every matrix product that backward reads, by name: not the copies and intermediates a product also leaves behind
    "dots": jax.checkpoint_policies.save_only_these_names("qkv", "attention", "middle", "gate_up", "branch"),
}


@dataclass(frozen=True)
class Compute:
    """How a model is computed, as opposed to what it is: dtype, attention backend, remat policy, scan unroll, rules.

    apart: the layers' weights and caches are arrays of their own (model/layout.py), and so are the steps through them.
    """

    dtype: Any = jnp.float32
    attention: str = "auto"
    remat: str = "none"
    unroll: int = 1
    rules: Rules = DEFAULT
    apart: bool = False
    experts: str = "auto"  # model/moe.py BACKENDS


class Attention(nn.Module):
    """Grouped-query attention, with RoPE or not: over the rows themselves (a Mask), or over a cache (a Sight)."""

    arch: Architecture
    compute: Compute

    @nn.compact
    def __call__(self, x: Any, mask: Mask | Sight, angles: Any, cache: Cache | None, layer: Any) -> Any:
        a, rules = self.arch, self.compute.rules

        def project(name: str, heads: int, axis: str) -> Any:
            shape, axes = (a.d_model, heads, a.head_dim), ("embed", axis, "head_dim")
            y = Linear("BTD,DNH->BTNH", shape, axes, 2, a.attention_bias, a.init_std, name=name)(x)
            return constrain(y, rules, "batch", "seq", axis, "head_dim")

        q = project("q", a.num_heads, "heads")
        k, v = project("k", a.num_kv_heads, "kv_heads"), project("v", a.num_kv_heads, "kv_heads")
        if a.qk_norm:
            q, k = self.normed(q, "q_norm", "heads"), self.normed(k, "k_norm", "kv_heads")
        scale = a.attention_multiplier or (a.query_pre_attn_scalar or a.head_dim) ** -0.5
        if scale != a.head_dim**-0.5:  # which attend has
            q = q * jnp.asarray(scale * a.head_dim**0.5, q.dtype)
        if angles is not None:
            q, k = (rotate(x, *angles, interleaved=a.rope.interleaved) for x in (q, k))
        q, k, v = keep(q, "qkv"), keep(k, "qkv"), keep(v, "qkv")
        sinks = weight(self, "sinks", (a.num_heads,), ("heads",), Birth()) if a.sinks else None
        if isinstance(mask, Sight):
            assert cache is not None
            cache = replace(cache, k=kv.write(cache.k, layer, k, mask.at), v=kv.write(cache.v, layer, v, mask.at))
            own = kv.layer_of(cache.k, layer), kv.layer_of(cache.v, layer)
            prompt = kv.layer_of(cache.prompt_k, layer), kv.layer_of(cache.prompt_v, layer)
            out = attend_cached(q, own, None if cache.prompt_k is None else prompt, mask, a.attention_softcap, sinks)
        else:
            out = attend(q, k, v, mask, self.compute.attention, a.attention_softcap, sinks)
        shape, axes = (a.num_heads, a.head_dim, a.d_model), ("heads", "head_dim", "embed")
        return Linear("BTNH,NHD->BTD", shape, axes, 1, a.output_bias, a.init_std, name="o")(out), cache, (k, v)

    def normed(self, x: Any, name: str, heads: str) -> Any:
        """Queries or keys normed: each head, by one scale or by its own, or all heads together."""
        a = self.arch
        if a.qk_norm_over == "head":
            return Norm((a.head_dim,), a.norm_eps, a.norm, a.norm_offset, name=name)(x)
        over, axes = 1 + (a.qk_norm_over == "width"), (heads, "head_dim")
        return Norm(x.shape[-2:], a.norm_eps, a.norm, a.norm_offset, False, over, axes, name=name)(x)


class Mlp(nn.Module):
    """down(activation(gate(x)) * up(x)), or down(activation(up(x)))."""

    arch: Architecture
    compute: Compute

    @nn.compact
    def __call__(self, x: Any) -> Any:
        a = self.arch
        act, wide, narrow = ACTIVATIONS[a.activation], (a.d_model, a.d_ff), (a.d_ff, a.d_model)

        def widened(name: str) -> Any:
            y = Linear("BTD,DF->BTF", wide, ("embed", "mlp"), 1, a.mlp_bias, a.init_std, name=name)(x)
            return keep(y, "gate_up")

        hidden = act(widened("gate")) * widened("up") if a.gated else act(widened("up"))
        hidden = constrain(hidden, self.compute.rules, "batch", "seq", "mlp")
        return Linear("BTF,FD->BTD", narrow, ("mlp", "embed"), 1, a.mlp_bias, a.init_std, name="down")(hidden)


class Block(nn.Module):
    """One layer, scanned: the residual stream and the cache are the carry. Norms stand before attention and MLP, behind
    them, or both; the MLP reads what attention has left, or both read the same.

    collect: tell its keys and values.
    """

    arch: Architecture
    compute: Compute
    collect: bool = False

    @nn.compact
    def __call__(self, carry: Any, layer: Layer, mask: Mask | Sight, angles: Any) -> Any:
        x, cache = carry
        a, rules = self.arch, self.compute.rules
        if isinstance(mask, Sight) and layer.window is not None:
            mask = look(cache, x.shape[1], layer.window)
        mask, angles = at_layer(layer, mask, angles)

        def norm(x: Any, name: str) -> Any:
            return Norm((a.d_model,), a.norm_eps, a.norm, a.norm_offset, a.norm_bias, name=name)(x)

        def before(x: Any, name: str) -> Any:
            return norm(x, name) if a.pre_norms else x

        def behind(update: Any, name: str) -> Any:
            update = norm(keep(update, "branch"), name) if a.post_norms else update
            return update if a.residual_scale == 1 else update * jnp.asarray(a.residual_scale, update.dtype)

        def watch(name: str, x: Any) -> Any:
            if self.is_mutable_collection("intermediates"):  # else nothing is traced, either
                wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
                self.sow("intermediates", f"{name}_out", ((wide * wide).mean(-1), jnp.abs(wide).max(-1)))
            return x

        with jax.named_scope("attention"):
            normed = before(x, "attn_norm")
            attention = Attention if a.latent is None else LatentAttention
            update, cache, made = attention(a, self.compute, name="attn")(normed, mask, angles, cache, layer.index)
            update = watch("attention", behind(update, "attn_post_norm"))
            middle = keep(constrain(x + update, rules, "batch", "seq", "width"), "middle")
            middle = norm(middle, "attn_norm") if a.block == "post" else middle
        with jax.named_scope("mlp"):
            if a.block != "parallel_shared":
                normed = before(x if a.block == "parallel" else middle, "mlp_norm")
            if a.experts is None:
                update = Mlp(a, self.compute, name="mlp")(normed)
            else:
                real = mask.q_segments > 0 if isinstance(mask, Mask) else None
                update = Moe(a, self.compute, Mlp, ACTIVATIONS[a.activation], name="mlp")(normed, real)
            update = watch("mlp", behind(update, "mlp_post_norm"))
            x = constrain(middle + update, rules, "batch", "seq", "width")
            x = watch("residual", norm(x, "mlp_norm") if a.block == "post" else x)
        return (x, cache), tuple(part.swapaxes(1, 2) for part in made) if self.collect else None


def layers(
    arch: Architecture, compute: Compute, collect: bool, remat: bool, name: str = "layers", count: int | None = None
) -> Any:
    """The scan over blocks (all, or those of a group), a submodule of the module that calls this; remat: as Compute
    says, or not at all."""
    block: Any = Block
    if remat and compute.remat != "none":
        block = nn.remat(Block, policy=REMAT[compute.remat], prevent_cse=False)
    scanned = nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0, "router": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast, nn.broadcast),  # type: ignore[arg-type]
        length=arch.num_layers if count is None else count,
        unroll=compute.unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(arch, compute, collect, name=name)


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
        table = Table((a.vocab_size, a.d_model), ("vocab", "embed"), a.init_std, name="embed")()
        with jax.named_scope("embed"):  # rows are whole before the lookup: a gather from split ones would replicate it
            rows = jax.tree.map(lambda t: constrain(t, c.rules, "vocab", "width"), table)
            x = take(rows, tokens)
            if a.embed_scale != 1:
                x = x * jnp.asarray(a.embed_scale, x.dtype)
            if a.learned_positions:
                shape, axes = (a.max_position, a.d_model), ("positions", "embed")
                table = Table(shape, axes, a.init_std, name="positions")()
                x = x + take(table, jnp.minimum(positions, a.max_position - 1))  # of rows that are done, any will do
            x = constrain(x.astype(c.dtype), c.rules, "batch", "seq", "width")
        angles = angles_of(a, positions, c.dtype, mask.q_segments if isinstance(mask, Mask) else None)
        if c.apart:
            (x, cache), made = self.one_by_one((x, cache), mask, angles)
        else:
            parts = []
            for name, some in a.groups.items():
                stack = layers(a.of_group(name), c, self.collect, cache is None, name, len(some))
                (x, cache), part = stack((x, cache), layers_of(a, some), mask, angles)
                parts.append(part)
            made = parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
        hidden = Norm((a.d_model,), a.norm_eps, a.norm, a.norm_offset, a.norm_bias, name="norm")(x)
        if self.is_initializing():  # read by model/head.py, not here
            self.declare_head(hidden)
        return hidden, made if self.collect else cache

    def declare_head(self, hidden: Any) -> None:
        """The weights behind the last norm, if any are its own: a score head, or an untied language-model head."""
        a = self.arch
        if a.num_labels:
            shape, axes = (a.d_model, a.num_labels), ("embed", "labels")
            Linear("BTD,DC->BTC", shape, axes, 1, a.token_labels, a.init_std, name="score")(hidden)
        elif not a.tie_embeddings:
            Table((a.d_model, a.vocab_size), ("embed", "vocab"), a.init_std, name="head")()

    def one_by_one(self, carry: Any, mask: Mask | Sight, angles: Any) -> Any:
        """The scan over layers, for weights apart."""
        made: list[Any] = []
        for name, layers in self.arch.groups.items():
            block = Block(self.arch.of_group(name), self.compute, self.collect, parent=None)
            for index, weights in zip(layers, self.get_variable("params", name), strict=True):
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
    mask = self_attention(positions, segments, branches=branches)
    return Transformer(arch, compute).apply({"params": params}, tokens, positions, mask, None)[0]  # type: ignore[index]


def forward_routed(
    arch: Architecture,
    compute: Compute,
    params: Any,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
) -> tuple[Float[Array, "B T D"], Seen]:
    """The same of a mixture of experts, and what its routers did, by layer."""
    model, mask = Transformer(arch, compute), self_attention(positions, segments)
    made: Any = model.apply({"params": params}, tokens, positions, mask, None, mutable=["router"])
    out, told = made
    (found,) = told["router"]["layers"]["mlp"]["seen"]
    return out[0], found


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
