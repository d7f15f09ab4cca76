"""A model ready to decode: architecture, weights, how to compute, tokenizer."""

import os
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from configs.errors import UsageError
from data.tokenizer import Tokenizer
from model.architecture import Architecture
from model.layout import out_first
from model.lora import sharding_of
from model.transformer import Compute
from sharding.place import placer

DTYPES = ("auto", "float32", "bfloat16", "float64")


@dataclass(frozen=True)
class Model:
    """What decoding needs; eos_ids end a generation, mesh is where the weights lie (None: one device)."""

    arch: Architecture
    compute: Compute
    params: Any
    tokenizer: Tokenizer
    eos_ids: tuple[int, ...] = ()
    mesh: Mesh | None = None
    _turned: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def weights_for(self, rows: int) -> Any:
        """The weights as so many rows read them fastest: a copy, kept, for one row on a CPU with room for it."""
        size = sum(x.nbytes for x in jax.tree.leaves(self.params))
        if rows > 1 or self.mesh is not None or jax.default_backend() != "cpu" or 4 * size > _free_memory():
            return self.params
        if self._turned.get("of") is not self.params:
            self._turned["weights"] = jax.jit(out_first, static_argnums=0)(self.arch, self.params)
            self._turned["of"] = self.params
        return self._turned["weights"]


def load_model(name: str, *, dtype: str = "auto", attention: str = "auto", mesh: Mesh | None = None) -> Model:
    """Load a MODEL: short name, hub id, Hugging Face folder, GGUF file or run folder.

    dtype: of weights and arithmetic; auto = bfloat16 on GPU and TPU, float32 on CPU. mesh: spread the weights over it.
    """
    from convert.load import load_params, load_tokenizer, resolve

    if dtype not in DTYPES:
        raise UsageError(f"dtype '{dtype}' is unknown; allowed: {', '.join(DTYPES)}")
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise UsageError("dtype float64 needs JAX_ENABLE_X64=1 in the environment")
    source = resolve(name)
    compute = Compute(dtype=jnp.dtype(dtype), attention=attention)
    tokenizer = load_tokenizer(source)
    place = None if mesh is None else placer(sharding_of(source.arch, mesh, compute.rules))
    params = load_params(source, place, jnp.dtype(dtype))
    more = (source.generation_config or source.config).get("eos_token_id")
    more = [] if more is None else [more] if isinstance(more, int) else more
    return Model(source.arch, compute, params, tokenizer, tuple(dict.fromkeys([*tokenizer.eos_ids, *more])), mesh)


def _free_memory() -> int:
    """Bytes that can be had now."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not on this system: as if there were none
        return 0
