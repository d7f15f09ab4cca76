"""YAML in and out: YAML 1.2's scalars, line numbers kept, duplicate keys refused."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from configs.errors import UsageError

KeyPath = tuple[str, ...]

# YAML 1.1, PyYAML's dialect, reads 1e-4 as text, `no` as false and 1:30 as 90: recipes use YAML 1.2's core schema.
_INT = re.compile(r"^[-+]?[0-9][0-9_]*$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9][0-9_]*\.?[0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_SCALARS = (
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", _INT, list("-+0123456789")),
    ("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789")),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either dialect would not read back as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> ScalarNode:
    # PyYAML writes Unicode's other line breaks bare and reads them back as spaces; in double quotes it escapes them.
    style = '"' if any(c in text for c in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


@dataclass(frozen=True)
class Place:
    """Where a value was written: a file and line, or the command line."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


COMMAND_LINE = Place("command line")
Places = dict[KeyPath, Place]


def read(path: Path) -> tuple[dict[str, Any], Places]:
    """The mapping in a YAML file, and the place of each key."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}): is it a YAML recipe?"
        ) from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    value, places = parse(text, Place(str(path)))
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise UsageError(
            f"{path}: a recipe is a YAML mapping of sections (model:, data:, ...), this file holds {show(value)}"
        )
    return value, places


def parse(text: str, origin: Place) -> tuple[Any, Places]:
    """The value of a YAML text, and the place of each key."""
    places: Places = {}
    try:
        node = _compose(text)
        value = None if node is None else _construct(node, (), origin, places, ())
    except yaml.MarkedYAMLError as error:
        line = origin.line if error.problem_mark is None or origin == COMMAND_LINE else error.problem_mark.line + 1
        problem = " ".join(filter(None, (error.context, error.problem)))
        raise UsageError(f"{Place(origin.file, line)}: not valid YAML: {problem}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UsageError(f"{origin}: nested too deeply") from None
    return value, places


def _compose(text: str) -> Node | None:
    loader = _Loader(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def _construct(node: Node, path: KeyPath, origin: Place, places: Places, above: tuple[Node, ...]) -> Any:
    here = origin if origin == COMMAND_LINE else Place(origin.file, node.start_mark.line + 1)
    if any(node is outer for outer in above):
        raise UsageError(f"{here}: an anchor that contains itself")
    if isinstance(node, ScalarNode):
        return _scalar(node, here)
    if isinstance(node, SequenceNode):
        return [_construct(item, (*path, str(i)), origin, places, (*above, node)) for i, item in enumerate(node.value)]
    assert isinstance(node, MappingNode)
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        place = origin if origin == COMMAND_LINE else Place(origin.file, key_node.start_mark.line + 1)
        if not isinstance(key_node, ScalarNode):
            raise UsageError(f"{place}: a key must be a plain name, not a list or a mapping")
        key = key_node.value
        if key in mapping:
            first = places[(*path, key)].line
            raise UsageError(
                f"{place}: '{'.'.join((*path, key))}' is given twice"
                + (f", first in line {first}: keep one of them" if first else ": keep one of them")
            )
        places[(*path, key)] = place
        mapping[key] = _construct(value_node, (*path, key), origin, places, (*above, node))
    return mapping


def _scalar(node: ScalarNode, here: Place) -> Any:
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    try:
        match kind:
            case "null":
                return None
            case "bool":
                return node.value.lower() == "true"
            case "int":
                return int(node.value)
            case "float":
                return float(node.value.lower().replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
            case "str":
                return node.value
    except ValueError:
        raise UsageError(f"{here}: {show(node.value)} is not a number that can be read") from None
    raise UsageError(f"{here}: the tag '{node.tag}' is not supported: recipes hold text, numbers, lists and mappings")


def write(value: Any) -> str:
    """A value as YAML that `parse` reads back to the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def show(value: Any, limit: int = 80) -> str:
    """A value for an error message: as YAML writes it, on one line, cut when long."""
    if isinstance(value, str):
        text = repr(value)
    else:
        text = yaml.dump(
            value, Dumper=_Dumper, sort_keys=False, default_flow_style=True, allow_unicode=True, width=10**9
        )
        text = text.removesuffix("\n").removesuffix("\n...").strip()
    return text if len(text) <= limit else text[: limit - 3] + "..."
