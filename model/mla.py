"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

R latent, P rotated part, X a head's unrotated part of k and its v; else as in model/block.py.
"""

from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name as keep
from jaxtyping import Array

from model import cache as kv
from model.architecture import Architecture
from model.cache import Buffer, Cache, unpack
from model.cached_attention import Sight, attend_cached
from model.compute import Compute
from model.context import attend_over
from model.layers import Linear, Norm, Table
from model.mask import Mask
from model.rope import rotate
from model.weights import contract, materialise
from sharding.place import constrain

EPS = 1e-6  # of the norms of the latents, whatever the model's own


class LatentAttention(nn.Module):
    """Keys and values of all heads are made of one latent a token, and of one rotated key; a cache holds only these."""

    arch: Architecture
    compute: Compute

    @nn.compact
    def __call__(self, x: Any, mask: Mask | Sight, angles: Any, cache: Cache | None, layer: Any) -> Any:
        a, m, rules = self.arch, self.arch.latent, self.compute.rules
        assert m is not None
        q = constrain(self.queries(x), rules, "batch", "seq", "heads", "head_dim")
        if a.attention_multiplier is not None:  # attend divides by sqrt(head_dim)
            q = q * jnp.asarray(a.attention_multiplier * a.head_dim**0.5, q.dtype)
        shape, axes = (a.d_model, m.rank + m.rope_dim), ("embed", "latent")
        down = Linear("BTD,DR->BTR", shape, axes, 1, a.attention_bias, a.init_std, name="kv_a")(x)
        latent = Norm((m.rank,), EPS, name="kv_a_norm")(down[..., : m.rank])
        key = rotate(down[:, :, None, m.rank :], *angles, interleaved=a.rope.interleaved)
        plain = a.head_dim - m.rope_dim
        q_plain, q_rotated = q[..., :plain], rotate(q[..., plain:], *angles, interleaved=a.rope.interleaved)
        shape, axes = (m.rank, a.num_heads, plain + m.value_dim), ("latent", "heads", "head_dim")
        up = Table(shape, axes, a.init_std, name="kv_b")()
        if isinstance(mask, Sight):
            assert cache is not None
            k, v = kv.write(cache.k, layer, latent[:, :, None], mask.at), kv.write(cache.v, layer, key, mask.at)
            cache = replace(cache, k=k, v=v)
            out = self.absorbed(q_plain, q_rotated, up, cache, layer, mask)
        else:
            made = constrain(contract("BTR,RNX->BTNX", latent, up), rules, "batch", "seq", "heads", "head_dim")
            k = jnp.concatenate([made[..., :plain], jnp.broadcast_to(key, q_rotated.shape)], axis=-1)
            q = jnp.concatenate([q_plain, q_rotated], axis=-1)
            out = attend_over(keep(q, "qkv"), keep(k, "qkv"), keep(made[..., plain:], "qkv"), mask, self.compute)
        out = constrain(out, rules, "batch", "seq", "heads", "head_dim")
        shape, axes = (a.num_heads, m.value_dim, a.d_model), ("heads", "head_dim", "embed")
        out = Linear("BTNH,NHD->BTD", shape, axes, 1, a.output_bias, a.init_std, name="o")(out)
        return out, cache, (latent[:, :, None], key)

    def queries(self, x: Any) -> Any:
        """[B, T, N, H], by way of a latent of their own or straight."""
        a, m = self.arch, self.arch.latent
        assert m is not None
        heads, axes = (a.num_heads, a.head_dim), ("heads", "head_dim")
        if m.q_rank is None:
            return Linear("BTD,DNH->BTNH", (a.d_model, *heads), ("embed", *axes), 2, std=a.init_std, name="q")(x)
        shape, bias = (a.d_model, m.q_rank), a.attention_bias
        down = Linear("BTD,DR->BTR", shape, ("embed", "latent"), 1, bias, a.init_std, name="q_a")(x)
        normed = Norm((m.q_rank,), EPS, name="q_a_norm")(down)
        return Linear("BTR,RNH->BTNH", (m.q_rank, *heads), ("latent", *axes), 2, std=a.init_std, name="q_b")(normed)

    def absorbed(self, plain: Any, rotated: Any, up: Any, cache: Cache, layer: Any, sight: Sight) -> Any:
        """Attention over the latents themselves: what makes keys of them is multiplied into q, what makes values of
        them into the output, so that a cached token costs its latent and no key of any head."""
        a, m, w = self.arch, self.arch.latent, materialise(up).astype(plain.dtype)
        assert m is not None
        size = plain.shape[-1]
        asked = jnp.concatenate([jnp.einsum("BTNX,RNX->BTNR", plain, w[..., :size]), rotated], axis=-1)
        asked = asked * jnp.asarray((asked.shape[-1] / a.head_dim) ** 0.5, asked.dtype)

        def part(k: Buffer, v: Buffer) -> tuple[Array, Array]:
            latent, key = (unpack(kv.layer_of(buffer, layer), plain.dtype) for buffer in (k, v))
            return jnp.concatenate([latent, key], axis=-1), latent

        prompt = None if cache.prompt_k is None else part(cache.prompt_k, cache.prompt_v)
        out = attend_cached(asked, part(cache.k, cache.v), prompt, sight)
        return jnp.einsum("BTNR,RNX->BTNX", out, w[..., size:])
