"""An iterator run ahead in a thread."""

import queue
import threading
from collections.abc import Iterator
from typing import Any


class Prefetch:
    """An iterator run ahead in a thread, by at most `depth` items. Its exceptions reach the caller in their turn."""

    def __init__(self, source: Iterator[Any], depth: int):
        self._queue: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._done = False
        self._thread = threading.Thread(target=self._run, args=(source,), name="purestep-data", daemon=True)
        self._thread.start()

    def _run(self, source: Iterator[Any]) -> None:
        try:
            for item in source:
                if not self._put((True, item)):
                    return
            self._put((False, StopIteration()))
        except BaseException as error:
            self._put((False, error))

    def _put(self, item: tuple[bool, Any]) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> "Prefetch":
        return self

    def __next__(self) -> Any:
        if self._done:
            raise StopIteration
        good, item = self._queue.get()
        if good:
            return item
        self._done = True
        raise item

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._stop.set()
        self._done = True
        self._thread.join()
