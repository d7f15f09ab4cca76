"""The one table: logical axis of a weight or activation -> mesh axes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from configs.errors import UsageError

MeshAxes = tuple[str, ...]

_ACTIVATIONS = {
    "batch": ("data", "stage", "fsdp", "expert"),  # stage and expert too: for all but the layers, and the experts
    "seq": ("context",),
    # the residual stream between blocks, and so its norms (sequence parallelism, arXiv 2205.05198); see place.constrain
    "stream": ("context", "tensor"),
    "width": (),
}
STACKED = ("layers", "dense_layers")  # layers of one kind
_WEIGHTS = {
    "layers": ("stage",),
    "dense_layers": (),  # those before a mixture's, and before its pipeline
    "vocab": ("tensor",),
    "positions": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "expert": ("expert",),
    "router": (),
    "latent": (),
    "norm": (),
    "rank": (),
    "labels": (),
}
PRESETS: Mapping[str, Mapping[str, MeshAxes]] = MappingProxyType(
    {
        # weights split over fsdp and expert (gathered when used) and over tensor; experts are apart over expert
        # already; embedding and head, which no stage has for its own, are split over stage too
        "fsdp": {
            **_ACTIVATIONS,
            **_WEIGHTS,
            "embed": ("fsdp", "expert"),
            "vocab_embed": ("stage", "fsdp", "expert"),
            "expert_embed": ("fsdp",),
        },
        # weights whole on every device of the data and fsdp axes
        "replicated": {**_ACTIVATIONS, **_WEIGHTS, "embed": (), "vocab_embed": (), "expert_embed": ()},
    }
)


@dataclass(frozen=True)
class Rules:
    """An immutable, hashable rule table."""

    rows: tuple[tuple[str, MeshAxes], ...]

    def axes(self, logical: str) -> MeshAxes:
        """The mesh axes of a logical axis; an unknown name is an error, never 'replicated'."""
        for name, axes in self.rows:
            if name == logical:
                return axes
        raise UsageError(f"unknown logical axis '{logical}'; known: {', '.join(n for n, _ in self.rows)}")

    def without(self, *gone: str) -> "Rules":
        """The same table where nothing is split over those mesh axes: for what is manual over them."""
        return Rules(tuple((name, tuple(a for a in axes if a not in gone)) for name, axes in self.rows))


def make_rules(preset: str = "fsdp", overrides: Mapping[str, str | Sequence[str] | None] | None = None) -> Rules:
    """A preset's table with some rows replaced."""
    if preset not in PRESETS:
        raise UsageError(f"mesh.preset: '{preset}' is unknown; presets: {', '.join(PRESETS)}")
    table = dict(PRESETS[preset])
    for name, axes in (overrides or {}).items():
        if name not in table:
            raise UsageError(f"mesh.rules.{name}: unknown logical axis; known: {', '.join(table)}")
        table[name] = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
    return Rules(tuple(table.items()))


DEFAULT = make_rules()


def spec(rules: Rules, logical: Sequence[str | None], where: str = "array") -> P:
    """The PartitionSpec of an array's logical axes; two dimensions on one mesh axis are an error."""
    used: dict[str, str] = {}
    parts: list[str | tuple[str, ...] | None] = []
    for name in logical:
        axes = () if name is None else rules.axes(name)
        for axis in axes:
            if axis in used:
                raise UsageError(f"{where}: '{used[axis]}' and '{name}' both want mesh axis '{axis}' (mesh.rules)")
            used[axis] = str(name)
        parts.append(None if not axes else axes[0] if len(axes) == 1 else axes)
    return P(*parts)


def check_divides(mesh: Mesh, rules: Rules, logical: Sequence[str | None], shape: Sequence[int], where: str) -> None:
    """Raise UsageError naming the weight and the axis when a dimension does not divide over its mesh axes."""
    for name, size in zip(logical, shape, strict=True):
        parts = {axis: mesh.shape[axis] for axis in (rules.axes(name) if name else ()) if mesh.shape[axis] > 1}
        if size % math.prod(parts.values()):
            fit = ", ".join(str(n) for n in range(1, min(size, mesh.size) + 1) if size % n == 0)
            over = " x ".join(f"{axis}={n}" for axis, n in parts.items())
            raise UsageError(
                f"{where}: dimension '{name}' of {size} does not divide over mesh axis {over}; divisors: {fit}; "
                f"change the mesh, or mesh.rules.{name}: null"
            )
