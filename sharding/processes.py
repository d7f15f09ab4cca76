"""Several processes, one program: jax.distributed from the environment."""

import os

import jax


def connect() -> None:
    """Join the other processes where the environment names a coordinator. Call before any device is used.

    JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES, JAX_PROCESS_ID; Cloud TPU and SLURM tell what is absent.
    """
    if jax.distributed.is_initialized() or "JAX_COORDINATOR_ADDRESS" not in os.environ:
        return
    number = lambda name: int(os.environ[name]) if name in os.environ else None  # noqa: E731
    jax.distributed.initialize(
        os.environ["JAX_COORDINATOR_ADDRESS"], number("JAX_NUM_PROCESSES"), number("JAX_PROCESS_ID")
    )
