"""A MODEL, whatever it is, to its architecture, weights and tokenizer."""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from configs.errors import UsageError
from convert import adapter, gguf, gguf_families, hf, hub, names, run
from convert.progress import bytes_bar
from convert.tables import match
from convert.tensors import Tensor
from data.tokenizer import Tokenizer
from model.architecture import Architecture
from model.families import architecture_from_hf
from model.weights import Lora

Index = tuple[slice, ...]
Read = Callable[[Index], np.ndarray]
Placer = Callable[[str, tuple[int, ...], Any, Read], jax.Array]

NESTING = 8  # adapters on runs on adapters ...: more is a circle
TOKENIZERS = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class Source:
    """Where a model's weights are and what they are."""

    kind: Literal["hf", "gguf", "adapter", "run"]
    name: str  # as the user wrote it
    path: Path
    arch: Architecture
    config: dict[str, Any]  # config.json's contents
    generation_config: dict[str, Any] | None
    base: "Source | None" = None  # adapter and run: the model they started from
    fresh: Mapping[str, np.ndarray] = field(default_factory=dict)  # weights of `arch` that lie nowhere yet


def resolve(model: str | Path, depth: int = 0) -> Source:
    """The Source that a MODEL means: a short name, a path (HF folder, GGUF, run, adapter), or a hub id, in that order.

    Downloads where it must, reads headers and configs only. UsageError for what is wrong or unsupported, RunError for
    a download that fails.
    """
    name = str(model)
    if depth > NESTING:
        raise UsageError(f"'{name}': base models that lead to each other in a circle")
    if name in names.MODELS:
        return _from_gguf(name, names.fetch(name))
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_folder(name, path, depth)
    if path.is_file():
        return _from_file(name, path)
    if hub.is_hub_id(name):
        try:
            return _from_folder(name, hub.fetch(name), depth)
        except UsageError as error:
            raise UsageError(f"{error}{_nearest(path)}") from error
    raise UsageError(f"MODEL '{name}' does not exist{_nearest(path)}. {_allowed()}")


def _allowed() -> str:
    return (
        f"A MODEL is a short name ({', '.join(names.MODELS)}), a Hugging Face folder, a GGUF file, a run folder, "
        "a PEFT adapter folder, or a hub id (org/name)"
    )


def _nearest(path: Path) -> str:
    """'; nearest: ...' among what lies where the path leaves the existing tree, and the short names."""
    parts = path.parts
    base = next((p for p in path.parents if p.is_dir()), Path())
    wanted = path.relative_to(base).parts[0] if parts and base != path else path.name
    near = difflib.get_close_matches(wanted, [p.name for p in base.iterdir()], 1)
    if near:
        return f"; nearest: {base / near[0]}"
    near = difflib.get_close_matches(path.name.lower(), names.MODELS, 1)
    return f"; nearest: {near[0]}" if near else ""


def _from_file(name: str, path: Path) -> Source:
    if path.suffix == ".safetensors":
        raise UsageError(
            f"MODEL '{name}' is a single safetensors file: give its folder, which has the config and tokenizer"
        )
    if path.suffix in hf.PICKLES:
        raise UsageError(
            f"MODEL '{name}' is a pickle, which can run code when read and is never loaded: use safetensors"
        )
    return _from_gguf(name, path)


def _from_gguf(name: str, path: Path) -> Source:
    file = gguf.open_gguf(path)
    config = gguf_families.config_of(file)
    return Source("gguf", name, path, _architecture(path, config), config, gguf_families.generation_config_of(file))


def _from_folder(name: str, path: Path, depth: int) -> Source:
    if (path / adapter.CONFIG).is_file():
        wanted = adapter.read_adapter_config(path).base
        base = _base(wanted, path, f"{path / adapter.CONFIG}: base_model_name_or_path", depth)
        return replace(base, kind="adapter", name=name, path=path, base=base)
    if (path / "config.json").is_file():
        config, generation = hf.read_configs(path)
        return Source("hf", name, path, _architecture(path / "config.json", config), config, generation)
    if run.is_run(path):
        if export := run.find_export(path):
            return _from_folder(name, export, depth + 1)
        run.newest_checkpoint(path)  # fails early when there is none
        wanted = run.read_run_config(path)["model"]["source"]
        base = _base(wanted, path, f"{path / run.CONFIG}: model.source", depth)
        arch, saved = base.arch, run.open_params(path)
        if score := saved.get("score/weight"):  # trained a reward model
            arch = replace(arch, num_labels=score.shape[-1], token_labels="score/bias" in saved)
        return replace(base, kind="run", name=name, path=path, arch=arch, base=base)
    inside = sorted(p.name for p in path.iterdir())
    if ggufs := [n for n in inside if n.endswith(".gguf")]:
        raise UsageError(f"MODEL '{name}' is a folder with GGUF files: give one of them, such as {path / ggufs[0]}")
    if any(n.endswith(hf.PICKLES) or n.endswith(".safetensors") for n in inside):
        raise UsageError(f"MODEL '{name}': {path} has weights but no config.json")
    raise UsageError(
        f"MODEL '{name}' is a folder without a config.json, adapter_config.json or config.yaml. {_allowed()}"
    )


