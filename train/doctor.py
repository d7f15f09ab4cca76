"""`purestep doctor`: whether this machine, or these machines together, can train; what to do where they cannot."""

import importlib.metadata
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from configs.cache import cache_folder
from sharding.flags import refused_flags
from sharding.mesh import make_mesh
from sharding.processes import all_agree, connect

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "grain", "transformers", "numpy", "libtpu", "jax-cuda13-plugin")
LEAST_DISK, LEAST_MEMORY = 5.0, 2.0  # GiB, below which a run soon fails
SIDE = {"cpu": 512}  # of the matrices whose product is timed; elsewhere
BYTES = {"cpu": 1 << 20}  # of each device in a collective
TIMES = 5


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what to do if that is wrong."""

    name: str
    found: str
    ok: bool = True
    remedy: str = ""


def examine(sizes: dict[str, int], output: Path) -> list[Finding]:
    """Everything, on all processes that the environment names; the first one's findings are those to show."""
    findings = [*_versions(), *_flags()]
    if not all(one.ok for one in findings):  # jax may abort: no device is touched
        return findings
    try:
        connect()
        findings += [*_devices(), *_host(output)]
        findings += [_matmul(), *_collectives(make_mesh(sizes or {"data": -1}))]
    except Exception as error:  # what is wrong is what is asked
        findings.append(Finding("devices", f"{type(error).__name__}: {error}", False, "is another program using them?"))
    good = all(one.ok for one in findings)
    if jax.distributed.is_initialized() and not all_agree(good) and good:
        findings.append(Finding("processes", "another one reports a fault", False, "see its output"))
    return findings


def _versions() -> Iterator[Finding]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in LIBRARIES[:7]:
                yield Finding(name, "not installed", False, f"pip install {name}")
    yield Finding("python", platform.python_version())
    yield Finding("libraries", ", ".join(f"{name} {version}" for name, version in found.items()))
    short = {name: [int(n) for n in re.findall(r"\d+", found.get(name, ""))[:3]] for name in ("jax", "jaxlib")}
    if all(short.values()) and short["jax"] < short["jaxlib"]:
        what = f"jax {found['jax']} with jaxlib {found['jaxlib']}"
        yield Finding("jax and jaxlib", what, False, f"pip install -U jax=={found['jaxlib']}")


def _flags() -> Iterator[Finding]:
    given = os.environ.get("XLA_FLAGS", "").split()
    refused = refused_flags(given)
    yield Finding(
        "XLA_FLAGS",
        " ".join(given) or "none",
        not refused,
        f"this jaxlib does not know {', '.join(refused)}, and any program would abort: take it out of XLA_FLAGS",
    )


def _devices() -> Iterator[Finding]:
    kinds = sorted({device.device_kind for device in jax.devices()})
    each = f"{jax.local_device_count()} on each of {jax.process_count()} processes"
    what = f"{jax.device_count()} x {', '.join(kinds)}; {each}"
    expected = shutil.which("nvidia-smi") is not None or Path("/dev/accel0").exists()
    cpu = jax.devices()[0].platform == "cpu"
    remedy = "there is an accelerator, but jax uses the CPU: install the extra gpu or tpu; look at JAX_PLATFORMS"
    yield Finding("devices", what, not (cpu and expected), remedy)
    if len(kinds) > 1:
        yield Finding("device kinds", ", ".join(kinds), False, "one program needs devices of one kind")
    for device in jax.local_devices()[:1]:
        if limit := (device.memory_stats() or {}).get("bytes_limit"):
            yield Finding("device memory", f"{limit / 2**30:.1f} GiB each for jax")


def _host(output: Path) -> Iterator[Finding]:
    memory = available_memory()
    if memory is not None:
        yield Finding("host memory", f"{memory:.1f} GiB available", memory > LEAST_MEMORY, "end other programs")
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", "~/.cache/huggingface")) / "hub")
    for name, folder in {"output": output, "compilation cache": cache_folder() / "xla", "hub cache": hub}.items():
        folder = folder.expanduser().absolute()
        inside = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(inside).free / 2**30
        writable = os.access(inside, os.W_OK)
        remedy = (
            f"free some space: checkpoints need it; at least {LEAST_DISK:g} GiB"
            if writable
            else f"make {inside} writable"
        )
        what = f"{folder}: {free:.1f} GiB free{'' if writable else ', not writable'}"
        yield Finding(name, what, writable and free > LEAST_DISK, remedy)


