"""A weight product whose gradient is laid out as the weight is, and where XLA must not fuse."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sharding.platform import platform


def once(x: Any) -> Any:
    """x, on a CPU made here and only here.

    XLA's CPU backend makes an operand again inside every reader, element by element where the reader transposes or
    sums it; other backends fuse for the better.
    """
    return jax.lax.optimization_barrier(x) if platform() == "cpu" else x


_narrow: ContextVar[bool] = ContextVar("narrow", default=False)


@contextmanager
def narrow_gradients(narrow: bool = True) -> Iterator[None]:
    """Weight gradients traced within are made, and so added up over devices, in the dtype of the activations."""
    token = _narrow.set(narrow)
    try:
        yield
    finally:
        _narrow.reset(token)


def product(spec: str, x: Float[Array, "..."], w: Float[Array, "..."]) -> Float[Array, "..."]:
    """einsum(spec, x, w) in x's dtype, '<x>,<w>-><out>'; the gradient of a wider w is as wide (narrow_gradients).

    The gradient of w is the product x g, in w's own layout. jax transposes the product g x instead; XLA on a CPU then
    writes every g once more, transposed, element by element: a quarter of a training step (SmolLM2, 2 cores).
    """
    return _product(spec, x, w)


def dot(spec: str, x: Float[Array, "..."], y: Float[Array, "..."], dtype: Any = None) -> Float[Array, "..."]:
    """einsum(spec, x, y) in a dtype (theirs), summed over axes in the order in which x has them.

    jnp.einsum sums over H, N for "BTNH,NHD->BTD", by name: XLA then writes both operands anew, transposed.
    """
    (a, b), out = spec.split("->")[0].split(","), spec.split("->")[1]
    summed = [letter for letter in a if letter not in out]
    axes = tuple(a.index(letter) for letter in summed), tuple(b.index(letter) for letter in summed)
    made = "".join(letter for letter in a + b if letter not in summed)
    result = jax.lax.dot_general(x, y, (axes, ((), ())), preferred_element_type=dtype or jnp.result_type(x, y))
    return jnp.transpose(result, [made.index(letter) for letter in out])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(spec: str, x: Any, w: Any) -> Any:
    return dot(spec, x, w.astype(x.dtype))


def _forward(spec: str, x: Any, w: Any) -> Any:
    # what the other side's gradient needs: nothing of x for a frozen w; w as used here, gathered once for both
    used = w.value.astype(x.value.dtype)
    kept = (x.value if w.perturbed else None, used if x.perturbed else None, jnp.zeros((), w.value.dtype))
    return dot(spec, x.value, used), kept


def _backward(spec: str, kept: Any, g: Any) -> Any:
    if isinstance(g, jax.custom_derivatives.SymbolicZero):
        return None, None
    (a, b), out = spec.split("->")[0].split(","), spec.split("->")[1]
    x, w, like = kept
    x, g = once((x, g))
    dx = None if w is None else dot(f"{out},{b}->{a}", g, w)
    if x is None:
        return dx, None
    wide = jnp.result_type(x, g) if _narrow.get() else jnp.result_type(x, g, like)
    return dx, dot(f"{a},{out}->{b}", x, g, wide).astype(like.dtype)


_product.defvjp(_forward, _backward, symbolic_zeros=True)
