"""The hardware a plan is for: chips by their data sheets, and abstract devices to compile for."""

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any, Literal

from configs.errors import UsageError

GB, GIB, MIB = 1e9, 2.0**30, 2.0**20


@dataclass(frozen=True)
class Chip:
    """One chip as its maker describes it. Rates are a second's; a link is one direction of one cable, of which a TPU
    has two for each dimension of its torus; of a GPU, all of NVLink one way, and beside it its network card."""

    name: str
    kind: Literal["cpu", "gpu", "tpu"]
    device: str  # in model/flops.py PEAKS, whose rates are of a device
    memory: float  # bytes
    fp8: float  # FLOP/s, dense
    hbm: float  # bytes/s
    link: float  # bytes/s
    source: str
    network: float = 0.0  # bytes/s of one device to other hosts, one way
    dimensions: int = 1  # of the torus
    wraps: int = 0  # a 3D slice is a torus if all its dimensions are multiples of it; on a plane a side of it is a ring
    cores: int = 1  # devices that JAX sees of one chip
    per_host: int = 4
    compiler: str = ""  # the compiler's name of the topology

    @property
    def bf16(self) -> float:
        """FLOP/s of the chip, dense."""
        from model.flops import PEAKS  # imports jax, which must not start before set_environment

        return PEAKS[self.device][0] * self.cores if self.device else 1e12


TPU = "cloud.google.com/tpu/docs"
BOOK = "; link, network: jax-ml.github.io/scaling-book/tpus"
V4 = f"{TPU}/v4{BOOK}; memory: what libtpu 0.0.42 leaves a program of 32 GiB; network: said there of TPUs in general"
V7X = f"{TPU}/tpu7x; link: not confirmed, 0.9 of that page's, as of the others"
# network: a ConnectX-7 card for each GPU. XLA's file has the FLOP/s of H100 and H200 too; of B200 it has 1% less.
GPU = "FLOP/s: NVIDIA's, without sparsity; network: docs.nvidia.com/dgx; else openxla/xla target_config/specs"
H200 = f"{GPU}/h200; memory: as PyTorch reports it (that file's is no device's)"
# A link of a TPU: Google's pages give the sum over all links, both ways: 1200 GB/s of v5p and v7x, 800 of v6e, 400 of
# v5e. The book, and MaxText with it, counts 0.9 of that. A link of a GPU: 18 NVLinks of 25 GB/s, of B200 of 50.
# Memory: of v5p and of GPUs without what the system keeps; CUDA reports less than nvidia-smi.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "tpu", "TPU v4", 30.75 * GIB, 275e12, 1.2e12, 45 * GB, V4, 6.25 * GB, 3, 4),
        Chip("v5e", "tpu", "TPU v5 lite", 16 * GIB, 197e12, 0.819e12, 45 * GB, f"{TPU}/v5e{BOOK}", 3.125 * GB, 2, 16),
        Chip("v5p", "tpu", "TPU v5p", 95 * GIB, 459e12, 2.765e12, 90 * GB, f"{TPU}/v5p{BOOK}", 6.25 * GB, 3, 4),
        Chip("v6e", "tpu", "TPU v6", 32 * GIB, 918e12, 1.638e12, 90 * GB, f"{TPU}/v6e{BOOK}", 12.5 * GB, 2, 16),
        Chip("v7x", "tpu", "TPU7x", 192 * GIB, 4614e12, 7.38e12, 90 * GB, V7X, 6.25 * GB, 3, 4, 2, 4, "tpu7x"),
        Chip("h100", "gpu", "H100", 84942979072.0, 1979e12, 3.352e12, 450 * GB, f"{GPU}/h100_sxm", 50 * GB, per_host=8),
        Chip("h200", "gpu", "H200", 150121545728.0, 1979e12, 4.8e12, 450 * GB, H200, 50 * GB, per_host=8),
        Chip("b200", "gpu", "B200", 191514411008.0, 4500e12, 7.672e12, 900 * GB, f"{GPU}/b200", 50 * GB, per_host=8),
        # nothing is claimed of a CPU's speed: these only keep the ratios from being 0
        Chip("cpu", "cpu", "", 0.0, 1e12, 20 * GB, 10 * GB, "none: a CPU's times are not planned", per_host=4096),
    )
}
EXAMPLES = (
    "v4:2x2x4, v5e:4x4, v5p:4x4x4, v6e:16x16, v7x:2x2x2 (chips), h100:2x8, h200:8, b200:4x8 (hosts x GPUs), cpu:8"
)
# Of the memory, what a program may have: the runtime's own share is left out. libtpu 0.0.42 compiles for 15.75 GiB of
# v5e, 95.73 of v5p, 31.24 of v6e and 94.74 of each half of v7x: all above these 0.97.
USABLE = {"tpu": 0.97, "gpu": 0.92, "cpu": 1.0}


