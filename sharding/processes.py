"""Several processes, one program: jax.distributed from the environment, and what they agree on."""

import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

MOST = 64  # steps that are told to others


def connect(heartbeat_timeout: int = 100, join_timeout: int = 300) -> None:
    """Join the other processes where the environment names a coordinator. Call before any device is used.

    JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES, JAX_PROCESS_ID; Cloud TPU and SLURM tell what is absent.
    """
    if jax.distributed.is_initialized() or "JAX_COORDINATOR_ADDRESS" not in os.environ:
        return
    number = lambda name: int(os.environ[name]) if name in os.environ else None  # noqa: E731
    jax.distributed.initialize(
        os.environ["JAX_COORDINATOR_ADDRESS"],
        number("JAX_NUM_PROCESSES"),
        number("JAX_PROCESS_ID"),
        heartbeat_timeout_seconds=heartbeat_timeout,
        initialization_timeout=join_timeout,
        shutdown_timeout_seconds=heartbeat_timeout,
    )


def same_number(mine: int) -> int:
    """The first process's number (below 2**31), on all."""
    if jax.process_count() == 1:
        return mine
    return int(multihost_utils.broadcast_one_to_all(np.int32(mine)))


def all_agree(mine: bool) -> bool:
    """Whether it is true on every process."""
    if jax.process_count() == 1:
        return mine
    return bool(np.all(multihost_utils.process_allgather(np.int32(mine))))


def agreed_steps(mine: Sequence[int] | None, everywhere: bool = False) -> list[int]:
    """The first process's steps (the newest MOST), or those that every process has."""
    newest = sorted(mine or ())[-MOST:]
    if jax.process_count() == 1:
        return newest
    row = np.full(MOST, -1, np.int32)
    row[: len(newest)] = newest
    told = np.asarray(multihost_utils.process_allgather(row)).reshape(-1, MOST)
    found = [{int(step) for step in line if step >= 0} for line in told]
    return sorted(set.intersection(*found) if everywhere else found[0])
