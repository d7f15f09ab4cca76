"""How a model is computed, as opposed to what it is."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from sharding.place import HOST
from sharding.rules import DEFAULT, Rules

# What the backward pass keeps of the forward pass.
REMAT: dict[str, Any] = {
    "none": None,  # everything
    "full": jax.checkpoint_policies.nothing_saveable,  # a block's input only
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(  # that, in the host's memory
        names_which_can_be_saved=[], names_which_can_be_offloaded=["block"], offload_src="device", offload_dst=HOST
    ),
    # every matrix product that backward reads, by name: not the copies and intermediates a product also leaves behind
    "dots": jax.checkpoint_policies.save_only_these_names("qkv", "attention", "middle", "gate_up", "branch"),
}


@dataclass(frozen=True)
class Compute:
    """How a model is computed, as opposed to what it is: dtype, attention backend, remat policy, scan unroll, rules.

    apart: the layers' weights and caches are arrays of their own (model/layout.py), and so are the steps through them.
    """

    dtype: Any = jnp.float32
    attention: str = "auto"
    remat: str = "none"
    unroll: int = 1
    rules: Rules = DEFAULT
    apart: bool = False
    pipeline_microbatches: int | None = None  # of a mesh with stages (model/pipeline.py)
    pipeline_repeats: int = 1
    pipeline_gather: str = "tick"
    experts: str = "auto"  # model/moe.py BACKENDS
