"""LoRA adapters as PEFT folders, in and out; names and shapes follow from the table of weights."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UsageError
from convert.folder import read_json, write_json, written_beside
from convert.hf import Saves, is_first_process, on_host
from convert.tables import Row, listing, rows
from convert.tensors import Outgoing, Tensor, open_safetensors, write_safetensors
from model.architecture import Architecture

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
# What a field must be, where another value would change the maths. None, False and {} always pass.
ONLY = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),  # others start by changing the base weights
}
# Fields with no say in the forward pass of a trained adapter, or read below.
FREE = {
    "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "base_model_name_or_path", "revision",
    "lora_dropout", "inference_mode", "auto_mapping", "peft_version", "layers_pattern", "layers_to_transform",
    "megatron_core", "qalora_group_size", "eva_config", "loftq_config", "runtime_config",
}  # fmt: skip


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says, as far as it matters here."""

    base: str
    r: int
    lora_alpha: float
    use_rslora: bool

    @property
    def scale(self) -> float:
        """The factor of a b: alpha / r, or alpha / sqrt(r) (rsLoRA)."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """adapter_config.json; UsageError names the field that is not supported."""
    path = folder / CONFIG
    config = read_json(path)
    for field, value in config.items():
        if value in (None, False, {}, []) or field in FREE:
            continue
        if value not in ONLY.get(field, ()):
            allowed = " or ".join(map(repr, ONLY[field])) if field in ONLY else "absent, null or false"
            raise UsageError(
                f"{path}: {field} = {value!r} is not supported (only {allowed}): plain LoRA and rsLoRA are"
            )
    r, alpha, base = config.get("r"), config.get("lora_alpha"), config.get("base_model_name_or_path")
    if config.get("peft_type") != "LORA" or not isinstance(r, int) or r < 1 or not isinstance(alpha, int | float):
        raise UsageError(f"{path}: peft_type LORA with a positive r and a lora_alpha is expected")
    if not base:
        raise UsageError(f"{path}: base_model_name_or_path is missing: it says which model the adapter belongs to")
    return AdapterConfig(base, r, float(alpha), bool(config.get("use_rslora")))


def read_adapter(folder: Path, arch: Architecture, dtype: Any = None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{our path: (a [L, in.., r], b [L, r, out..])} on the host; every layer of a weight must have its adapter."""
    r = read_adapter_config(folder).r
    if not (folder / WEIGHTS).is_file():
        why = f"; {PICKLE} is pickle and never loaded" if (folder / PICKLE).is_file() else ""
        raise UsageError(f"{folder}: {WEIGHTS} is missing{why}")
    tensors, found, used = open_safetensors(folder / WEIGHTS), {}, set()
    problems = []
    for row in _linear(arch):
        names = _names(row, arch)
        flat = [name for pair in names for name in pair]
        if not any(name in tensors for name in flat):
            continue
        used |= set(flat)
        if missing := [name for name in flat if name not in tensors]:
            problems.append(f"{len(missing)} missing: {listing(missing)}")
            continue
        inner, out = _matrix(row, arch)
        shapes = {0: (r, inner), 1: (out, r)}
        wrong = [pair[side] for pair in names for side in (0, 1) if _shape(tensors[pair[side]]) != shapes[side]]
        if wrong:
            problems.append(f"{len(wrong)} not of the base's shape and rank {r}: {listing(wrong)}")
            continue
        found[row.ours] = _stack(row, arch, r, [(tensors[a], tensors[b]) for a, b in names], dtype)
    if surplus := [name for name in tensors if name not in used]:
        problems.append(f"{len(surplus)} that are not adapters of linear layers here: {listing(surplus)}")
    if problems or not found:
        raise UsageError(f"{folder / WEIGHTS}: tensors {'; '.join(problems) or 'none'}")
    return found


def _shape(tensor: Tensor) -> tuple[int, ...] | None:
    return tensor.shape if tensor.dtype is not None else None


def _stack(row: Row, arch: Architecture, r: int, pairs: list[tuple[Tensor, Tensor]], dtype: Any) -> tuple[Any, Any]:
    inputs, outputs = _axes(row, arch)
    a = np.stack([np.asarray(down.read(), dtype).T.reshape(*inputs, r) for down, _ in pairs])
    b = np.stack([np.asarray(up.read(), dtype).T.reshape(r, *outputs) for _, up in pairs])
    return a, b


def _axes(row: Row, arch: Architecture) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shape, n = row.layer_shape(arch), len(row.inputs)
    return shape[:n], shape[n:]


def _matrix(row: Row, arch: Architecture) -> tuple[int, int]:
    inputs, outputs = _axes(row, arch)
    return math.prod(inputs), math.prod(outputs)


