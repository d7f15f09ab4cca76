"""A model ready to decode: architecture, weights, how to compute, tokenizer."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from configs.errors import UsageError
from convert.source import Source
from data.tokenizer import Tokenizer
from model.architecture import Architecture
from model.compute import Compute
from model.layout import apart
from model.lora import sharding_of
from sharding.place import placer
from sharding.platform import platform

DTYPES = ("auto", "float32", "bfloat16", "float64")
UNROLL_FROM = 1000  # steps of a call from which on a CPU the layers are compiled one by one, if nobody says


@dataclass(frozen=True)
class Model:
    """What decoding needs; eos_ids end a generation, mesh is where the weights lie (None: one device).

    unroll: on a CPU compile every layer on its own. A step is 1.1 to 1.5 times as fast (SmolLM2, 2 cores), the first
    one seconds later. None: in calls of many steps.
    """

    arch: Architecture
    compute: Compute
    params: Any
    tokenizer: Tokenizer
    eos_ids: tuple[int, ...] = ()
    mesh: Mesh | None = None
    unroll: bool | None = None
    _apart: dict[str, Any] = field(init=False, default_factory=dict, repr=False, compare=False)

    def ready(self, steps: int) -> "Model":
        """The model as it makes so many steps fastest."""
        unroll = steps >= UNROLL_FROM if self.unroll is None else self.unroll
        if not unroll or self.compute.apart or self.mesh is not None or platform() != "cpu":
            return self
        if self._apart.get("of") is not self.params:
            self._apart.update(of=self.params, params=apart(self.params))
        return replace(self, compute=replace(self.compute, apart=True), params=self._apart["params"])


def load_model(
    name: str | Source,
    *,
    dtype: str = "auto",
    attention: str = "auto",
    mesh: Mesh | None = None,
    unroll: bool | None = None,
    rewards: bool = False,
) -> Model:
    """Load a MODEL: short name, hub id, Hugging Face folder, GGUF file, run folder, or what one was resolved to.

    dtype: of weights and arithmetic; auto = bfloat16 on GPU and TPU, float32 on CPU. mesh: spread the weights over it.
    unroll: as Model's. rewards: it may be a reward model.
    """
    from convert.heads import check_language
    from convert.load import load_params, load_tokenizer, resolve

    if dtype not in DTYPES:
        raise UsageError(f"dtype '{dtype}' is unknown; allowed: {', '.join(DTYPES)}")
    if dtype == "auto":
        dtype = "float32" if platform() == "cpu" else "bfloat16"
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise UsageError("dtype float64 needs JAX_ENABLE_X64=1 in the environment")
    source = resolve(name) if isinstance(name, str) else name
    if not (rewards and source.arch.causal):
        check_language(source)
    compute = Compute(dtype=jnp.dtype(dtype), attention=attention)
    tokenizer = load_tokenizer(source)
    place = None if mesh is None else placer(sharding_of(source.arch, mesh, compute.rules))
    params = load_params(source, place, jnp.dtype(dtype))
    return Model(source.arch, compute, params, tokenizer, end_ids(source, tokenizer), mesh, unroll)


def end_ids(source: Source, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end a generation: the tokenizer's, and those that the model's configuration names."""
    more = (source.generation_config or source.config).get("eos_token_id")
    more = [] if more is None else [more] if isinstance(more, int) else more
    return tuple(dict.fromkeys([*tokenizer.eos_ids, *more]))
