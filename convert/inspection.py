"""What a MODEL is, told from its configs and headers: no weights are read."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.errors import RunError, UsageError
from convert import gguf, hf, hub, names
from convert.conversion import tokenizer_of
from convert.load import TOKENIZERS, open_tensors, resolve
from convert.source import Source
from convert.tables import match, rows
from convert.tensors import Tensor
from data.tokenizer import FastCodec, Tokenizer, load_tokenizer
from model.architecture import Architecture, Rope

BYTES = {"float32": 4, "bfloat16": 2}
ADAMW = 16  # bytes a parameter: float32 weights, gradients, two moments
# Shown by themselves; what else an Architecture has that is not the default is listed by name.
SHOWN = {
    "vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_ff", "max_position", "rope",
    "windows", "local_rope", "init_std", "family", "rotated", "experts", "dense_layers",
}  # fmt: skip


def inspect(model: str) -> dict[str, Any]:
    """Everything that `purestep inspect` prints, as plain data; `problems` says what is not supported and why.

    UsageError where the MODEL does not exist at all.
    """
    told: dict[str, Any] = {"model": model, "problems": []}
    try:
        source = resolve(model, weights=False)
    except UsageError as error:
        if (folder := _readable(model)) is None:
            raise
        told["problems"].append(str(error))
        return told | _of_refused(folder, told["problems"])
    told |= {"kind": source.kind, "path": str(source.path), **_chain(source)}
    told |= {"family": source.config.get("model_type"), "architectures": source.config.get("architectures")}
    told |= _of_architecture(source.arch)
    told |= _of_tensors(source, told["problems"])
    told |= _of_tokenizer(lambda: tokenizer_of(source), told["problems"])
    return told


def _chain(source: Source) -> dict[str, Any]:
    return {"base": source.base.name, **_chain(source.base)} if source.base and source.base.base is None else {}


def _readable(model: str) -> Path | None:
    """A folder or GGUF file that is there, though it was refused."""
    path = names.fetch(model) if model in names.MODELS else Path(model).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        return path
    if path.is_file() and path.open("rb").read(4) == b"GGUF":
        return path
    if not path.exists() and hub.is_hub_id(model):
        try:
            return hub.fetch(model, weights=False)
        except (RunError, UsageError):
            return None
    return None


def _of_refused(path: Path, problems: list[str]) -> dict[str, Any]:
    """What the files of a model say that this program does not read."""
    told: dict[str, Any] = {"path": str(path)}
    if path.is_file():
        try:
            file = gguf.open_gguf(path)
        except UsageError:
            return told
        short = {k: v for k, v in file.metadata.items() if not isinstance(v, list) and len(str(v)) < 200}
        return told | {"kind": "gguf", "family": file.metadata.get("general.architecture"), "config": short}
    try:
        config = hf.read_json(path / "config.json")
    except UsageError:
        return told
    told |= {"kind": "hf", "family": config.get("model_type"), "architectures": config.get("architectures")}
    told["config"] = config
    try:
        told |= _of_files(path) | _headers(hf.open_folder(path))
    except UsageError as error:
        problems.append(str(error))
    if any((path / name).is_file() for name in TOKENIZERS):
        told |= _of_tokenizer(lambda: load_tokenizer(path), problems)
    return told


def _of_architecture(arch: Architecture) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    for row in rows(arch):
        counts[_part(row.ours)] += math.prod(row.shape(arch))
    total = sum(counts.values())
    defaults = {f.name: f.default for f in dataclasses.fields(arch) if f.default is not dataclasses.MISSING}
    more = {n: _plain(getattr(arch, n)) for n in defaults if n not in SHOWN and getattr(arch, n) != defaults[n]}
    heads = 2 * arch.num_kv_heads * arch.head_dim if arch.latent is None else arch.latent.rank + arch.latent.rope_dim
    cache = heads * arch.num_layers * 1000 * arch.causal  # an encoder has none
    if arch.experts is not None:  # of these each token uses top_k
        counts["used by a token"] = (
            total - counts["experts"] * (arch.experts.count - arch.experts.top_k) // arch.experts.count
        )
    return {
        "context": arch.max_position,
        "vocabulary": arch.vocab_size,
        "width": arch.d_model,
        "layers": list(_layers(arch)),
        "settings": more,
        "parameters": {"total": total, **counts},
        "memory": {
            "weights": {name: total * size for name, size in BYTES.items()},
            "cache_per_1000_tokens": {name: cache * size for name, size in BYTES.items()},
            "training_adamw": total * ADAMW,
        },
    }


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _part(path: str) -> str:
    """Which part of the model a weight belongs to."""
    if "norm" in path:
        return "norms"
    named = {"/attn/": "attention", "/experts/": "experts", "/mlp/": "mlp"}
    return next((part for mark, part in named.items() if mark in path), path.partition("/")[0])


def _layers(arch: Architecture) -> Iterator[dict[str, Any]]:
    """The kinds of layers, each with the numbers of its layers."""
    every = range(arch.num_layers)
    windows, rotated = arch.windows or (0,) * len(every), arch.rotated or (not arch.learned_positions,) * len(every)
    mixed = [arch.experts is not None and i >= arch.dense_layers for i in every]
    kinds = list(zip(windows, rotated, mixed, strict=True))
    for kind in dict.fromkeys(kinds):
        window, turns, mixture = kind
        yield {
            "layers": [i for i in every if kinds[i] == kind],
            "heads": arch.num_heads,
            "kv_heads": arch.num_kv_heads,
            "head_dim": arch.head_dim,
            "ffn": arch.d_ff,
            "experts": _plain(arch.experts) if mixture else None,
            "window": window or None,
            "rope": _rope(arch.local_rope if window and arch.local_rope else arch.rope) if turns else None,
        }


def _rope(rope: Rope) -> dict[str, Any]:
    default = Rope()
    own = {f.name: getattr(rope, f.name) for f in dataclasses.fields(rope)}
    return {"theta": rope.theta} | {n: v for n, v in own.items() if n != "theta" and v != getattr(default, n)}


def _of_tensors(source: Source, problems: list[str]) -> dict[str, Any]:
    """Files and what their headers say; a run's checkpoint is not opened."""
    if source.kind == "adapter":
        from convert.adapter import WEIGHTS

        path = source.path / WEIGHTS
        return _files([path] if path.is_file() else [])
    if source.kind not in ("hf", "gguf"):
        return {}
    found = _of_files(source.path)
    if not found["files"] and not any(p.suffix in hf.PICKLES for p in source.path.iterdir()):
        return found  # of a hub id only the configs are here
    try:
        tensors = open_tensors(source)
        match(tensors, source.arch, str(source.path))
        return found | _headers(tensors)
    except UsageError as error:
        problems.append(str(error))
        return found


