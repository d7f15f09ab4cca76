"""LoRA as tree surgery (arXiv 2106.09685): attach, detach, merge, unmerge are functions from tree to tree."""

import fnmatch
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from configs.errors import UsageError
from model.architecture import Architecture
from model.transformer import Declared, declare
from model.tree import flatten, select
from model.weights import Lora, materialise
from sharding.place import weight_sharding
from sharding.rules import Rules

Tree = Any
DeclaredPair = tuple[Declared, Declared]  # of a and b

# PEFT's names of the linear layers -> our paths; experts are no linear layers there.
TARGETS = {
    "q_proj": "*layers/attn/q/weight",
    "k_proj": "*layers/attn/k/weight",
    "v_proj": "*layers/attn/v/weight",
    "o_proj": "*layers/attn/o/weight",
    "gate_proj": "*layers/mlp*/gate/weight",
    "up_proj": "*layers/mlp*/up/weight",
    "down_proj": "*layers/mlp*/down/weight",
    "q_a_proj": "*layers/attn/q_a/weight",
    "q_b_proj": "*layers/attn/q_b/weight",
    "kv_a_proj_with_mqa": "*layers/attn/kv_a/weight",
    "kv_b_proj": "*layers/attn/kv_b/weight",
    "shared_expert_gate": "*layers/mlp/shared_gate/weight",
}
EXPERTS = "*/experts/*"


def target_paths(paths: Sequence[str], target_modules: str | Sequence[str]) -> list[str]:
    """The weights that PEFT's target_modules mean: 'all-linear' (not the head), names like q_proj, path patterns."""
    linear = [p for pattern in TARGETS.values() for p in fnmatch.filter(paths, pattern) if not is_expert(p)]
    if target_modules == "all-linear":
        return linear
    names = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    allowed = [p for p in paths if p in linear]
    for name in names:
        if any(map(is_expert, fnmatch.filter(paths, name))) and not fnmatch.filter(allowed, name):
            raise UsageError(f"tune.target_modules: '{name}' are weights of experts, which take no adapters")
        if name not in TARGETS and not any(c in name for c in "*?/"):
            known = f"all-linear, {', '.join(TARGETS)}, path patterns"
            raise UsageError(f"tune.target_modules: '{name}' is unknown; known: {known}")
    chosen = select(allowed, [TARGETS.get(n, n) for n in names], "tune.target_modules")
    return [p for p in allowed if p in chosen]


def is_expert(path: str) -> bool:
    """Whether a weight is that of all experts."""
    return fnmatch.fnmatchcase(path, EXPERTS)


def scale_of(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732)."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def adapter_axes(axes: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Logical axes of a and b: a keeps the input axes (one of [D, N, H], two of [N, H, D]), b the output axes."""
    inner = 3 if len(axes) == 4 and axes[-1] == "embed" else 2  # 'layers' counted
    return (*axes[:inner], "rank"), (axes[0], "rank", *axes[inner:])


def sharding_of(arch: Architecture, mesh: Mesh, rules: Rules) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """path, shape -> where a weight, or an adapter's a or b beside it, lies."""
    declared = declare(arch)

    def find(path: str, shape: tuple[int, ...]) -> NamedSharding:
        if path in declared:
            axes = declared[path].axes
        else:
            owner, _, part = path.rpartition("/")
            axes = dict(zip("ab", adapter_axes(declared[owner].axes), strict=True))[part]
        return weight_sharding(mesh, rules, axes, shape, path)

    return find


def adapter_shapes(declared: dict[str, Declared], targets: Sequence[str], r: int) -> dict[str, DeclaredPair]:
    """{path: (declaration of a, declaration of b)} for the targets."""
    shapes = {}
    for path in targets:
        size = {**dict(zip(declared[path].axes, declared[path].shape, strict=True)), "rank": r}
        a, b = (Declared(tuple(size[x] for x in axes), axes) for axes in adapter_axes(declared[path].axes))
        shapes[path] = (a, b)
    return shapes


def init_adapter(shapes: dict[str, DeclaredPair], key: Any, dtype: Any = jnp.float32) -> dict[str, Any]:
    """{path: (a, b)}: a ~ U(+-1/sqrt(fan in)), PEFT's kaiming_uniform(sqrt 5), b = 0: attaching changes nothing."""
    made = {}
    for i, (path, (a, b)) in enumerate(sorted(shapes.items())):
        bound = 1 / math.sqrt(math.prod(a.shape[1:-1]))
        made[path] = (
            jax.random.uniform(jax.random.fold_in(key, i), a.shape, dtype, -bound, bound),
            jnp.zeros(b.shape, dtype),
        )
    return made


def attach(params: Tree, adapter: dict[str, Any], scale: float) -> Tree:
    """{'q': w} -> {'q': Lora(w, a, b, scale)} at every path of the adapter {path: (a, b)}."""
    missing = set(adapter) - set(flatten(params))
    if missing:
        raise ValueError(f"adapter for weights that the model lacks: {', '.join(sorted(missing))}")

    def wrap(path: Any, w: Any) -> Any:
        at = "/".join(str(k.key) for k in path)
        if at not in adapter:
            return w
        a, b = adapter[at]
        return Lora(w, a, b, scale)

    return jax.tree_util.tree_map_with_path(wrap, params)


def _is_lora(x: Any) -> bool:
    return isinstance(x, Lora)


def detach(params: Tree) -> Tree:
    """The tree without its adapters: the base model (a reference policy costs no second copy)."""
    return jax.tree.map(lambda w: w.base if _is_lora(w) else w, params, is_leaf=_is_lora)


def merge(params: Tree) -> Tree:
    """The tree with every adapter added into its base."""
    return jax.tree.map(lambda w: materialise(w) if _is_lora(w) else w, params, is_leaf=_is_lora)


def unmerge(merged: Tree, like: Tree) -> Tree:
    """The inverse of merge up to rounding: subtract the adapters of `like` from merged weights, attach them again."""

    def back(node: Any, w: Any) -> Any:
        if not _is_lora(node):
            return w
        delta = materialise(Lora(jnp.zeros_like(w), node.a, node.b, node.scale))
        return Lora(w - delta, node.a, node.b, node.scale)

    return jax.tree.map(back, like, merged, is_leaf=_is_lora)
