"""The Linen modules that declare weights: each names its shape, logical axes and initializer once."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from model.weights import Weight, contract

Initializer = Callable[..., Array]


@struct.dataclass
class Named(nn.Partitioned):
    """A fresh weight with its logical axes; unboxing only takes the value out (Flax's own would constrain it)."""

    def unbox(self, apply_constraint: bool = True) -> Any:
        return self.value


def weight(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], init: Initializer) -> Weight:
    """Declare a weight at init; afterwards read whatever lies there.

    The one place that reads weights: self.param compares shapes and would refuse a node (Lora, ...) there.
    """
    if module.is_initializing():
        return module.param(name, lambda key: Named(init(key, shape, jnp.float32), axes))
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
        y = contract(self.spec, x, weight(self, "weight", self.shape, self.axes, nn.initializers.normal(self.std)))
        if self.bias:
            bias = weight(self, "bias", self.shape[-self.out :], self.axes[-self.out :], nn.initializers.zeros)
            y = y + _aligned(bias, y)
        return y


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + scale) over the last axis (arXiv 1910.07467); born as x / rms(x)."""

    size: int
    eps: float
    offset: float = 0.0
    axis: str = "norm"

    @nn.compact
    def __call__(self, x: Any) -> Any:
        born = nn.initializers.constant(1 - self.offset)
        return rms_norm(x, weight(self, "scale", (self.size,), (self.axis,), born), self.eps, self.offset)


def rms_norm(
    x: Float[Array, "*B D"], scale: Float[Array, "D"], eps: float, offset: float = 0.0
) -> Float[Array, "*B D"]:
    """RMSNorm in float32 at least, back in x's dtype: before the scale, or with an offset after it (as Gemma does)."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    if offset:
        return (normed * _aligned(offset + scale.astype(wide.dtype), wide)).astype(x.dtype)
    return normed.astype(x.dtype) * _aligned(scale, x)


def _aligned(v: Array, x: Array) -> Array:
    """v in x's dtype with leading axes of 1, for a product over x's last axes."""
    return v.astype(x.dtype).reshape((1,) * (x.ndim - v.ndim) + v.shape)
