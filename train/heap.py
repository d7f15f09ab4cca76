"""The C library's heap: what one step frees is kept for the next, not handed back to the system page by page."""

import ctypes

from configs.errors import UsageError

# glibc's malloc.h: one arena for all threads, no block mapped by itself, never trimmed
SETTINGS = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1)}


def keep_memory() -> None:
    """Keep freed memory with the process from here on; to be called before jax starts its threads."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError) as error:
        raise UsageError("train.keep_memory is true, but this system's C library is not glibc: leave it out") from error
    for name, (option, value) in SETTINGS.items():
        if not mallopt(option, ctypes.c_int(value)):
            raise UsageError(f"train.keep_memory is true, but the C library refuses {name}={value}: leave it out")
