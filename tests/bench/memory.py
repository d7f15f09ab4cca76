"""The anonymous memory that work takes at its peak (RssAnon, sampled): pages of mapped files are not its own."""

import threading
from pathlib import Path


def anonymous() -> int:
    """Bytes of RssAnon."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Peak:
    """with Peak() as peak: ...; then peak.grown is how much more there was than at the beginning, in bytes."""

    def __init__(self, pause: float = 0.002) -> None:
        self.pause, self.done = pause, threading.Event()

    def __enter__(self) -> "Peak":
        self.baseline = self.highest = anonymous()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(self.pause):
            self.highest = max(self.highest, anonymous())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.grown = max(self.highest, anonymous()) - self.baseline
