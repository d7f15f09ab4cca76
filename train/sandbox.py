"""Programs that nobody trusts, run apart: own namespaces, hard limits, one small writable folder, gone afterwards."""

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Literal

from configs.errors import UsageError
from train import jail

Isolation = Literal["namespaces", "none"]
MIB = 2**20
# Nobody's user ids: each program of root's is a user of its own, counted alone.
USERS = range(1 << 30, (1 << 30) + (1 << 20))


@dataclass(frozen=True)
class Limits:
    """What a program may use. At worst it holds `processes` times `memory`."""

    seconds: float = 5.0  # by the clock; as many of processor time, in each process
    memory: int = 512 * MIB  # bytes of address space, of each process
    processes: int = 8  # and threads
    output: int = MIB  # bytes of standard output, of standard error, and of the largest file
    disk: int = 32 * MIB  # bytes in the writable folder
    files: int = 64  # open at a time


@dataclass(frozen=True)
class Outcome:
    """How a program ended. `code` is its exit code (128 and above, or 256 less a signal: killed)."""

    stdout: str
    stderr: str
    code: int
    timed_out: bool

    @property
    def ok(self) -> bool:
        """Whether it ended by itself, without an error."""
        return not self.timed_out and self.code == 0


def run(source: str, stdin: str = "", limits: Limits | None = None, isolation: Isolation = "namespaces") -> Outcome:
    """Run a Python program. With isolation none only the limits hold, and what it starts may outlive it.

    With namespaces it sees the interpreter and its packages, read-only; no other file, process or network.
    """
    limits = limits or Limits()
    if isolation == "namespaces" and (reason := refusal()):
        raise UsageError(
            f"the kernel refuses the sandbox ({reason}); usual causes: a container without CAP_SYS_ADMIN, or a system "
            "that forbids user namespaces. Allow them, or write sandbox: none: programs then run with limits alone"
        )
    return _run(source, stdin, limits, isolation)


@cache
def refusal() -> str:
    """Why programs cannot be isolated here; empty where they can."""
    if sys.platform != "linux":
        return f"namespaces are Linux's, this is {sys.platform}"
    tried = _run("print(1)", "", Limits(seconds=30.0), "namespaces")
    return "" if tried.stdout == "1\n" else tried.stderr.strip() or f"exit code {tried.code}"


def _run(source: str, stdin: str, limits: Limits, isolation: Isolation) -> Outcome:
    folder = tempfile.mkdtemp(prefix="purestep-")
    home = jail.WORK if isolation == "namespaces" else folder
    try:
        Path(folder, "main.py").write_text(source, encoding="utf-8", errors="replace")
        Path(folder, "job.json").write_text(json.dumps(_job(limits, isolation)), encoding="utf-8")
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            given.write(stdin.encode("utf-8", "replace"))
            given.seek(0)
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", jail.__file__, folder],
                stdin=given,
                stdout=out,  # files: the limit on their size is the limit on output
                stderr=err,
                env={"PATH": "/usr/bin:/bin", "HOME": home, "TMPDIR": home, "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,
            )
            try:
                timed_out = not _ends(process, limits.seconds)
            finally:
                _kill(process)
            return Outcome(_text(out, limits.output), _text(err, limits.output), process.returncode, timed_out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _job(limits: Limits, isolation: Isolation) -> dict[str, object]:
    seconds = int(limits.seconds) + 1
    prefixes = {path for one in (sys.prefix, sys.base_prefix) for path in (one, os.path.realpath(one))}
    caps = {
        "CPU": seconds, "AS": limits.memory, "FSIZE": limits.output, "NPROC": limits.processes,
        "NOFILE": limits.files, "CORE": 0,
    }  # fmt: skip
    if isolation == "none":
        del caps["NPROC"]  # would count all that the user runs
    return {
        "isolated": isolation == "namespaces",
        "python": sys.executable,
        "prefixes": sorted(prefixes),
        "user": random.SystemRandom().choice(USERS),
        "disk": limits.disk,
        "limits": caps,
    }


def _ends(process: subprocess.Popen[bytes], seconds: float) -> bool:
    if not hasattr(os, "pidfd_open"):
        try:
            return process.wait(seconds) is not None
        except subprocess.TimeoutExpired:
            return False
    handle = os.pidfd_open(process.pid)
    try:
        return bool(select.select([handle], [], [], seconds)[0])
    finally:
        os.close(handle)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the program's process group (by its namespace all of it) and leave no zombie."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _text(file: IO[bytes], most: int) -> str:
    file.seek(0)
    return file.read(most).decode("utf-8", "replace")
