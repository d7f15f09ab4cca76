"""Weight nodes: a parameter is an array or a small registered node; only this file looks inside one."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.product import product

Weight = Any  # Array | Lora | ...: a leaf of the parameter tree, as the layers see it


@partial(jax.tree_util.register_dataclass, data_fields=("base", "a", "b"), meta_fields=("scale",))
@dataclass(frozen=True)
class Lora:
    """base + scale * a b (arXiv 2106.09685); a [.., in.., R], b [.., R, out..]; fields are None in split trees."""

    base: Weight
    a: Any
    b: Any
    scale: float

    @property
    def ndim(self) -> int:
        return self.base.ndim


def contract(spec: str, x: Float[Array, "..."], w: Weight) -> Float[Array, "..."]:
    """einsum(spec, x, w) in x's dtype, through any node; `spec` is '<x>,<w>-><out>' in single letters."""
    if isinstance(w, Lora):
        down, up = _lora_specs(spec)
        low = product(down, x, w.a)
        return contract(spec, x, w.base) + product(up, w.scale * low, w.b)
    return product(spec, x, w)


def ragged(x: Float[Array, "M D"], w: Weight, sizes: Int[Array, "E"]) -> Float[Array, "M F"]:
    """Rows of x, sorted by expert, times their expert's matrix of w [E, D, F], in x's dtype; sizes: rows of each."""
    return jax.lax.ragged_dot(x, materialise(w).astype(x.dtype), sizes)


def take(w: Weight, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Rows of an embedding table [V, D]."""
    return jnp.take(materialise(w) if isinstance(w, Lora) else w, ids, axis=0)


def materialise(w: Weight) -> Float[Array, "..."]:
    """The dense array that a node stands for, in its base's dtype."""
    if isinstance(w, Lora):
        base = materialise(w.base)
        delta = jnp.einsum(_delta_spec(w), w.a, w.b, precision=jax.lax.Precision.HIGHEST)
        return base + (w.scale * delta).astype(base.dtype)
    return w


def _lora_specs(spec: str) -> tuple[str, str]:
    """'BTD,DNH->BTNH' -> 'BTD,Dr->BTr' and 'BTr,rNH->BTNH'."""
    (x, w), out = spec.split("->")[0].split(","), spec.split("->")[1]
    summed, kept = "".join(c for c in w if c not in out), "".join(c for c in w if c in out)
    low = "".join(c for c in x if c not in summed) + "r"
    return f"{x},{summed}r->{low}", f"{low},r{kept}->{out}"


def _delta_spec(w: Lora) -> str:
    """The einsum of a and b; leading axes (stacked layers) are those that both share with the base."""
    lead = w.a.ndim + w.b.ndim - 2 - w.base.ndim
    n_in, n_out = w.a.ndim - 1 - lead, w.b.ndim - 1 - lead
    letters = iter("abcdefghijklm")
    stack, inner, outer = ("".join(next(letters) for _ in range(n)) for n in (lead, n_in, n_out))
    return f"{stack}{inner}r,{stack}r{outer}->{stack}{inner}{outer}"