def available_memory() -> float | None:
    """GiB that programs may still take; None where the system does not tell (not Linux)."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(found[1]) / 2**20 if found else None


def _seconds(work: Callable[[], Any]) -> float:
    """The best of a few; compiled before."""
    jax.block_until_ready(work())
    best = float("inf")
    for _ in range(TIMES):
        began = time.perf_counter()
        jax.block_until_ready(work())
        best = min(best, time.perf_counter() - began)
    return best


def _matmul() -> Finding:
    device = jax.local_devices()[0]
    side = SIDE.get(device.platform, 8192)
    dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
    x = jax.device_put(np.ones((side, side), dtype), device)
    product = jax.jit(lambda x: x @ x)
    rate = 2 * side**3 / _seconds(lambda: product(x))
    right = float(product(x)[0, 0]) == side
    return Finding("matrix product", f"{rate / 1e12:.3g} TFLOP/s ({jnp.dtype(dtype).name}, {side} squared)", right,
                   "the result is wrong: this device is faulty")  # fmt: skip


def _shift(x: Any, axis_name: str) -> Any:
    n = jax.lax.axis_size(axis_name)
    return jax.lax.ppermute(x, axis_name, [(i, (i + 1) % n) for i in range(n)])


# What is done along an axis; how often a device sends the bytes that it holds, on an axis of n of them.
COLLECTIVES: dict[str, tuple[Callable[..., Any], Callable[[int], float]]] = {
    "all-reduce": (jax.lax.psum, lambda n: 2 * (n - 1) / n),
    "all-gather": (partial(jax.lax.all_gather, tiled=True), lambda n: n - 1),
    "reduce-scatter": (partial(jax.lax.psum_scatter, tiled=True), lambda n: (n - 1) / n),
    "permute": (_shift, lambda n: 1),
}


def _collectives(mesh: Mesh) -> Iterator[Finding]:
    """Each, along each axis of more than one device: its bandwidth, and whether what came is right."""
    for axis, n in mesh.shape.items():
        if n == 1:
            continue
        length = BYTES.get(mesh.devices.flat[0].platform, 1 << 26) // 4 // n * n
        whole = NamedSharding(mesh, P(mesh.axis_names))
        x = jax.make_array_from_callback((length * mesh.size,), whole, lambda index, k=length: np.ones(k, np.float32))
        told, right = [], True
        for name, (work, times) in COLLECTIVES.items():
            along = partial(work, axis_name=axis)
            run = jax.jit(jax.shard_map(along, mesh=mesh, in_specs=whole.spec, out_specs=whole.spec, check_vma=False))
            seconds = _seconds(partial(run, x))
            told.append(f"{name} {times(n) * 4 * length / seconds / 1e9:.3g}")
            expected = n if name in ("all-reduce", "reduce-scatter") else 1
            right &= all(bool(np.all(np.asarray(shard.data) == expected)) for shard in run(x).addressable_shards[:1])
        what = f"{n} devices, GB/s sent by each: {', '.join(told)}"
        yield Finding(f"axis {axis}", what, right, "what arrives is wrong: look at the network and the devices' memory")


def describe(findings: list[Finding]) -> str:
    """For people: a line each, faults with what to do."""
    wide = max(len(one.name) for one in findings)
    lines = []
    for one in findings:
        lines.append(f"{'ok   ' if one.ok else 'WRONG'} {one.name:<{wide}}  {one.found}")
        if not one.ok and one.remedy:
            lines.append(f"{' ' * (6 + wide)}  -> {one.remedy}")
    return "\n".join(lines)


def as_json(findings: list[Finding]) -> dict[str, Any]:
    """For scripts."""
    return {"ok": all(one.ok for one in findings), "findings": [asdict(one) for one in findings]}
