"""Compiled programs kept on disk, so that the next start is faster."""

import os
from pathlib import Path

from configs.cache import cache_folder


def enable_compilation_cache(folder: Path | None = None) -> Path | None:
    """Turn on jax's persistent compilation cache; a folder the user chose through jax itself is left as it is.

    Returns the folder, or None where it cannot be written (a read-only home): then nothing is cached, nothing fails.
    None, too, with several CPU devices (of one process or of many): there a program that is loaded, not compiled, has
    lost the order of its collectives, and now and then its devices wait for each other for ever (jaxlib 0.10, 0.12).
    """
    import jax

    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    if chosen := jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return Path(chosen)
    folder = folder or cache_folder() / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder
