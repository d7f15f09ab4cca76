"""The shape of the code, enforced: who imports whom, sizes, names, packages. DESIGN.md, 'Floors'."""

import ast
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {"configs": 1, "data": 2, "sharding": 2, "model": 3, "convert": 4, "decode": 5, "train": 6}
# Slow to import: inside functions in data/ (host side, no jax in our files) and in the command line's first file.
HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "transformers", "torch", "pyarrow"}
FILES = sorted(path for package in FLOORS for path in (ROOT / package).rglob("*.py"))
FILE_LINES, FUNCTION_LINES = 400, 80

each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def package(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def modules(node: ast.stmt | ast.AST) -> list[str]:
    """The dotted modules that one import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []


def imports(path: Path) -> list[str]:
    return [name for node in ast.walk(tree(path)) for name in modules(node)]


def at_import_time(node: ast.AST) -> list[str]:
    """Modules imported when the file is: everything but what functions import, and what only type checkers see."""
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        found += modules(child) + at_import_time(child)
    return found


def test_there_is_something_to_check():
    assert len(FILES) > 10


@each_file
def test_imports_only_downwards(path):
    ours = FLOORS[package(path)]
    for name in imports(path):
        other = name.partition(".")[0]
        if other in FLOORS and other != package(path):
            assert FLOORS[other] < ours, f"{package(path)} (floor {ours}) imports {name} (floor {FLOORS[other]})"
        assert other != "tests", f"{name} is not installed"


@each_file
def test_no_circle_inside_a_package(path):
    """Files of one package import each other at the top without a way back."""
    me = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    seen, todo = set(), [path]
    while todo:
        for name in at_import_time(tree(todo.pop())):
            target = ROOT.joinpath(*name.split(".")).with_suffix(".py")
            assert name != me, f"{me} imports itself by way of {sorted(seen)}"
            if name.partition(".")[0] == package(path) and name not in seen and target.is_file():
                seen.add(name)
                todo.append(target)


@each_file
def test_imports_are_absolute_and_say_the_file(path):
    for node in ast.walk(tree(path)):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"line {node.lineno}: relative import"
        if isinstance(node, ast.Import):
            bare = [alias.name for alias in node.names if alias.name.partition(".")[0] in FLOORS]
            assert not bare, f"line {node.lineno}: import {bare[0]}; write `from {bare[0]}.file import name`"
        if isinstance(node, ast.ImportFrom) and node.module == "jax":
            # With a folder called sharding beside it, the bare name would read as ours.
            names = [alias.name for alias in node.names]
            assert "sharding" not in names, f"line {node.lineno}: write `from jax.sharding import ...`"


@each_file
def test_heavy_modules_stay_out(path):
    names = {name.partition(".")[0] for name in imports(path)}
    assert "torch" not in names, "torch is an oracle of the tests, never a dependency"
    where = path.relative_to(ROOT).as_posix()
    if package(path) == "data":
        assert not names & {"jax", "jaxlib", "flax"}, "data/ is host side: numpy only"
    if package(path) in ("configs", "data") or where == "train/cli.py":
        top = {name.partition(".")[0] for name in at_import_time(tree(path))}
        assert not top & HEAVY, f"import {', '.join(top & HEAVY)} inside the function that needs it"


@each_file
def test_no_work_at_import_time(path):
    """The top of a file holds imports, definitions and constants (a `for` may register something)."""
    for node in tree(path).body:
        assert not isinstance(node, ast.While | ast.With), f"line {node.lineno}: work at import time"


@each_file
def test_sizes(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= FILE_LINES, f"{lines} lines, at most {FILE_LINES}: split it"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= FUNCTION_LINES, f"{node.name}: {length} lines, at most {FUNCTION_LINES}"


@each_file
def test_names_and_docstrings(path):
    assert path.stem not in ("utils", "util", "helpers", "common", "misc"), "name what it holds"
    if path.stem != "__init__" or path.parent.name in FLOORS:
        assert ast.get_docstring(tree(path)), "a file opens with a docstring of a line"
    for node in tree(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"line {node.lineno}: public {node.name} has no docstring"


def test_packages_are_the_folders():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {p.parent.relative_to(ROOT).as_posix().replace("/", ".") for p in FILES if p.name == "__init__.py"}
    with_code = {p.parent.relative_to(ROOT).as_posix().replace("/", ".") for p in FILES}
    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(folders) == sorted(with_code)


def test_package_names_do_not_hide_the_standard_library():
    assert not set(FLOORS) & sys.stdlib_module_names
