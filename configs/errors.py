"""The two errors a user meets. The command line prints their one sentence without a traceback."""


class UsageError(ValueError):
    """Bad input: what was given, what is allowed, which key or file and line. Exit code 2."""


class RunError(RuntimeError):
    """The input was fine, the work failed: disk, network, memory, numbers. Exit code 1."""
