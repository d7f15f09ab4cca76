"""Recipes: YAML with inheritance and dotted overrides -> a validated Run, and back."""

import difflib
import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs.errors import UsageError
from configs.explain import refusal, unknown_key
from configs.schema import SECTIONS, Run
from configs.source import COMMAND_LINE, Place, Places, parse, read, show, write

RECIPES = Path(__file__).resolve().parent / "recipes"

# Two names for one quantity: the layer that gives one of them replaces whatever a lower layer said with either.
EXCLUSIVE = (("train", ("steps", "epochs")), ("optim", ("warmup_steps", "warmup_ratio")))
# Values that name files: relative to the recipe that says so, else to the working directory.
PATHS = (
    ("data", "train"), ("data", "eval"), ("data", "chat_template"), ("tune", "init_adapter"), ("sample", "reward"),
    ("log", "samples"), ("model", "tokenizer"),
)  # fmt: skip


@dataclass(frozen=True)
class _Layer:
    values: dict[str, Any]
    places: Places


def load(recipe: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Run:
    """The run that a recipe describes: a path, a run folder or a shipped recipe's name; overrides are `key=value`."""
    path = find(recipe)
    layers = [*_layers(path, ()), _from_overrides(overrides)]
    merged = _Layer({}, {})
    for layer in layers:
        merged = _merge(merged, _displace(merged, layer))
    name = path.parent.name if path.name == "config.yaml" else path.stem
    values = {"output": f"runs/{name}", "model": {}, "data": {}, **merged.values}
    try:
        return Run.model_validate(values)
    except ValidationError as error:
        raise UsageError(refusal(error, values, merged.places)) from None


def dump(run: Run) -> str:
    """The resolved config as YAML; `load` of it gives an equal run."""
    return write(run.model_dump(mode="json"))


def diff(a: Run, b: Run) -> list[str]:
    """One line for each knob that differs: 'optim.learning_rate: 0.001 -> 0.0001'."""
    old, new = flatten(a), flatten(b)
    return [f"{key}: {show(old[key])} -> {show(new[key])}" for key in old if old[key] != new[key]]


def flatten(run: Run) -> dict[str, Any]:
    """{dotted name: value} of every knob."""
    flat: dict[str, Any] = {}
    for name, value in run.model_dump(mode="json").items():
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if name in SECTIONS else {name: value}
    return flat


def shipped() -> dict[str, Path]:
    """{name: path} of the recipes that come with purestep."""
    return {p.relative_to(RECIPES).with_suffix("").as_posix(): p for p in sorted(RECIPES.rglob("*.yaml"))}


def find(recipe: str | os.PathLike[str], folder: Path | None = None, said: str = "") -> Path:
    """The file of a recipe; raises UsageError naming the nearest one and those that are shipped."""
    given = os.path.expanduser(os.fspath(recipe))
    path = Path(os.path.join(folder, given)) if folder else Path(given)
    if os.path.isfile(path):
        return path
    if os.path.isfile(path / "config.yaml"):  # a run folder
        return path / "config.yaml"
    ours = shipped()
    name = given.removesuffix(".yaml")
    if name in ours:
        return ours[name]
    beside = [*path.parent.glob("*.yaml"), *path.parent.glob("*.yml")] if os.path.isdir(path.parent) else []
    meant = {**{p.stem: str(p) for p in beside}, **{n.rpartition("/")[2]: n for n in ours}}
    close = difflib.get_close_matches(Path(name).name, meant, n=1, cutoff=0.5)
    hint = f"; the nearest is '{meant[close[0]]}'" if close else ""
    problem = "is a folder without config.yaml" if os.path.isdir(path) else "does not exist"
    raise UsageError(f"{said}recipe '{given}' {problem}{hint}; shipped recipes: {', '.join(ours)}")


def _layers(path: Path, above: tuple[Path, ...]) -> list[_Layer]:
    """The file's own layer, after those of its bases."""
    real = path.resolve()
    if real in above:
        chain = " -> ".join(str(p) for p in (*above[above.index(real) :], real))
        raise UsageError(f"base recipes form a circle: {chain}")
    values, places = read(path)
    base = values.pop("base", None)
    place = places.pop(("base",), Place(str(path)))
    bases = [base] if isinstance(base, str) else [] if base is None else base
    if not isinstance(bases, list) or not all(isinstance(b, str) and b for b in bases):
        raise UsageError(
            f"{place}: base is {show(base)}, allowed: the path of a recipe, a shipped recipe's name, or a list"
        )
    layers = []
    for one in bases:
        layers += _layers(find(one, path.parent, f"{place}: base: "), (*above, real))
    layer = _checked(values, places, Place(str(path)))
    return [*layers, _Layer(_locate(layer.values, (str(path.parent), os.curdir)), layer.places)]


def _from_overrides(overrides: Sequence[str]) -> _Layer:
    merged = _Layer({}, {})
    for text in overrides:
        key, equals, raw = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UsageError(
                f"command line: '{text}' is not an override, allowed: key=value, as optim.learning_rate=1e-4"
            )
        parts = tuple(key.split("."))
        if parts[0] == "base":
            raise UsageError("command line: base is said in a recipe: write a file with base: and your changes")
        try:
            value, inner = parse(raw, COMMAND_LINE)
        except UsageError as error:
            raise UsageError(f"{error}, in {show(text)}") from None
        places = {parts[: i + 1]: COMMAND_LINE for i in range(len(parts))} | {(*parts, *p): w for p, w in inner.items()}
        for part in reversed(parts):
            value = {part: value}
        layer = _checked(value, places, COMMAND_LINE)
        merged = _merge(merged, _Layer(_locate(layer.values, (os.curdir,)), places))
    return merged


def _checked(values: dict[str, Any], places: Places, origin: Place) -> _Layer:
    """The layer with empty sections dropped; an unknown key or a section that is no mapping is an error."""
    sections: dict[str, Any] = {}
    for name, value in values.items():
        place = places.get((name,), origin)
        if name not in Run.model_fields:
            raise UsageError(
                unknown_key(name if "." in name or not isinstance(value, dict) else _longest(name, value), place)
            )
        if name not in SECTIONS:
            sections[name] = value
            continue
        if value is None:
            continue
        if name == "mesh" and value == "auto":
            value = {"auto": True}
        if not isinstance(value, dict):
            known = ", ".join(SECTIONS[name].model_fields)
            raise UsageError(f"{place}: '{name}' is a section, given {show(value)}, allowed: a mapping of {known}")
        for key in value:
            if key not in SECTIONS[name].model_fields:
                raise UsageError(unknown_key(f"{name}.{key}", places.get((name, key), place)))
        sections[name] = value
    return _Layer(sections, places)


def _longest(name: str, value: dict[str, Any]) -> str:
    """The full dotted key under an unknown section, when there is only one way down."""
    while isinstance(value, dict) and len(value) == 1:
        ((key, value),) = value.items()
        name = f"{name}.{key}"
    return name


def _displace(under: _Layer, over: _Layer) -> _Layer:
    """`over`, silencing with null what `under` says with the other name of a quantity that `over` gives."""
    values = dict(over.values)
    for section, names in EXCLUSIVE:
        mine, theirs = values.get(section, {}), under.values.get(section, {})
        for name in names:
            others = [n for n in names if n != name and n not in mine and n in theirs]
            if mine.get(name) is not None and others:
                defaults = SECTIONS[section].model_fields
                values[section] = {**values[section], **{n: defaults[n].default for n in others}}
    return _Layer(values, over.places)


def _merge(under: _Layer, over: _Layer) -> _Layer:
    return _Layer(_deep(under.values, over.values), under.places | over.places)


def _deep(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _deep(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged


def _locate(values: dict[str, Any], folders: Sequence[str]) -> dict[str, Any]:
    """Files that exist are recorded by absolute path; the others stay as written, for the data's own error."""
    located = dict(values)
    for section, key in PATHS:
        given = located.get(section, {}).get(key)
        if isinstance(given, str):
            located[section] = {**located[section], key: _absolute(given, folders)}
        elif isinstance(given, list):
            found = [_absolute(item, folders) if isinstance(item, str) else item for item in given]
            located[section] = {**located[section], key: found}
    return located


def _absolute(given: str, folders: Sequence[str]) -> str:
    if not given or "{" in given or "\n" in given:  # a template's text
        return given
    module, colon, function = given.rpartition(":")
    if colon and (module.isidentifier() or module.endswith(".py")):  # code beside the recipe: its file
        file = _absolute(f"{module.removesuffix('.py')}.py", folders)
        return f"{file}:{function}" if os.path.isabs(file) or module.endswith(".py") else given
    for folder in folders:
        path = os.path.abspath(os.path.join(folder, os.path.expanduser(given)))
        if os.path.exists(path) or ("\0" not in path and glob.has_magic(path) and glob.glob(path)):
            return path
    return given