def _linear(arch: Architecture) -> list[Row]:
    """The rows that take adapters: linear layers of the blocks (the head is left alone, as PEFT's all-linear does, and
    so are experts and their router, which are none there)."""
    none = [row.ours for row in rows(arch) if row.each or row.ours.endswith("/router/weight")]
    return [row for row in rows(arch) if row.inputs and row.stacked and row.share is None and row.ours not in none]


def check_adapters(paths: Iterable[str], arch: Architecture) -> None:
    """UsageError for adapters that PEFT has no name for: of weights that are parts of a fused one there."""
    fused = {row.ours: row.theirs.split(".")[-2] for row in rows(arch) if row.share is not None}
    if found := sorted(path for path in paths if path in fused):
        whole = listing(sorted({fused[path] for path in found}))
        raise UsageError(
            f"model_type {arch.family} keeps {listing(found)} as parts of {whole}: "
            "adapters of fused weights are not supported (tune.target_modules: choose others, or export merged)"
        )


def _names(row: Row, arch: Architecture) -> list[tuple[str, str]]:
    stems = [PREFIX + name.removesuffix(".weight") for name in row.names(arch)]
    return [(f"{stem}.lora_A.weight", f"{stem}.lora_B.weight") for stem in stems]


def write_adapter(
    destination: Path,
    adapter: Mapping[str, tuple[Any, Any]],
    arch: Architecture,
    *,
    base: str,
    lora_alpha: float,
    use_rslora: bool = False,
    lora_dropout: float = 0.0,
    dtype: str | None = None,
    tokenizer: Saves | None = None,
    overwrite: bool = False,
) -> None:
    """Write {our path: (a, b)} as a PEFT folder whose base_model_name_or_path is `base`; all or nothing."""
    tensors = outgoing(adapter, arch, dtype)
    if not is_first_process():
        for tensor in tensors:
            tensor.make()  # takes part in gathering
        return
    config = config_of(adapter, arch, base, lora_alpha, use_rslora, lora_dropout)
    with written_beside(destination, overwrite) as part:
        write_files(part, tensors, config, tokenizer)


def outgoing(adapter: Mapping[str, tuple[Any, Any]], arch: Architecture, dtype: str | None) -> list[Outgoing]:
    """The tensors of {our path: (a, b)} as PEFT has them; ValueError for what it cannot have."""
    check_adapters(adapter, arch)
    known = {row.ours: row for row in _linear(arch)}
    unknown = sorted(set(adapter) - set(known))
    if unknown or not adapter:
        raise ValueError(f"adapters of {listing(unknown) or 'nothing'} cannot be written for PEFT")
    r, tensors = _rank(adapter), []
    for path, (a, b) in adapter.items():
        row = known[path]
        inner, out = _matrix(row, arch)
        downs, ups = zip(*_names(row, arch), strict=True)
        tensors += [_outgoing(name, a, layer, (inner, r), dtype) for layer, name in enumerate(downs)]
        tensors += [_outgoing(name, b, layer, (r, out), dtype) for layer, name in enumerate(ups)]
    return tensors


def _rank(adapter: Mapping[str, tuple[Any, Any]]) -> int:
    ranks = {a.shape[-1] for a, _ in adapter.values()}
    if len(ranks) != 1:
        raise ValueError(f"adapters of several ranks {sorted(ranks)} cannot be written for PEFT")
    return ranks.pop()


def config_of(
    adapter: Mapping[str, tuple[Any, Any]],
    arch: Architecture,
    base: str,
    lora_alpha: float,
    use_rslora: bool = False,
    lora_dropout: float = 0.0,
) -> dict[str, Any]:
    """adapter_config.json."""
    known = {row.ours: row for row in _linear(arch)}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": _rank(adapter),
        "lora_alpha": int(lora_alpha) if float(lora_alpha).is_integer() else lora_alpha,
        "lora_dropout": lora_dropout,
        "use_rslora": use_rslora,
        "target_modules": sorted(known[path].theirs.split(".")[-2] for path in adapter),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def write_files(folder: Path, tensors: list[Outgoing], config: dict[str, Any], tokenizer: Saves | None) -> None:
    """The files of a PEFT folder."""
    write_json(folder / CONFIG, config)
    if tokenizer is not None:
        tokenizer.save(folder)
    write_safetensors(folder / WEIGHTS, tensors)


def _outgoing(name: str, stacked: Any, layer: int, matrix: tuple[int, int], dtype: str | None) -> Outgoing:
    """A layer of a or b as PEFT's matrix: ours, flattened to [in, r] or [r, out], transposed."""
    kind = np.dtype(dtype or stacked.dtype)
    return Outgoing(
        name, matrix[::-1], kind, lambda: on_host(stacked[layer]).astype(kind, copy=False).reshape(matrix).T
    )
