"""A model ready to decode: architecture, weights, how to compute, tokenizer."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from configs.errors import UsageError
from data.tokenizer import Tokenizer
from model.architecture import Architecture
from model.lora import adapter_axes
from model.transformer import Compute, declare

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
    if dtype == "float64" and not jax.config.jax_enable_x64:
        raise UsageError("dtype float64 needs JAX_ENABLE_X64=1 in the environment")
    source = resolve(name)
    compute = Compute(dtype=jnp.dtype(dtype), attention=attention)
    tokenizer = load_tokenizer(source)
    params = load_params(source, _placer(source.arch, compute, mesh), jnp.dtype(dtype))
    more = (source.generation_config or source.config).get("eos_token_id")
    more = [] if more is None else [more] if isinstance(more, int) else more
    return Model(source.arch, compute, params, tokenizer, tuple(dict.fromkeys([*tokenizer.eos_ids, *more])), mesh)


def _placer(arch: Architecture, compute: Compute, mesh: Mesh | None) -> Any:
    """Where each weight goes, and an adapter's a and b beside it; None is the first device."""
    from sharding.place import placer, weight_sharding

    if mesh is None:
        return None
    axes = {path: declared.axes for path, declared in declare(arch).items()}

    def sharding_of(path: str, shape: tuple[int, ...]) -> NamedSharding:
        owner, _, part = path.rpartition("/")
        own = axes[path] if path in axes else dict(zip("ab", adapter_axes(axes[owner]), strict=True))[part]
        return weight_sharding(mesh, compute.rules, own, shape, path)

    return placer(sharding_of)
