"""Several processes, one program: jax.distributed from the environment."""

import os

import jax


def connect() -> None:
    """Join the other processes when the environment names a coordinator; alone otherwise. Call before any device is used.

    JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES, JAX_PROCESS_ID; Cloud TPU pods and SLURM fill in what is absent.
    """
    if jax.distributed.is_initialized() or "JAX_COORDINATOR_ADDRESS" not in os.environ:
        return
    number = lambda name: int(os.environ[name]) if name in os.environ else None  # noqa: E731
    jax.distributed.initialize(
        os.environ["JAX_COORDINATOR_ADDRESS"], number("JAX_NUM_PROCESSES"), number("JAX_PROCESS_ID")
    )
