"""What may happen to a run from outside: a signal to stop, a step that never ends, a process that is gone."""

import faulthandler
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import jax
import numpy as np
from jax.experimental import multihost_utils

from sharding.processes import by_process

GRACE = 20.0  # seconds after which a process that cannot even tell of its hung step is ended
LOST = re.compile(r"gloo|nccl|connection (reset|closed|refused)|peer|coordination|heartbeat|barrier|unavailable", re.I)


@dataclass
class StopSignal:
    """step -> whether SIGTERM has arrived (preemption, a scheduler's limit); all processes agree on the step."""

    arrived: list[float] = field(default_factory=list)

    def __call__(self, step: int) -> bool:
        if jax.process_count() > 1 and not self.arrived:  # jax.distributed listens to the signal itself
            if multihost_utils.reached_preemption_sync_point(step):
                self.arrived.append(time.monotonic())
        return bool(self.arrived)

    def age(self) -> float:
        """Seconds since it arrived."""
        return time.monotonic() - self.arrived[0] if self.arrived else 0.0


@contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Listen to SIGTERM meanwhile."""
    stop = StopSignal()
    if jax.process_count() > 1:
        yield stop
        return
    previous = signal.signal(signal.SIGTERM, lambda number, _: stop.arrived.append(time.monotonic()))
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)


class Watch:
    """Ends the process with code 1 and the stacks of all threads when no step has ended for `seconds`.

    A collective that waits for a host that is gone can neither be interrupted nor fails by itself on every network.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds, self._step, self._last = seconds, 0, 0.0
        self._over = threading.Event()

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self.seconds is not None:
            faulthandler.cancel_dump_traceback_later()

    def beat(self, step: int) -> None:
        """A step has ended; the first one, which was compiled, starts the watch."""
        if self.seconds is not None and not self._last:
            threading.Thread(target=self._look, name="watch", daemon=True).start()
        self._step, self._last = step, time.monotonic()
        if self.seconds is not None:  # outside Python: also when a library holds its lock
            faulthandler.dump_traceback_later(self.seconds + GRACE, exit=True, file=2)

    def _look(self) -> None:
        assert self.seconds is not None
        while not self._over.wait(min(1.0, self.seconds / 4)):
            if (silent := time.monotonic() - self._last) > self.seconds:
                print(
                    f"purestep: process {jax.process_index()}: step {self._step + 1} has not ended for {silent:.0f} s "
                    f"(train.hang_timeout={self.seconds:g}); the usual cause is a host that is gone or slow; stacks:",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(file=2)
                os._exit(1)


def leave_if_lost(error: BaseException) -> None:
    """End this process with code 1 and a reason, where an error says that another process is gone.

    At once: an orderly end would wait for the lost one until jax aborts.
    """
    if jax.process_count() == 1 or not LOST.search(str(error)):
        return
    print(
        f"purestep: process {jax.process_index()} of {jax.process_count()} has lost another one: it has ended or "
        "cannot be reached; the cause is in that one's output (killed? out of memory? network?); the same command on "
        f"every host goes on from the last checkpoint. ({str(error).splitlines()[0][:300]})",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def blame(rows: Mapping[str, np.ndarray]) -> str:
    """Which processes read what is no number for a step, as a reason of its loss; all of them ask."""
    names = sorted(name for name, x in rows.items() if np.issubdtype(x.dtype, np.floating))
    bad = [np.sum(~np.isfinite(rows[name].reshape(len(rows[name]), -1)).all(1)) for name in names]
    told = by_process(np.array([0, *bad], np.int32))[:, 1:]
    found = [f"{told[who, k]} rows of process {who} have such {names[k]!r}" for who, k in np.argwhere(told).tolist()]
    return "; ".join(found) or "all that was read for it is finite"