def _headers(tensors: dict[str, Tensor]) -> dict[str, Any]:
    kinds = Counter(t.stored for t in tensors.values())
    return {"tensors": len(tensors), "dtypes": dict(kinds)}


def _of_files(path: Path) -> dict[str, Any]:
    return _files(sorted(path.glob("*.safetensors")) if path.is_dir() else [path])


def _files(paths: list[Path]) -> dict[str, Any]:
    return {"files": {p.name: p.stat().st_size for p in paths}}


def _of_tokenizer(load: Any, problems: list[str]) -> dict[str, Any]:
    try:
        tokenizer: Tokenizer | None = load()
    except UsageError as error:
        problems.append(str(error))
        return {}
    if tokenizer is None:
        return {"tokenizer": None}
    text = tokenizer.chat_template
    return {
        "tokenizer": {
            "kind": _kind(tokenizer),
            "size": tokenizer.vocab_size,
            "special": dict(sorted(tokenizer.special_tokens.items(), key=lambda pair: pair[1])),
            "named": tokenizer.named,
            "bos": tokenizer.bos_id,
            "eos": list(tokenizer.eos_ids),
            "pad": tokenizer.pad_id,
            "prefix": tokenizer.prefix,
            "suffix": tokenizer.suffix,
        },
        "chat_template": text,
    }


def _kind(tokenizer: Tokenizer) -> str:
    if not isinstance(tokenizer.codec, FastCodec):
        return "sentencepiece"
    model, decoder = tokenizer.codec.backend.model, str(tokenizer.codec.backend.decoder)
    if "ByteLevel" in decoder:
        return f"{type(model).__name__}, bytes"
    return f"{type(model).__name__}{', byte fallback' if getattr(model, 'byte_fallback', False) else ''}"


