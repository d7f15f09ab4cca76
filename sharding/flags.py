"""XLA flags: which ones this jaxlib knows (an unknown one aborts the process), and those that help."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import distributions, version

from configs.cache import cache_folder

PROBE = "import jaxlib.xla_client, jax; jax.config.update('jax_platforms', 'cpu'); jax.devices()"
UNKNOWN = re.compile(r"Unknown flags? in XLA_FLAGS: (.*)")
# Collectives that run beside products instead of before them.
OVERLAP = {
    "gpu": (
        "--xla_gpu_enable_latency_hiding_scheduler=true",
        "--xla_gpu_enable_pipelined_all_gather=true",
        "--xla_gpu_enable_pipelined_reduce_scatter=true",
        "--xla_gpu_enable_pipelined_all_reduce=true",
    ),
    "tpu": (),  # libtpu's scheduler does it unasked
    "cpu": (),
}


def refused_flags(flags: Sequence[str]) -> list[str]:
    """Those that this jaxlib does not know, tried in another process; what was found is kept on disk."""
    return [] if not flags else list(_probe(tuple(flags)))


@functools.cache
def _probe(flags: tuple[str, ...]) -> tuple[str, ...]:
    file = cache_folder() / "flags.json"
    key = f"{version('jaxlib')} {' '.join(flags)}"
    try:
        kept = json.loads(file.read_text())
    except (OSError, ValueError):
        kept = {}
    if key not in kept:
        kept[key] = _try(flags)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            beside = file.with_suffix(f".{os.getpid()}")
            beside.write_text(json.dumps(kept))
            beside.replace(file)
        except OSError:  # a read-only home: asked again the next time
            pass
    return tuple(kept[key])


def _try(flags: Sequence[str]) -> list[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    env = {**inherited, "XLA_FLAGS": " ".join(flags)}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode == 0:
        return []
    found = UNKNOWN.search(done.stderr)
    return found[1].split() if found else list(flags)


def use_flags(wanted: str | Sequence[str], platform: str | None = None) -> list[str]:
    """Add flags to XLA_FLAGS that this jaxlib knows and that the user has not set; before the first device is used.

    wanted: 'auto' (those that overlap communication on this platform), 'none', or a list. Returns those added.
    """
    if platform is None:  # no device may be asked yet
        platform = "gpu" if shutil.which("nvidia-smi") and _installed("jax-cuda") else "cpu"
    chosen = OVERLAP.get(platform, ()) if wanted == "auto" else () if wanted == "none" else wanted
    given = os.environ.get("XLA_FLAGS", "")
    names = {flag.partition("=")[0] for flag in given.split()}
    new = [flag for flag in chosen if flag.partition("=")[0] not in names]
    refused = set(refused_flags(new))
    new = [flag for flag in new if flag not in refused]
    if new:
        os.environ["XLA_FLAGS"] = " ".join([*given.split(), *new])
    return new


def _installed(prefix: str) -> bool:
    return any((one.metadata["Name"] or "").startswith(prefix) for one in distributions())
