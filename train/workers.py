"""Functions in processes of their own. Only a process can be stopped for certain: a thread whose regular expression has
run away keeps the interpreter's lock, and with it the thread that would have timed it.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from configs.errors import RunError, UsageError

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from train.workers import serve; serve(*sys.argv[2:])"
)

LOADING = 600.0  # seconds in which a process must have started and imported what it needs


class Hung(Exception):
    """A call that took longer than it may; its process is gone."""


class Worker:
    """A process that answers calls, one at a time; started by the first, and anew after one that was stopped."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self.ready: set[Any] = set()  # what a pool has made it load

    def start(self) -> Connection:
        """The line to the process. It has no accelerator (ours is taken), and ends when this process does."""
        if self._process is None:
            self._line, theirs = Pipe()
            read, write = os.pipe()  # held open by us alone: when we are gone, the kernel signals it
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(sys.path), str(theirs.fileno()), str(read)],
                pass_fds=(theirs.fileno(), read),
                stdin=subprocess.DEVNULL,
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
                start_new_session=True,
            )
            theirs.close()
            os.close(read)
            self._stop = weakref.finalize(self, _end, self._process, self._line, write)
        return self._line

    def send(self, target: str, arguments: Any) -> None:
        """Ask for `module:function`(*arguments), all of it handed over as JSON."""
        try:
            self.start().send_bytes(json.dumps((target, arguments), default=_plain).encode())
        except (BrokenPipeError, ConnectionResetError):
            pass  # said when it is read

    def receive(self, seconds: float | None = None) -> Any:
        """The answer. Raises Hung, or what the function raised: UsageError as such, all else as RunError."""
        done = False
        try:
            if not self._line.poll(seconds):
                raise Hung
            kind, answer = json.loads(self._line.recv_bytes())
            done = True
        except (EOFError, ConnectionResetError):
            self.stop()
            assert self._process is None
            raise RunError(f"its process ended ({self._code})") from None
        finally:
            if not done:  # in the middle of a call, whatever stopped us
                self.stop()
        if kind == "done":
            return answer
        raise UsageError(answer) if kind == "refused" else RunError(answer)

    def call(self, target: str, *arguments: Any, seconds: float | None = None) -> Any:
        """`module:function`(*arguments), done there."""
        self.send(target, arguments)
        return self.receive(seconds)

    def stop(self) -> None:
        """End the process and all it started."""
        if self._process is not None:
            self._stop()
            code, self._process = self._process.returncode, None
            self.ready.clear()
            self._code = signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _end(process: subprocess.Popen[bytes], line: Connection, write: int) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    line.close()
    os.close(write)


def serve(line: str, life: str) -> None:
    """The process's own side: answer calls until the line closes. What functions print goes to standard error."""
    fcntl.fcntl(int(life), fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(int(life), fcntl.F_SETFL, fcntl.fcntl(int(life), fcntl.F_GETFL) | os.O_ASYNC)  # SIGIO ends us
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks is interrupted, and ends us
    os.dup2(2, 1)
    connection = Connection(int(line))
    while True:
        try:
            target, arguments = json.loads(connection.recv_bytes())
        except EOFError:
            return
        module, _, function = target.partition(":")
        try:
            __import__(module)
            answer = ("done", getattr(sys.modules[module], function)(*arguments))
        except UsageError as error:
            answer = ("refused", str(error))
        except BaseException as error:  # SystemExit too: the process goes on
            answer = ("failed", f"it raised {type(error).__name__}: {error}")
        try:
            said = json.dumps(answer, default=_score)
        except (TypeError, ValueError) as error:
            said = json.dumps(("failed", f"what it gave cannot be handed over: {error}"))
        connection.send_bytes(said.encode())


def _score(value: Any) -> Any:
    """A number, or array of them, of some library's own; raises TypeError for anything else."""
    return value.tolist() if hasattr(value, "tolist") else float(value)


def _plain(value: Any) -> Any:
    """What a column holds that JSON does not know: arrays as lists, all else (dates, bytes) as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


class Pool:
    """Several workers that share out calls, each call with its own time."""

    def __init__(self, size: int = 0) -> None:
        self.workers = [Worker() for _ in range(size or os.cpu_count() or 1)]

    def map(
        self, target: str, loader: str, first: Sequence[Any], calls: Sequence[Sequence[Any]], seconds: float
    ) -> list[Any]:
        """The answer to each call; in its place the Hung or RunError that came of it.

        loader(*first), which loads what the others need, comes before them on each worker, and takes what time it may.
        """
        answers: list[Any] = [None] * len(calls)
        left, known = iter(range(len(calls))), repr((loader, first))
        idle, busy = self.workers[: len(calls)], dict[Worker, tuple[int | None, float]]()
        try:
            while True:
                for worker in list(idle):
                    fresh = known not in worker.ready
                    if (number := None if fresh else next(left, None)) is None and not fresh:
                        break
                    worker.send(*(loader, first) if number is None else (target, calls[number]))
                    busy[worker] = number, time.monotonic() + (LOADING if number is None else seconds)
                    idle.remove(worker)
                if not busy:
                    return answers
                lines: dict[Any, Worker] = {worker.start(): worker for worker in busy}
                ready = [lines[line] for line in wait(list(lines), _left(min(end for _, end in busy.values())))]
                for worker, (number, end) in list(busy.items()):
                    if worker not in ready and _left(end) > 0:
                        continue
                    del busy[worker]
                    idle.append(worker)
                    try:
                        answer = worker.receive(0.0)
                    except (Hung, RunError) as error:
                        if number is None:
                            raise
                        answer = error
                    if number is None:
                        worker.ready.add(known)
                    else:
                        answers[number] = answer
        finally:
            for worker in busy:
                worker.stop()


def _left(end: float) -> float:
    return max(0.0, end - time.monotonic())
