"""Paths into a parameter tree: flatten, select by pattern with a coverage check, split and join, count, diff."""

import fnmatch
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from configs.errors import UsageError

Tree = Any


def path_string(path: tuple[Any, ...]) -> str:
    """A jax key path as 'layers/attn/q/weight'; fields of a weight node add their name ('.../weight/a')."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def flatten(tree: Tree) -> dict[str, Any]:
    """{path: leaf} of every leaf, in tree order."""
    return {path_string(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def unflatten(flat: dict[str, Any], like: Tree) -> Tree:
    """The tree of `like`'s structure with the leaves of `flat`; raises KeyError for a missing path."""
    return jax.tree_util.tree_map_with_path(lambda path, _: flat[path_string(path)], like)


def select(paths: Iterable[str], patterns: Iterable[str], key: str) -> set[str]:
    """The paths matched by any shell-style pattern; a pattern that matches nothing is an error naming `key`."""
    paths, chosen = list(paths), set()
    for pattern in patterns:
        hits = {p for p in paths if fnmatch.fnmatchcase(p, pattern)}
        if not hits:
            raise UsageError(f"{key}: pattern '{pattern}' matches no weight; weights: {', '.join(sorted(paths))}")
        chosen |= hits
    return chosen


def split(tree: Tree, keep: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """(trainable, frozen): the same structure twice, with None where the other one has the leaf.

    {'q': Lora(w, a, b)} with keep = path ends in a or b  ->  {'q': Lora(None, a, b)}, {'q': Lora(w, None, None)}
    """
    kept = jax.tree_util.tree_map_with_path(lambda p, x: x if keep(path_string(p)) else None, tree)
    rest = jax.tree_util.tree_map_with_path(lambda p, x: None if keep(path_string(p)) else x, tree)
    return kept, rest


def join(a: Tree, b: Tree) -> Tree:
    """The inverse of split."""
    return jax.tree.map(lambda x, y: y if x is None else x, a, b, is_leaf=lambda x: x is None)


def count(tree: Tree) -> int:
    """Number of elements in all leaves."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def diff(a: dict[str, Any], b: dict[str, Any], names: tuple[str, str] = ("saved", "expected")) -> list[str]:
    """Readable differences of shape, dtype and presence between two {path: array} dicts."""
    lines = [f"only in {names[0]}: {p} {tuple(a[p].shape)}" for p in a if p not in b]
    lines += [f"only in {names[1]}: {p} {tuple(b[p].shape)}" for p in b if p not in a]
    for p in (p for p in a if p in b):
        left, right = (f"{tuple(t[p].shape)} {np.dtype(t[p].dtype).name}" for t in (a, b))
        if left != right:
            lines.append(f"{p}: {left} in {names[0]}, {right} in {names[1]}")
    return lines