def _base(wanted: str, folder: Path, key: str, depth: int) -> Source:
    """The base of an adapter or run: a path counts from the working folder, then from the folder that names it."""
    beside = folder / wanted
    try:
        return resolve(beside if not Path(wanted).expanduser().exists() and beside.exists() else wanted, depth + 1)
    except UsageError as error:
        raise UsageError(f"{key}: {error}") from error


def _architecture(where: Path, config: dict[str, Any]) -> Architecture:
    try:
        return architecture_from_hf(config)
    except ValueError as error:
        raise UsageError(f"{where}: {str(error).removeprefix('config.json: ')}") from error


def with_scores(source: Source, num_labels: int, token_labels: bool, seed: int) -> Source:
    """The source as a reward model: with its own score head, which must be such a one, or with a new one."""
    arch = replace(source.arch, num_labels=num_labels, token_labels=token_labels)
    if source.arch.num_labels:
        if source.arch != arch:
            raise UsageError(
                f"MODEL '{source.name}' scores {describe_scores(source.arch)}, wanted are {describe_scores(arch)}: "
                "start from the language model for a new head"
            )
        return source
    weight = np.random.default_rng(seed).normal(0, arch.init_std, (arch.d_model, num_labels)).astype(np.float32)
    fresh = {"score/weight": weight}
    if token_labels:
        fresh["score/bias"] = np.zeros(num_labels, np.float32)
    return replace(source, arch=arch, fresh=fresh)


def describe_scores(arch: Architecture) -> str:
    """What a reward model scores, in words."""
    return "tokens (steps of a process)" if arch.token_labels else f"sequences with {arch.num_labels} head(s)"


def check_language(source: Source) -> None:
    """Raise UsageError for a model that predicts no tokens."""
    if source.arch.num_labels:
        raise UsageError(
            f"MODEL '{source.name}' is a reward model: it scores {describe_scores(source.arch)} and has no "
            "language-model head. `purestep score` and `purestep eval` take it, objective.type=reward trains it"
        )


def load_tokenizer(source: Source) -> Tokenizer:
    """The model's tokenizer with its chat template; an adapter or run without one has its base's."""
    from data.tokenizer import load_tokenizer as load
    from data.tokenizer import wrap_fast

    if source.kind == "gguf":
        from convert.gguf_tokenizer import build_tokenizer

        backend, config = build_tokenizer(gguf.open_gguf(source.path))
        return wrap_fast(backend, config, source.generation_config)
    if source.base is not None and not any((source.path / name).is_file() for name in TOKENIZERS):
        return load_tokenizer(source.base)
    return load(source.path)


def open_tensors(source: Source) -> dict[str, Tensor]:
    """{Hugging Face name: Tensor} of a folder or GGUF file; nothing is read yet."""
    if source.kind == "gguf":
        return gguf_families.tensors_of(gguf.open_gguf(source.path))
    return hf.open_folder(source.path)


def load_params(source: Source, placer: Placer | None = None, dtype: Any = None) -> dict[str, Any]:
    """The parameter tree, each leaf read and placed by itself, the largest first.

    placer(path, shape, dtype, read) -> array, where read(index) gives the part of the leaf that a tuple of slices
    selects; default: everything on the first device. dtype: default as stored. Adapters come attached, as Lora nodes,
    and are placed under '<path>/a' and '<path>/b'. Memory: the model in its target dtype and at most twice its
    largest leaf.
    """
    from model.transformer import nest

    fresh = {path: _of_array(array) for path, array in source.fresh.items()}
    return nest(_load(source, source.arch, placer or place_on_default_device, dtype, fresh))


