"""A jax.profiler trace of some steps."""

from pathlib import Path
from typing import Any

import jax

from configs.errors import UsageError


def check_span(span: tuple[int, ...] | None, steps: int) -> None:
    """Refuse steps that the run does not have."""
    if span is not None and span[-1] > steps:
        raise UsageError(f"train.profile_steps is {list(span)}, but the run ends with step {steps}")


class Trace:
    """Traces the steps first .. last into a folder, or those of them that this process does."""

    def __init__(self, folder: Path, span: tuple[int, ...] | None) -> None:
        self._folder, self._span, self._on = folder, span, False

    def begin(self, step: int) -> None:
        """Start with the first one."""
        if self._span is not None and not self._on and self._span[0] <= step <= self._span[1]:
            jax.profiler.start_trace(str(self._folder))
            self._on = True

    def end(self, step: int, made: Any) -> None:
        """Stop with the last one, when what it makes is there."""
        if self._on and self._span is not None and step == self._span[1]:
            jax.block_until_ready(made)
            self.close()

    def close(self) -> None:
        """Write what there is."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
