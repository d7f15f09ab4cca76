"""A model ready to decode: architecture, weights, how to compute, tokenizer."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from configs.errors import UsageError
from data.tokenizer import Tokenizer
from model.architecture import Architecture
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
