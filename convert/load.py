"""A MODEL, whatever it is, to its architecture, weights and tokenizer."""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.errors import UsageError
from configs.presets import presets, read_preset
from convert import adapter, gguf, gguf_families, hf, hub, mxfp4, names, run
from convert.new import make_new
from convert.progress import bytes_bar
from convert.source import Index, Placer, Read, Source
from convert.tables import match
from convert.tensors import Tensor
from convert.vocabulary import grow, growing, with_tokenizer
from data.tokenizer import Tokenizer, wrap_fast
from data.tokenizer import load_tokenizer as load
from model.architecture import Architecture
from model.families import architecture_from_hf, hf_config_from

if TYPE_CHECKING:  # jax is imported where arrays are placed: a conversion places none
    import jax

NESTING = 8  # adapters on runs on adapters ...: more is a circle
TOKENIZERS = ("tokenizer.json", "tokenizer.model")


def resolve(model: str | Path, depth: int = 0, weights: bool = True) -> Source:
    """The Source that a MODEL means: a short name, a path (HF folder, GGUF, run, adapter), or a hub id, in that order.

    Downloads where it must (weights: those of a hub id, too), reads headers and configs only. UsageError for what is
    wrong or unsupported, RunError for a download that fails.
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
            return _from_folder(name, hub.fetch(name, weights), depth)
        except UsageError as error:
            raise UsageError(f"{error}{_nearest(path)}") from error
    if name in presets():
        raise UsageError(
            f"MODEL '{name}' is a preset, an architecture without weights: train it with model.init=random"
        )
    raise UsageError(f"MODEL '{name}' does not exist{_nearest(path)}. {_allowed()}")


def open_start(model: Mapping[str, Any], seed: int) -> Source:
    """The model that a run starts from, as its section `model` says: a MODEL, perhaps with another tokenizer or more
    tokens; or, with init=random, a new one of the source's architecture."""
    name, words, grows = model["source"], model.get("tokenizer"), bool(model.get("resize_vocab"))
    if model.get("init") != "random":
        return _changed(resolve(name), words and open_tokenizer(words), grows)
    config, own = _config_of(name)
    if words is None and own is None:
        raise UsageError(
            f"model.source={name} is a preset, which has no tokenizer: say whose to use with model.tokenizer=a folder, "
            "a hub id or any MODEL"
        )
    try:
        tokenizer = open_tokenizer(words or own or "")
    except UsageError as error:
        key = f"model.tokenizer: {error}" if words else f"{error}; say another's with model.tokenizer"
        raise UsageError(key) from error
    return make_new(name, config, tokenizer, seed=seed, scheme=model.get("init_scheme", "scaled"), grow=grows)


def _kept_start(folder: Path, config: Mapping[str, Any], depth: int) -> Source:
    """What a run started from, by what it has kept of it: preset and tokenizer may be gone from where they were."""
    model, kept = config["model"], folder / run.START
    if model.get("init") == "random":
        seed, scheme = (config.get("train") or {}).get("seed", 0), model.get("init_scheme", "scaled")
        if not kept.is_dir():
            return open_start(model, seed)
        return make_new(str(folder), hf.read_configs(kept)[0], load(kept), seed=seed, scheme=scheme)
    base = _base(model["source"], folder, f"{folder / run.CONFIG}: model.source", depth)
    return _changed(base, load(kept) if kept.is_dir() else None, bool(model.get("resize_vocab")))


def _changed(source: Source, tokenizer: Tokenizer | None, grows: bool) -> Source:
    if tokenizer is not None:
        source = with_tokenizer(source, tokenizer)
    return grow(source, load_tokenizer(source).vocab_size) if grows else source


