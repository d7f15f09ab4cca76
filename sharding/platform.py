"""What kind of device a program is made for: the one that runs it, or one that it is compiled for elsewhere."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

_target: ContextVar[str | None] = ContextVar("target", default=None)


def platform() -> str:
    """cpu, gpu or tpu: that of `targeting`, else the default backend's."""
    return _target.get() or jax.default_backend()


@contextmanager
def targeting(kind: str) -> Iterator[None]:
    """Programs traced within are for such devices, which need not be there (compiled ahead of time)."""
    token = _target.set(kind)
    try:
        yield
    finally:
        _target.reset(token)


def device_memory() -> int:
    """Bytes of one device; of the machine's memory for CPU devices (shared by all of them); 0 = unknown."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    if limit or device.platform != "cpu":
        return int(limit)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(jax.local_devices())
    except (ValueError, OSError):
        return 0
