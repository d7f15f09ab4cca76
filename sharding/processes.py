"""Several processes, one program: jax.distributed from the environment, and what they agree on."""

import os
import sys
import threading
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from configs.errors import RunError, UsageError

MOST = 64  # steps that are told to others
LATE = 10  # seconds that jax waits for others longer than we do


def connect(heartbeat_timeout: int = 100, join_timeout: int = 300) -> None:
    """Join the other processes where the environment names them. Call before any device is used.

    JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES, and JAX_PROCESS_ID or a Kubernetes Job's
    JOB_COMPLETION_INDEX; or PURESTEP_JOIN=auto: Cloud TPU, GKE, SLURM and Open MPI tell jax all of it.
    """
    address, join = os.environ.get("JAX_COORDINATOR_ADDRESS"), os.environ.get("PURESTEP_JOIN")
    if join not in (None, "auto"):
        raise UsageError(f"PURESTEP_JOIN={join}: allowed is auto, or nothing and JAX_COORDINATOR_ADDRESS")
    if jax.distributed.is_initialized() or (address is None and join is None):
        return
    index = os.environ.get("JAX_PROCESS_ID", os.environ.get("JOB_COMPLETION_INDEX") if address else None)
    count = os.environ.get("JAX_NUM_PROCESSES")
    where = f"process {index or '?'} of {count or '?'}: they did not come together at {address or 'the first host'}"
    late = threading.Timer(join_timeout, _give_up, (f"{where} within train.join_timeout={join_timeout} s",))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            address,
            int(count) if count is not None else None,
            int(index) if index is not None else None,
            heartbeat_timeout_seconds=heartbeat_timeout,
            initialization_timeout=join_timeout + LATE,
            shutdown_timeout_seconds=heartbeat_timeout,
        )
    except ValueError as error:  # a number that is none, or something that is not told
        raise UsageError(
            f"several processes: {error} (JAX_COORDINATOR_ADDRESS={address}, JAX_NUM_PROCESSES={count}, "
            f"JAX_PROCESS_ID={index}, PURESTEP_JOIN={join})"
        ) from error
    except RuntimeError as error:
        raise RunError(f"{where}: {str(error).splitlines()[0][:500]}") from error
    finally:
        late.cancel()


def _give_up(what: str) -> None:
    """jax would abort with a stack of its own a little later."""
    print(
        f"purestep: {what}: is the command running on every host, with the same number of processes, and is the port "
        "open?",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


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


def by_process(mine: np.ndarray) -> np.ndarray:
    """The arrays of all processes, alike in shape, along a new first axis."""
    return np.asarray(multihost_utils.process_allgather(mine)).reshape(jax.process_count(), *mine.shape)