@dataclass(frozen=True)
class Target:
    """So many chips of a kind, in a shape."""

    text: str
    chip: Chip
    shape: tuple[int, ...]  # chips along each dimension; hosts and GPUs

    @property
    def chips(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Devices, as JAX counts them."""
        return self.chips * self.chip.cores

    @property
    def memory(self) -> float:
        """Bytes that a program may take of one device; of CPU devices, which share it, the machine's."""
        if self.chip.kind == "cpu":
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / self.size
        return self.chip.memory / self.chip.cores * USABLE[self.chip.kind]

    def bandwidth(self, group: list[Any]) -> float:
        """Bytes a second, one way, that a device can pass on round a ring of these devices, over all links it has."""
        chip = self.chip
        if chip.kind == "gpu":
            hosts = {device.process_index for device in group}
            # one host's members of the group share its cards with nobody: several groups run at a time
            return chip.link if len(hosts) == 1 else min(chip.link, chip.network * len(group) / len(hosts))
        if chip.kind == "cpu":
            return chip.link
        links = 0
        # optical switches close the rings of a 3D slice, and only of whole cubes: 2x4x4 has none. On a plane the pod's
        # own cables do, which a side of 16 has: of 8x16 the longer one.
        torus = chip.dimensions == 3 and all(extent % chip.wraps == 0 for extent in self.shape)
        for dimension, extent in enumerate(self.shape):
            if len({device.coords[dimension] for device in group}) > 1:
                links += 2 if torus or (chip.dimensions == 2 and extent >= chip.wraps) else 1
        # between the cores of one v7x it is 6 times as fast as one link, Google says; no more than two is claimed
        return chip.link * (links or 2) / chip.cores


def parse_target(text: str) -> Target:
    """'v5p:4x4x4' -> Target; UsageError for what is unknown or has another shape than such chips come in."""
    found = re.fullmatch(r"([a-z]+\d*[a-z]*):(\d+(?:x\d+)*)", text.strip().lower())
    if not found or found[1] not in CHIPS:
        raise UsageError(f"--target is {text!r}, allowed: CHIP:SHAPE, as {EXAMPLES}")
    chip, shape = CHIPS[found[1]], tuple(map(int, found[2].split("x")))
    if chip.kind == "gpu" and len(shape) == 1:
        shape = (1, *shape)
    wanted = {"tpu": chip.dimensions, "gpu": 2, "cpu": 1}[chip.kind]
    names = {"tpu": "chips along each dimension of the torus", "gpu": "hosts x GPUs", "cpu": "devices"}[chip.kind]
    if len(shape) != wanted or min(shape) < 1:
        raise UsageError(f"--target is {text!r}: {chip.name} takes {wanted} numbers from 1 on, {names}; as {EXAMPLES}")
    if chip.kind != "tpu" and shape[-1] > chip.per_host:
        raise UsageError(f"--target is {text!r}: a host has at most {chip.per_host} of {chip.name}; as {EXAMPLES}")
    if math.prod(shape) > 16384:
        raise UsageError(f"--target is {text!r}: {math.prod(shape)} chips, allowed: at most 16384")
    return Target(text.strip().lower(), chip, shape)


NEEDS = {"tpu": ("libtpu",), "gpu": ("jax_cuda13_plugin", "jax_plugins.xla_cuda13"), "cpu": ()}
INSTALL = "pip install 'purestep[plan]'"


def has_compiler(target: Target) -> bool:
    """Whether what compiles for the target is installed."""
    return all(importlib.util.find_spec(name) is not None for name in NEEDS[target.chip.kind])


def set_environment(target: Target) -> None:
    """What jax, which must not be started yet, reads: no device is looked for; of a cpu target, so many are made."""
    flags = os.environ.get("XLA_FLAGS", "")
    if target.chip.kind == "cpu" and "host_platform_device_count" not in flags:
        flags += f" --xla_force_host_platform_device_count={target.size}"
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags.strip(),
        "TPU_SKIP_MDS_QUERY": "1",  # no server tells what machine this is
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # of the machine, were it one; the topology is asked for by name
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device is taken: others may plan or train beside it
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def devices_of(target: Target) -> list[Any]:
    """The target's devices, to compile for; only those of a cpu target can run anything."""
    import jax
    from jax.experimental import topologies

    if target.chip.kind == "cpu":
        devices = jax.devices("cpu")
        if len(devices) < target.size:
            raise UsageError(f"--target {target.text}: this process has {len(devices)} CPU devices (XLA_FLAGS)")
        return devices[: target.size]
    try:
        return list(_topology(topologies.get_topology_desc, target).devices)
    except Exception as error:  # a plugin's own, of any type
        said = " ".join(str(error).split())[:300]
        raise UsageError(f"--target {target.text}: the compiler knows no such topology: {said}") from error


def _topology(describe: Any, target: Target) -> Any:
    shape = "x".join(map(str, target.shape))
    if target.chip.kind == "gpu":
        return describe(
            platform="cuda",
            topology_name=target.chip.name,
            target_config=gpu_config(target.chip),
            topology=f"{shape}x1",
        )
    # of v4 two cores are one device only if that is asked for
    more = {"chip_config_name": "megacore"} if target.chip.name == "v4" else {}
    return describe(platform="tpu", topology_name=f"{target.chip.compiler or target.chip.name}:{shape}", **more)


# As XLA's files in target_config/specs (see GPU) have them, but for the name of the H200, which is the device's own.
GPUS = {  # name, compute capability, multiprocessors, L2 in bytes, clock in GHz
    "h100": ("NVIDIA H100 80GB HBM3", 9, 132, 50 * MIB, 1.98),
    "h200": ("NVIDIA H200", 9, 132, 50 * MIB, 1.98),
    "b200": ("NVIDIA B200", 10, 148, 126.5 * MIB, 1.965),
}


def gpu_config(chip: Chip) -> str:
    """XLA's description of a GPU that is not there (stream_executor's GpuTargetConfigProto, as text)."""
    name, major, units, cache, clock = GPUS[chip.name]
    numbers = {
        "threads_per_block_limit": 1024, "threads_per_warp": 32, "shared_memory_per_block": 49152,
        "shared_memory_per_core": 233472, "shared_memory_per_block_optin": 232448, "threads_per_core_limit": 2048,
        "core_count": units, "fpus_per_core": 128, "block_dim_limit_x": 2147483647, "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535, "memory_bandwidth": int(chip.hbm), "l2_cache_size": int(cache),
        "device_memory_size": int(chip.memory), "clock_rate_ghz": clock,
        "registers_per_core_limit": 65536, "registers_per_block_limit": 65536,
    }  # fmt: skip
    fields = " ".join(f"{key}: {value}" for key, value in numbers.items())
    return (
        f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: {major} minor: 0 }} }} "
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "{name}"'
    )