@dataclass(frozen=True)
class _Pending:
    """A leaf that is still to be placed. cheap: reading a part of it costs that part only."""

    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[Index, Any], np.ndarray]
    cheap: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def _load(
    source: Source, arch: Architecture, placer: Placer, dtype: Any, over: Mapping[str, _Pending]
) -> dict[str, Any]:
    """{path: leaf} of what `arch` has, which differs from the source's own at most in the head; adapters attached.

    `over` takes the place of the weights it names and of their adapters.
    """
    if source.kind == "adapter":
        assert source.base is not None
        pairs = adapter.read_adapter(source.path, source.arch)
        scale = adapter.read_adapter_config(source.path).scale
        flat = _load(source.base, arch, placer, dtype, over)
        kept = {path: tuple(map(_of_array, ab)) for path, ab in pairs.items() if path not in over}
        return _attach(flat, kept, scale, placer, dtype)
    if source.kind == "run":
        assert source.base is not None
        return _load_run(source, source.base, arch, placer, dtype, over)
    leaves: dict[str, _Pending] = dict(over)
    wanted = _paths(arch)
    if any(path not in over for path in wanted):
        stored = architecture_from_hf(source.config)
        for path, leaf in match(open_tensors(source), stored, str(source.path)).items():
            if path in wanted:
                cheap = all(tensor.mapped for tensor in leaf.tensors)
                leaves.setdefault(path, _Pending(leaf.shape, leaf.tensors[0].dtype, leaf.read, cheap))
    flat = {}
    total = sum(leaf.nbytes for leaf in leaves.values())
    with bytes_bar(f"loading {source.name}", total) as advance:
        for path in sorted(leaves, key=lambda p: -leaves[p].nbytes):
            flat[path] = _place(path, leaves[path], placer, dtype)
            advance(leaves[path].nbytes)
    return flat


def _load_run(
    source: Source, base: Source, arch: Architecture, placer: Placer, dtype: Any, over: Mapping[str, _Pending]
) -> dict[str, Any]:
    saved = {path: _of_saved(array) for path, array in run.open_params(source.path).items()}
    shapes, pairs, weights = _paths(source.arch), {}, {}
    for path, leaf in saved.items():
        owner, _, part = path.rpartition("/")
        if owner in shapes and part in ("a", "b") and f"{owner}/a" in saved and f"{owner}/b" in saved:
            pairs[owner] = (saved[f"{owner}/a"], saved[f"{owner}/b"])
        elif owner in shapes and part == "base":
            weights[owner] = leaf
        else:
            weights[path] = leaf
    wrong = [path for path, leaf in weights.items() if shapes.get(path) != leaf.shape]
    if wrong:
        raise UsageError(
            f"{source.path}: the checkpoint does not fit the model {base.name} named in {run.CONFIG}: "
            + ", ".join(f"{p} {list(weights[p].shape)} instead of {list(shapes.get(p, ()))}" for p in wrong[:8])
        )
    weights = {path: leaf for path, leaf in weights.items() if path in _paths(arch)}
    flat = _load(base, arch, placer, dtype, {**weights, **over})
    pairs = {path: ab for path, ab in pairs.items() if path not in over}
    if not pairs:
        return flat
    tune = run.read_run_config(source.path).get("tune") or {}
    from model.lora import scale_of

    scale = scale_of(tune.get("r", 16), tune.get("lora_alpha", 32.0), tune.get("use_rslora", False))
    return _attach(flat, pairs, scale, placer, dtype)


def _attach(flat: dict[str, Any], pairs: Mapping[str, Any], scale: float, placer: Placer, dtype: Any) -> dict[str, Any]:
    for path, (a, b) in pairs.items():
        a, b = _place(f"{path}/a", a, placer, dtype), _place(f"{path}/b", b, placer, dtype)
        flat[path] = Lora(flat[path], a, b, scale)
    return flat


def _place(path: str, leaf: _Pending, placer: Placer, dtype: Any) -> jax.Array:
    kind = jax.dtypes.canonicalize_dtype(np.dtype(dtype or leaf.dtype))
    whole: list[np.ndarray] = []

    def read(index: Index) -> np.ndarray:
        """Asked once per device: what can only be read as a whole is kept until the leaf is placed."""
        parts = [range(*cut.indices(n)) for cut, n in zip(index, leaf.shape, strict=False)]
        if leaf.cheap or all(len(part) == n for part, n in zip(parts, leaf.shape, strict=False)):
            return leaf.read(index, kind)
        if not whole:
            whole.append(leaf.read((), kind))
        return whole[0][index]

    return placer(path, leaf.shape, kind, read)


def place_on_default_device(path: str, shape: tuple[int, ...], dtype: Any, read: Read) -> jax.Array:
    """The whole leaf on the first device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.make_array_from_callback(shape, sharding, lambda index: read(index or ()), dtype=dtype)


def _paths(arch: Architecture) -> dict[str, tuple[int, ...]]:
    from convert.tables import rows

    return {row.ours: row.shape(arch) for row in rows(arch)}


def _of_array(array: np.ndarray) -> _Pending:
    return _Pending(array.shape, array.dtype, lambda index, dtype: np.asarray(array[index], dtype, order="C"), True)


def _of_saved(saved: run.Saved) -> _Pending:
    return _Pending(saved.shape, saved.dtype, lambda index, dtype: np.asarray(saved.read()[index], dtype, order="C"))
