"""The layers of a transformer: attention, MLP, the block of both, and the scan over blocks."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name as keep
from jaxtyping import Array

from model import cache as kv
from model.architecture import Architecture
from model.cache import Cache
from model.cached_attention import Sight, attend_cached, look
from model.compute import REMAT, Compute
from model.context import attend_over
from model.layers import Birth, Linear, Norm, weight
from model.mask import Mask
from model.mla import LatentAttention
from model.moe import Moe
from model.pattern import Layer, at_layer
from model.rope import rotate
from sharding.place import constrain

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": partial(nn.gelu, approximate=True),
}


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
            out = attend_over(q, k, v, mask, self.compute, a.attention_softcap, sinks)
        out = constrain(out, rules, "batch", "seq", "heads", "head_dim")  # and so is its gradient
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
        x, cache = keep(carry[0], "block"), carry[1]
        a, rules = self.arch, self.compute.rules
        if isinstance(mask, Sight) and layer.window is not None:
            mask = look(cache, x.shape[1], layer.window)
        mask, angles = at_layer(layer, mask, angles)

        def norm(x: Any, name: str) -> Any:
            return Norm((a.d_model,), a.norm_eps, a.norm, a.norm_offset, a.norm_bias, name=name)(x)

        def before(x: Any, name: str) -> Any:
            return norm(x, name) if a.pre_norms else x

        def whole(x: Any) -> Any:  # gathered over the tensor axis once, for all products that read it
            return constrain(x, rules, "batch", "seq", "width")

        def behind(update: Any, name: str) -> Any:
            update = norm(keep(update, "branch"), name) if a.post_norms else update
            return update if a.residual_scale == 1 else update * jnp.asarray(a.residual_scale, update.dtype)

        def watch(name: str, x: Any) -> Any:
            if self.is_mutable_collection("intermediates"):  # else nothing is traced, either
                wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
                self.sow("intermediates", f"{name}_out", ((wide * wide).mean(-1), jnp.abs(wide).max(-1)))
            return x

        with jax.named_scope("attention"):
            normed = whole(before(x, "attn_norm"))
            attention = Attention if a.latent is None else LatentAttention
            update, cache, made = attention(a, self.compute, name="attn")(normed, mask, angles, cache, layer.index)
            update = watch("attention", behind(update, "attn_post_norm"))
            middle = keep(constrain(x + update, rules, "batch", "stream", "width"), "middle")
            middle = norm(middle, "attn_norm") if a.block == "post" else middle
        with jax.named_scope("mlp"):
            if a.block != "parallel_shared":
                normed = before(x if a.block == "parallel" else middle, "mlp_norm")
            if a.experts is None:
                update = Mlp(a, self.compute, name="mlp")(whole(normed))
            else:
                real = mask.q_segments > 0 if isinstance(mask, Mask) else None
                update = Moe(a, self.compute, Mlp, ACTIVATIONS[a.activation], name="mlp")(normed, real)
            update = watch("mlp", behind(update, "mlp_post_norm"))
            x = constrain(middle + update, rules, "batch", "stream", "width")
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
        metadata_params={nn.PARTITION_NAME: name},
    )
    return scanned(arch, compute, collect, name=name)
