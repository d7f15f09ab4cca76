"""A bidirectional encoder in the transformer's blocks: BERT (arXiv 1810.04805), with the head that it has."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.architecture import Architecture
from model.block import ACTIVATIONS, layers
from model.compute import Compute
from model.layers import Birth, Linear, Norm, Table, weight
from model.mask import Mask
from model.pattern import layers_of
from model.weights import contract, take
from sharding.place import constrain


class Encoder(nn.Module):
    """Tokens to what the head says, in float32 at least: [B, T, V] of a masked-LM head, [B, C] of a classifier.

    Three tables are added and normed, then come the layers, with no norm behind them. The classifier reads the first
    position.
    """

    arch: Architecture
    compute: Compute

    @nn.compact
    def __call__(self, tokens: Any, types: Any, positions: Any, mask: Mask) -> Any:
        a, c = self.arch, self.compute

        def table(name: str, size: int, axis: str) -> Any:
            return Table((size, a.d_model), (axis, "embed"), a.init_std, name=name)()

        def normed(x: Any, name: str) -> Any:
            return Norm((a.d_model,), a.norm_eps, a.norm, bias=a.norm_bias, name=name)(x)

        def linear(x: Any, name: str, size: int, axis: str) -> Any:
            shape, axes = (a.d_model, size), ("embed", axis)
            return Linear("BTD,DE->BTE", shape, axes, 1, True, a.init_std, name=name)(x)

        words = jax.tree.map(lambda t: constrain(t, c.rules, "vocab", "width"), table("embed", a.vocab_size, "vocab"))
        x = take(words, tokens) + take(table("types", a.token_types, "positions"), types)
        x = (x + take(table("positions", a.max_position, "positions"), positions)).astype(c.dtype)
        x = constrain(normed(x, "embed_norm"), c.rules, "batch", "seq", "width")
        (x, _), _ = layers(a, c, False, True)((x, None), layers_of(a), mask, None)
        wide = jnp.promote_types(c.dtype, jnp.float32)
        if a.num_labels:
            pooled = jnp.tanh(linear(x[:, :1], "pooler", a.d_model, "width"))
            return linear(pooled, "score", a.num_labels, "labels")[:, 0].astype(wide)
        x = normed(ACTIVATIONS[a.activation](linear(x, "predict", a.d_model, "width")), "predict_norm")
        bias = Bias(a.vocab_size, "vocab", name="predict_tokens")()
        return contract("BTD,VD->BTV", x, words).astype(wide) + bias.astype(wide)[None, None]


class Bias(nn.Module):
    """The bias of a projection whose weight is another's."""

    size: int
    axis: str

    @nn.compact
    def __call__(self) -> Any:
        return weight(self, "bias", (self.size,), (self.axis,), Birth())


def encode(
    arch: Architecture,
    compute: Compute,
    params: Any,
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    types: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
) -> Float[Array, "..."]:
    """What an encoder's head says of rows: logits [B, T, V] of masked tokens, or [B, C] of its labels.

    segments: 0 for padding; types: of each token (0); positions: the place in the row.
    """
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    types = jnp.zeros_like(tokens) if types is None else types
    mask = Mask(positions, positions, segments, segments, causal=False)
    out: Any = Encoder(arch, compute).apply({"params": params}, tokens, types, positions, mask)
    return out


def init_encoder(arch: Architecture, key: Any) -> Any:
    """Random weights, boxed with their logical axes."""
    zero = jnp.zeros((1, 1), jnp.int32)
    mask = Mask(zero, zero, zero + 1, zero + 1, causal=False)
    return Encoder(arch, Compute()).init(key, zero, zero, zero, mask)["params"]