def render(told: dict[str, Any], template: bool = False) -> str:
    """The same as text."""
    lines = [f"{told['model']}: {told.get('kind', '?')}, {told.get('path', '')}"]
    if "base" in told:
        lines.append(f"base        {told['base']}")
    lines.append(f"family      {told.get('family')} ({', '.join(told.get('architectures') or ('no architectures',))})")
    if "parameters" in told:
        lines += _render_architecture(told)
    for key, value in sorted(told.get("config", {}).items()):
        lines.append(f"  {key} = {value}")
    if files := told.get("files"):
        listed = ", ".join(f"{name} {_bytes(size)}" for name, size in list(files.items())[:8])
        lines.append(f"files       {listed}{f' and {len(files) - 8} more' if len(files) > 8 else ''}")
    if "tensors" in told:
        kinds = ", ".join(f"{n} {kind}" for kind, n in told["dtypes"].items())
        lines.append(f"tensors     {told['tensors']}: {kinds}")
    if "tokenizer" in told:
        lines += _render_tokenizer(told, template)
    lines += [f"NOT SUPPORTED: {problem}" for problem in told["problems"]]
    return "\n".join(lines)


def _render_architecture(told: dict[str, Any]) -> list[str]:
    counts, memory = dict(told["parameters"]), told["memory"]
    total = counts.pop("total")
    parts = ", ".join(f"{name} {n:,}" for name, n in counts.items())
    lines = [
        f"parameters  {total:,}: {parts}",
        f"context     {told['context']:,} tokens; vocabulary {told['vocabulary']:,}; width {told['width']:,}",
    ]
    lines += [f"layers      {_render_layers(kind)}" for kind in told["layers"]]
    if told["settings"]:
        lines.append("settings    " + ", ".join(f"{name} {value}" for name, value in told["settings"].items()))
    weights, cache = ({k: _bytes(v) for k, v in memory[name].items()} for name in ("weights", "cache_per_1000_tokens"))
    lines += [
        f"memory      weights {', '.join(f'{v} {k}' for k, v in weights.items())}; training all of them with AdamW "
        f"{_bytes(memory['training_adamw'])}, activations apart",
        f"            cache of 1000 tokens {', '.join(f'{v} {k}' for k, v in cache.items())}",
    ]
    return lines


def _render_layers(kind: dict[str, Any]) -> str:
    ffn, experts = f"ffn {kind['ffn']}", kind["experts"]
    if experts:
        shared = f" and always one of {experts['shared_d_ff']}" if experts["shared_d_ff"] else ""
        ffn = f"{experts['count']} experts of {experts['d_ff']}, {experts['top_k']} for each token{shared}"
    rope = ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in (kind["rope"] or {"none": ""}).items()
    )
    window = f"window {kind['window']}" if kind["window"] else "sees everything"
    heads = f"{kind['heads']} heads, {kind['kv_heads']} of keys and values, of {kind['head_dim']}"
    return f"{_ranges(kind['layers'])}: {heads}; {ffn}; {window}; rope {rope}".rstrip()


def _render_tokenizer(told: dict[str, Any], template: bool) -> list[str]:
    one = told["tokenizer"]
    if one is None:
        return ["tokenizer   none"]
    special = list(one["special"].items())
    shown = ", ".join(f"{index} {token}" for token, index in special[:12])
    around = f"; put around text: {one['prefix']} ... {one['suffix']}" if one["prefix"] or one["suffix"] else ""
    lines = [
        f"tokenizer   {one['kind']}, {one['size']:,} tokens; begin {one['bos']}, end {one['eos']}, pad {one['pad']}"
        + around,
        f"special     {shown}{f' and {len(special) - 12} more' if len(special) > 12 else ''}",
    ]
    text = told["chat_template"]
    if not text:
        return [*lines, "template    none: messages cannot be rendered"]
    if not template:
        many = f"{len(text)} templates: {', '.join(text)}" if isinstance(text, dict) else f"{len(text)} characters"
        return [*lines, f"template    {many} (--template prints it)"]
    texts = text if isinstance(text, dict) else {"template": text}
    return [*lines, *(f"--- {name}\n{one}" for name, one in texts.items())]


def _ranges(numbers: list[int]) -> str:
    """'0-4, 6-10' of sorted numbers."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _bytes(n: int) -> str:
    """A size that a person reads at a glance."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n} B"
