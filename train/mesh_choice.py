"""mesh: auto, for a run: its model, batch and devices as the numbers that sharding/auto_mesh.py weighs."""

import math
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from configs.mesh import Mesh
from configs.schema import Run
from model.architecture import Architecture
from model.compute import Compute
from model.flops import matmul_params
from model.pipeline import planned
from model.transformer import declare
from sharding.auto_mesh import Choice, Hardware, Workload, auto_mesh
from sharding.mesh import slices_of
from sharding.platform import device_memory
from train.planner.targets import CHIPS, USABLE
from train.recipes import kind_of


def choose(run: Run, arch: Architecture, compute: Compute, devices: Sequence[Any]) -> Choice:
    """The mesh for these devices; axes of the run that are not at their default stay."""
    given = {axis: size for axis, size in run.mesh.shape.items() if size not in (Mesh.model_fields[axis].default, -1)}
    if run.mesh.preset == "replicated":
        given.setdefault("fsdp", 1)
    hardware = hardware_of(devices)
    return auto_mesh(workload_of(run, arch, compute, len(devices)), hardware, given, run.mesh.dcn)  # type: ignore[arg-type]


def tell(run: Run, arch: Architecture, compute: Compute, mesh: Any) -> None:
    """Say on stderr what `auto` chose and why, and how long a pipeline's stages wait."""
    if jax.process_index():
        return
    if run.mesh.auto:
        why = choose(run, arch, compute, list(mesh.devices.flat)).why
        print("mesh: auto chose", "; ".join(why), file=sys.stderr)
    rows = run.train.batch_size // run.train.microbatches
    with jax.set_mesh(mesh):
        schedule = planned(arch, compute, rows) if kind_of(run.objective) != "rollout" else None
    if schedule is not None:
        print(
            f"pipeline: {schedule.microbatches} micro-batches, {schedule.rounds} round{'s' * (schedule.rounds > 1)} "
            f"over {schedule.stages} stages, which wait {schedule.bubble:.0%} of the time",
            file=sys.stderr,
        )


def hardware_of(devices: Sequence[Any]) -> Hardware:
    """What such devices can do by their data sheets; of a CPU only how many there are, and the memory."""
    kind, slices = devices[0].device_kind.lower(), slices_of(devices)
    chips = [
        c for c in CHIPS.values() if c.device and (c.device.lower() in kind or (kind, c.name) == ("tpu v5", "v5p"))
    ]
    size = len(slices[0]) if len(slices) > 1 else 0
    if not chips:
        return Hardware(len(devices), float(device_memory()) or math.inf, 1e12, slice=size)
    chip = chips[0]
    memory = chip.memory * USABLE[chip.kind] / chip.cores
    near, far = chip.link * (2 if chip.kind == "tpu" else 1) / chip.cores, chip.network
    return Hardware(len(devices), memory, chip.bf16 / chip.cores, near, far, size)


def workload_of(run: Run, arch: Architecture, compute: Compute, devices: int) -> Workload:
    """The numbers of a run: bytes by what learns and by the optimizer, activations by what remat keeps."""
    layers = tables = 0
    for path, d in declare(arch).items():
        if path.startswith(tuple(f"{group}/" for group in arch.groups)):
            layers += math.prod(d.shape)
        else:
            tables += math.prod(d.shape)
    weight = np.dtype(run.model.param_dtype if run.model.param_dtype != "bfloat16" else "float16").itemsize
    first = {"float32": 4, "bfloat16": 2}[run.optim.state_dtype]
    moments = {"adamw": first + 4, "schedule_free": 8, "lion": first, "muon": first + 1, "adafactor": 0.5}[
        run.optim.name
    ]
    gradients = weight * (1 if run.train.microbatches == 1 else 2)
    learns = run.tune.method == "full"
    state = weight + (gradients + moments + 4 * (run.optim.ema_decay is not None)) * learns
    e, width = arch.experts, arch.d_model
    ffn = arch.d_ff if e is None else e.top_k * e.d_ff + e.shared_d_ff
    products = (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim + 2 * width + 2 * ffn
    rows, itemsize = run.train.batch_size // run.train.microbatches, np.dtype(compute.dtype).itemsize
    if kind_of(run.objective) == "rollout":
        rows = run.train.microbatch_rows * devices
    return Workload(
        arch.num_layers, width, arch.num_heads, arch.num_kv_heads, arch.head_dim, arch.d_ff, arch.vocab_size,
        rows, run.data.max_length, layers, tables, state, itemsize,
        kept={"full": 1.0, "dots": products / width, "none": 2 * products / width}[compute.remat],
        work=2 * products / width,
        logits=12.0 * min(run.objective.loss_chunk, rows * run.data.max_length) * (arch.num_labels or arch.vocab_size),
        active=(matmul_params(arch) - arch.d_model * (arch.num_labels or arch.vocab_size)) / layers,
        passes=4.0 if compute.remat == "full" else 3.0,
        experts=e.count if e else 0, top_k=e.top_k if e else 0,
        before=arch.dense_layers, repeats=run.mesh.pipeline_repeats,
    )  # fmt: skip
