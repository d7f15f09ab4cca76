"""The Linen modules that declare weights: each names its shape, logical axes and initializer once."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from model.weights import Weight, contract


@dataclass(frozen=True)
class Birth:
    """How a weight begins: normal around 0, or where std is 0 all `mean`."""

    std: float = 0.0
    mean: float = 0.0

    def __call__(self, key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        """Such a weight."""
        of = nn.initializers.normal(self.std) if self.std else nn.initializers.constant(self.mean)
        return of(key, shape, dtype)


@struct.dataclass
class Named(nn.Partitioned):
    """A fresh weight with its logical axes; unboxing only takes the value out (Flax's own would constrain it)."""

    born: Birth = struct.field(default=Birth(), pytree_node=False)

    def unbox(self, apply_constraint: bool = True) -> Any:
        return self.value


def weight(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], born: Birth) -> Weight:
    """Declare a weight at init; afterwards read whatever lies there.

    The one place that reads weights: self.param compares shapes and would refuse a node (Lora, ...) there.
    """
    if module.is_initializing():
        return module.param(name, lambda key: Named(born(key, shape, jnp.float32), axes, born=born))
    return module.get_variable("params", name)


class Linear(nn.Module):
    """contract(spec, x, weight) + bias; the last `out` dimensions of the weight are the output's."""

    spec: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    out: int = 1
    bias: bool = False
    std: float = 0.02

    @nn.compact
    def __call__(self, x: Any) -> Any:
        y = contract(self.spec, x, weight(self, "weight", self.shape, self.axes, Birth(self.std)))
        if self.bias:
            bias = weight(self, "bias", self.shape[-self.out :], self.axes[-self.out :], Birth())
            y = y + _aligned(bias, y)
        return y


class Table(nn.Module):
    """A weight that a free function uses: the embedding, the head."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    std: float

    @nn.compact
    def __call__(self) -> Any:
        return weight(self, "weight", self.shape, self.axes, Birth(self.std))


class Norm(nn.Module):
    """A norm over the last `over` axes, times offset + scale, plus a bias if it has one; born as the bare norm.

    kind: rms (arXiv 1910.07467) or layer (arXiv 1607.06450).
    """

    shape: tuple[int, ...]
    eps: float
    kind: str = "rms"
    offset: float = 0.0
    bias: bool = False
    over: int = 1
    axes: tuple[str, ...] = ("norm",)

    @nn.compact
    def __call__(self, x: Any) -> Any:
        scale = weight(self, "scale", self.shape, self.axes, Birth(mean=1 - self.offset))
        of = rms_norm if self.kind == "rms" else layer_norm
        y = of(x, scale, self.eps, self.offset, self.over)
        return y + _aligned(weight(self, "bias", self.shape, self.axes, Birth()), y) if self.bias else y


def rms_norm(
    x: Float[Array, "..."], scale: Float[Array, "..."], eps: float, offset: float = 0.0, over: int = 1
) -> Float[Array, "..."]:
    """RMSNorm over the last `over` axes in float32 at least, back in x's dtype: before the scale, or with an offset
    after it (as Gemma does)."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=tuple(range(-over, 0)), keepdims=True) + eps)
    if offset:
        return (normed * _aligned(offset + scale.astype(wide.dtype), wide)).astype(x.dtype)
    return normed.astype(x.dtype) * _aligned(scale, x)


def layer_norm(
    x: Float[Array, "..."], scale: Float[Array, "..."], eps: float, offset: float = 0.0, over: int = 1
) -> Float[Array, "..."]:
    """LayerNorm over the last `over` axes, scaled, in float32 at least, back in x's dtype."""
    wide, axes = x.astype(jnp.promote_types(x.dtype, jnp.float32)), tuple(range(-over, 0))
    centred = wide - jnp.mean(wide, axis=axes, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=axes, keepdims=True) + eps)
    return (normed * _aligned(offset + scale.astype(wide.dtype), wide)).astype(x.dtype)


def _aligned(v: Array, x: Array) -> Array:
    """v in x's dtype with leading axes of 1, for a product over x's last axes."""
    return v.astype(x.dtype).reshape((1,) * (x.ndim - v.ndim) + v.shape)