def _config_of(name: str) -> tuple[dict[str, Any], str | None]:
    """The config.json that a name means, a preset's first, and where a tokenizer would lie."""
    known, path = presets(), Path(name).expanduser()
    if name in known:
        return read_preset(name), None
    file = path / "config.json" if path.is_dir() else path
    if name not in names.MODELS and file.is_file() and file.suffix == ".json":
        return hf.read_json(file), str(file.parent)
    if not path.exists() and name not in names.MODELS and not hub.is_hub_id(name):
        near = difflib.get_close_matches(name.lower(), known, 1, 0.3)
        raise UsageError(
            f"model.source={name} with model.init=random is neither a preset ({', '.join(known)})"
            f"{f'; nearest: {near[0]}' if near else ''} nor anything with a config.json: a folder, that file itself, "
            "a GGUF file, a hub id or a short name"
        )
    return hf_config_from(replace(resolve(name, weights=False).arch, num_labels=0, token_labels=False)), name


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a folder or hub id, which may hold nothing else, or of any MODEL."""
    path = Path(name).expanduser()
    if name not in names.MODELS and not path.exists() and hub.is_hub_id(name):
        path = hub.fetch(name, weights=False)
    if name not in names.MODELS and any((path / file).is_file() for file in TOKENIZERS):
        return load(path)
    return load_tokenizer(resolve(name, weights=False))


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
        return _upon(base, kind="adapter", name=name, path=path)
    if (path / "config.json").is_file():
        config, generation = hf.read_configs(path)
        return Source("hf", name, path, _architecture(path / "config.json", config), config, generation)
    if run.is_run(path):
        if export := run.find_export(path):
            return _from_folder(name, export, depth + 1)
        run.newest_checkpoint(path)  # fails early when there is none
        base = _kept_start(path, run.read_run_config(path), depth)
        arch, saved = base.arch, run.open_params(path)
        if score := saved.get("score/weight"):  # trained a reward model
            arch = replace(arch, num_labels=score.shape[-1], token_labels="score/bias" in saved)
        return _upon(base, kind="run", name=name, path=path, arch=arch)
    inside = sorted(p.name for p in path.iterdir())
    if ggufs := [n for n in inside if n.endswith(".gguf")]:
        raise UsageError(f"MODEL '{name}' is a folder with GGUF files: give one of them, such as {path / ggufs[0]}")
    if any(n.endswith(hf.PICKLES) or n.endswith(".safetensors") for n in inside):
        raise UsageError(f"MODEL '{name}': {path} has weights but no config.json")
    raise UsageError(
        f"MODEL '{name}' is a folder without a config.json, adapter_config.json or config.yaml. {_allowed()}"
    )


def _upon(base: Source, **changes: Any) -> Source:
    """The source of weights that lie beside or in place of the base's."""
    return replace(base, base=base, fresh={}, tokenizer=None, **changes)


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


def load_tokenizer(source: Source) -> Tokenizer:
    """The model's tokenizer with its chat template; an adapter or run without one has its base's."""
    if source.tokenizer is not None:
        return source.tokenizer
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
    return mxfp4.unpacked(hf.open_folder(source.path))


def load_params(source: Source, placer: Placer | None = None, dtype: Any = None) -> dict[str, Any]:
    """The parameter tree, each leaf read and placed by itself, the largest first.

    placer(path, shape, dtype, read) -> array, where read(index) gives the part of the leaf that a tuple of slices
    selects; default: everything on the first device. dtype: default as stored. Adapters come attached, as Lora nodes,
    and are placed under '<path>/a' and '<path>/b'. Memory: the model in its target dtype and at most twice its
    largest leaf.
    """
    from model.transformer import nest

    return nest(_load(source, source.arch, _canonical(placer or place_on_default_device), dtype, {}))


def load_flat(source: Source, placer: Placer) -> dict[str, Any]:
    """{our path: what the placer made of the leaf}, adapters as Lora nodes of such: for weights that are not computed
    with, in the dtypes that they are stored in."""
    return _load(source, source.arch, placer, None, {})


def _canonical(placer: Placer) -> Placer:
    """The placer of arrays in a dtype that jax has: without JAX_ENABLE_X64 no float64."""
    import jax

    def place(path: str, shape: tuple[int, ...], dtype: Any, read: Read) -> Any:
        kind = jax.dtypes.canonicalize_dtype(dtype)
        return placer(path, shape, kind, lambda index: read(index).astype(kind, copy=False))

    return place


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
    wanted = _paths(arch)
    over = {path: _of_array(array) for path, array in source.fresh.items() if path in wanted} | dict(over)
    if source.kind == "grown":
        assert source.base is not None
        old = source.base.arch.vocab_size
        placer = growing(placer, old, arch.vocab_size)
        return _load(source.base, replace(arch, vocab_size=old), placer, dtype, over)
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
    from model.weights import Lora

    for path, (a, b) in pairs.items():
        a, b = _place(f"{path}/a", a, placer, dtype), _place(f"{path}/b", b, placer, dtype)
        flat[path] = Lora(flat[path], a, b, scale)
    return flat


def stored_dtype(path: str, dtype: Any) -> np.dtype[Any]:
    """What a weight is kept in: what is asked for, but float32 at least where a choice among nearly equal experts hangs
    on it."""
    kind = np.dtype(dtype)
    return np.dtype(np.float32) if path.endswith("/correction") and kind.itemsize < 4 else kind


def _place(path: str, leaf: _Pending, placer: Placer, dtype: Any) -> Any:
    kind = stored_dtype(path, dtype or leaf.dtype)
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


def place_on_default_device(path: str, shape: tuple[int, ...], dtype: Any, read: Read) -> "jax.Array":
    """The whole leaf on the first device."""
    import jax

    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.make_array_from_callback(shape, sharding, lambda index: read(index or ()), dtype=dtype)


def _paths(arch: Architecture) -> dict[str, tuple[int, ...]]:
    from convert.tables import rows

    return {row.ours: row.shape(arch) for row in rows(arch)}


def _of_array(array: np.ndarray) -> _Pending:
    return _Pending(array.shape, array.dtype, lambda index, dtype: np.asarray(array[index], dtype, order="C"), True)


def _of_saved(saved: run.Saved) -> _Pending:
    return _Pending(saved.shape, saved.dtype, lambda index, dtype: np.asarray(saved.read()[index], dtype, order="C"))
