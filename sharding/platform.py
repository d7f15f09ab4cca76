"""What kind of device a program is made for: the one that runs it, or one that it is compiled for elsewhere."""

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
