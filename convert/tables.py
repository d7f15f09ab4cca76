"""Our weights beside Hugging Face's names: one table, read in both directions.

A row says which axes of a weight are inputs and which are outputs, in DESIGN's letters. From that follow both shapes,
both transforms and the names and shapes of adapters:

    linear   ours [inputs.., outputs..]   theirs [prod(outputs), prod(inputs)], torch.nn.Linear's layout
    same     ours = theirs                embeddings, norms, biases (inputs and outputs flattened), GPT-2's Conv1D

A name with {i} is one tensor a layer there, and one leaf stacked on a leading L axis here. Before inputs and outputs
may come the axis `each` (heads, experts): it leads there too or, where the name has {e}, is a tensor an entry. Several
rows may share one tensor there (a fused projection): then each says which part of its output axis it is.
"""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from configs.errors import UsageError
from convert.modules import CONV1D, FURTHER, IGNORED, MODULES, RENAMED, Share
from convert.tensors import Tensor
from model.architecture import Architecture

LIST_AT_MOST = 8


@dataclass(frozen=True)
class Row:
    """One weight: where it is here, what it is called there, and how its axes correspond."""

    ours: str
    theirs: str
    inputs: str = ""
    outputs: str = ""
    layout: Literal["linear", "same"] = "same"
    share: Share | None = None  # the part of their tensor that this is; None: all of it
    each: str = ""  # an axis before the others

    @property
    def stacked(self) -> bool:
        """One tensor a layer there, one leaf with a leading layer axis here."""
        return "{i}" in self.theirs

    @property
    def lead(self) -> int:
        """How many of our leading axes are apart there: layers, entries of `each`."""
        return self.stacked + ("{e}" in self.theirs)

    def layer_shape(self, arch: Architecture) -> tuple[int, ...]:
        """Our shape of one layer."""
        return _sizes(arch, self.each + self.inputs + self.outputs)

    def shape(self, arch: Architecture) -> tuple[int, ...]:
        """Our shape, with the L axis where there is one."""
        return (len(self.layers(arch)),) * self.stacked + self.layer_shape(arch)

    def their_shape(self, arch: Architecture) -> tuple[int, ...]:
        """The shape of each of their tensors."""
        inputs, outputs = math.prod(_sizes(arch, self.inputs)), math.prod(_sizes(arch, self.outputs))
        if self.share is not None:
            groups, _, _, whole = self._cut(arch, self.share)
            outputs = groups * whole
        both = (outputs, inputs) if self.layout == "linear" else (inputs, outputs)
        return _sizes(arch, self._inner()) + (both if self.inputs else (outputs,))

    def layers(self, arch: Architecture) -> range:
        """The layers that have this weight, by their number there."""
        return arch.groups.get(self.ours.partition("/")[0], range(0))

    def names(self, arch: Architecture) -> list[str]:
        """Their names, layer by layer, and in a layer one for each entry of `each` where they are apart."""
        layers = self.layers(arch) if self.stacked else (0,)
        entries = range(math.prod(_sizes(arch, self.each))) if "{e}" in self.theirs else (0,)
        return [self.theirs.format(i=i, e=e) for i in layers for e in entries]

    def to_ours(self, theirs: np.ndarray, arch: Architecture) -> np.ndarray:
        """A view of one of their tensors, or of this row's part of it, in our shape without the axes apart there."""
        each, inputs, outputs = (_sizes(arch, axes) for axes in (self._inner(), self.inputs, self.outputs))
        part = self._part(theirs, arch)
        if self.layout == "same":
            return part.reshape(each + inputs + outputs)
        return _turned(part.reshape(each + outputs + inputs), len(each), len(outputs))

    def put(self, whole: np.ndarray, ours: np.ndarray, arch: Architecture) -> None:
        """Write what `to_ours` reads into their tensor."""
        part = self._part(whole, arch)
        part[...] = self._flat(ours).reshape(part.shape)

    def to_theirs(self, ours: np.ndarray, arch: Architecture) -> np.ndarray:
        """The inverse of `to_ours` for a tensor that is this row's alone (a copy where the axes move)."""
        return self._flat(ours).reshape(self.their_shape(arch))

    def _flat(self, ours: np.ndarray) -> np.ndarray:
        return _turned(ours, len(self._inner()), len(self.inputs)) if self.layout == "linear" else ours

    def _inner(self) -> str:
        """`each`, where it is an axis of their tensors."""
        return "" if "{e}" in self.theirs else self.each

    def _part(self, theirs: np.ndarray, arch: Architecture) -> np.ndarray:
        """A view of this row's part of their tensor, its output axis cut in (groups, entries)."""
        if self.share is None:
            return theirs
        axis = theirs.ndim - (2 if self.layout == "linear" else 1)
        groups, low, high, whole = self._cut(arch, self.share)
        cut = theirs.reshape(*theirs.shape[:axis], groups, whole, *theirs.shape[axis + 1 :])
        return cut[(*[slice(None)] * (axis + 1), slice(low, high))]

    def _cut(self, arch: Architecture, share: Share) -> tuple[int, int, int, int]:
        """Groups of the fused output axis; where this part begins and ends in a group; a group's size."""
        sizes = [math.prod(_sizes(arch, part)) for part in share.parts]
        low = sum(sizes[: share.at])
        return math.prod(_sizes(arch, share.groups)), low, low + sizes[share.at], sum(sizes)


def _turned(x: np.ndarray, keep: int, first: int) -> np.ndarray:
    """The `first` axes behind the `keep` leading ones moved to the end."""
    return x.transpose(*range(keep), *range(keep + first, x.ndim), *range(keep, keep + first))


def _sizes(arch: Architecture, letters: str) -> tuple[int, ...]:
    known = {
        "V": arch.vocab_size,
        "D": arch.d_model,
        "N": arch.num_heads,
        "K": arch.num_kv_heads,
        "H": arch.head_dim,
        "F": arch.d_ff,
        "C": arch.num_labels,
        "P": arch.max_position,
        "T": arch.token_types,
    }
    if (e := arch.experts) is not None:
        known |= {"E": e.count, "I": e.d_ff, "S": e.shared_d_ff, "G": 1}
    if (m := arch.latent) is not None:
        known |= {"Q": m.q_rank or 0, "R": m.rank, "Y": m.rank + m.rope_dim, "U": m.value_dim}
        known |= {"X": arch.head_dim - m.rope_dim + m.value_dim}
    return tuple(known[letter] for letter in letters)


@dataclass(frozen=True)
class Leaves:
    """Weights of our tree: a module, the axes of its weight (or, a norm's, its scale), and whether it has a bias."""

    ours: str
    inputs: str = ""
    outputs: str = ""
    when: Callable[[Architecture], bool] = lambda arch: True
    bias: Callable[[Architecture], bool] = lambda arch: False
    kind: Literal["linear", "table", "norm", "bias", "bare"] = "linear"  # bare: a parameter without a module there
    each: str = ""


def _experts(field: str = "count") -> Callable[[Architecture], bool]:
    """Whether an architecture has experts that have this."""
    return lambda arch: arch.experts is not None and bool(getattr(arch.experts, field))


def _dense(arch: Architecture) -> bool:
    return arch.experts is None


def _latent(arch: Architecture) -> bool:
    return arch.latent is not None


def _q_latent(arch: Architecture) -> bool:
    return arch.latent is not None and arch.latent.q_rank is not None


def _plain(arch: Architecture) -> bool:
    return arch.latent is None


def _norm(ours: str, when: Callable[[Architecture], bool] = lambda arch: True) -> Leaves:
    return Leaves(ours, "", "D", when, lambda a: a.norm_bias, "norm")


def _qk_norm(ours: str, heads: str) -> list[Leaves]:
    """A scale for the numbers of every head, for those of each head, or for those of all heads together."""
    return [
        Leaves(ours, "", "H", lambda a: a.qk_norm and a.qk_norm_over == "head", kind="norm"),
        Leaves(ours, "", "H", lambda a: a.qk_norm and a.qk_norm_over == "heads", kind="norm", each=heads),
        Leaves(ours, "", f"{heads}H", lambda a: a.qk_norm and a.qk_norm_over == "width", kind="norm"),
    ]


LEAVES: tuple[Leaves, ...] = (
    Leaves("embed", "V", "D", kind="table"),
    Leaves("positions", "P", "D", lambda a: a.learned_positions, kind="table"),
    Leaves("types", "T", "D", lambda a: not a.causal, kind="table"),
    _norm("embed_norm", lambda a: not a.causal),
    _norm("layers/attn_norm", lambda a: a.pre_norms or a.block == "post"),
    Leaves("layers/attn/q", "D", "NH", lambda a: not _q_latent(a), lambda a: a.attention_bias and _plain(a)),
    Leaves("layers/attn/k", "D", "KH", _plain, lambda a: a.attention_bias),
    Leaves("layers/attn/v", "D", "KH", _plain, lambda a: a.attention_bias),
    Leaves("layers/attn/o", "NH", "D", _plain, lambda a: a.output_bias),
    Leaves("layers/attn/sinks", "", "N", lambda a: a.sinks, kind="bare"),
    Leaves("layers/attn/q_a", "D", "Q", _q_latent, lambda a: a.attention_bias),
    Leaves("layers/attn/q_a_norm", "", "Q", _q_latent, kind="norm"),
    Leaves("layers/attn/q_b", "Q", "NH", _q_latent),
    Leaves("layers/attn/kv_a", "D", "Y", _latent, lambda a: a.attention_bias),
    Leaves("layers/attn/kv_a_norm", "", "R", _latent, kind="norm"),
    Leaves("layers/attn/kv_b", "R", "NX", _latent),
    Leaves("layers/attn/o", "NU", "D", _latent, lambda a: a.output_bias),
    *_qk_norm("layers/attn/q_norm", "N"),
    *_qk_norm("layers/attn/k_norm", "K"),
    _norm("layers/attn_post_norm", lambda a: a.post_norms),
    _norm("layers/mlp_norm", lambda a: (a.pre_norms and a.block != "parallel_shared") or a.block == "post"),
    Leaves("layers/mlp/gate", "D", "F", lambda a: a.gated and _dense(a), lambda a: a.mlp_bias),
    Leaves("layers/mlp/up", "D", "F", _dense, lambda a: a.mlp_bias),
    Leaves("layers/mlp/down", "F", "D", _dense, lambda a: a.mlp_bias),
    Leaves("layers/mlp/router", "D", "E", _experts(), _experts("router_bias")),
    Leaves("layers/mlp/correction", "", "E", _experts("correction"), kind="bare"),
    Leaves("layers/mlp/experts/gate", "D", "I", _experts(), _experts("bias"), each="E"),
    Leaves("layers/mlp/experts/up", "D", "I", _experts(), _experts("bias"), each="E"),
    Leaves("layers/mlp/experts/down", "I", "D", _experts(), _experts("bias"), each="E"),
    Leaves("layers/mlp/shared/gate", "D", "S", _experts("shared_d_ff")),
    Leaves("layers/mlp/shared/up", "D", "S", _experts("shared_d_ff")),
    Leaves("layers/mlp/shared/down", "S", "D", _experts("shared_d_ff")),
    Leaves("layers/mlp/shared_gate", "D", "G", _experts("shared_gate")),
    _norm("layers/mlp_post_norm", lambda a: a.post_norms),
    _norm("norm", lambda a: a.causal),
    Leaves("head", "D", "V", lambda a: not a.tie_embeddings and not a.num_labels),
    Leaves("pooler", "D", "D", lambda a: not a.causal and a.num_labels > 0, lambda a: True),
    Leaves("score", "D", "C", lambda a: a.num_labels > 0, bias=lambda a: a.token_labels or not a.causal),
    Leaves("predict", "D", "D", lambda a: not a.causal and not a.num_labels, lambda a: True),
    _norm("predict_norm", lambda a: not a.causal and not a.num_labels),
    Leaves("predict_tokens", "", "V", lambda a: not a.causal and not a.num_labels, kind="bias"),
)


@cache
def rows(arch: Architecture) -> tuple[Row, ...]:
    """The rows of this architecture, by its family's names."""
    return tuple(row for leaves in LEAVES for group in _groups(leaves, arch) for row in _rows(leaves, arch, group))


def _groups(leaves: Leaves, arch: Architecture) -> list[str]:
    """The groups of layers that have these weights; "" for what is in no layer."""
    if not leaves.ours.startswith("layers/"):
        return [""] * leaves.when(arch)
    return [name for name in arch.groups if leaves.when(arch.of_group(name))]


def _rows(leaves: Leaves, arch: Architecture, group: str) -> list[Row]:
    name = MODULES[arch.family].get(leaves.ours)
    if name is None:
        raise UsageError(f"model_type {arch.family} has no name for this model's {leaves.ours}")
    name, share = name if isinstance(name, tuple) else (name, None)
    ours, outputs, each = leaves.ours.replace("layers", group, 1) if group else leaves.ours, leaves.outputs, leaves.each
    if leaves.kind == "bare":
        return [Row(ours, name, "", outputs)]
    if leaves.kind == "linear" and each and "{e}" not in name:  # stacked there, too, in our layout
        found = [Row(f"{ours}/weight", name, leaves.inputs, outputs, "same", share, each)]
        return found + [Row(f"{ours}/bias", f"{name}_bias", "", outputs, share=share, each=each)] * leaves.bias(arch)
    turned = leaves.kind == "linear" and not (arch.family in CONV1D and "{i}" in name)
    layout: Literal["linear", "same"] = "linear" if turned else "same"
    if leaves.kind == "bias":
        return [Row(f"{leaves.ours}/bias", f"{name}.bias", "", leaves.outputs)]
    kind = "scale" if leaves.kind == "norm" else "weight"
    found = [Row(f"{ours}/{kind}", f"{name}.weight", leaves.inputs, outputs, layout, share, each)]
    if leaves.bias(arch):
        found.append(Row(f"{ours}/bias", f"{name}.bias", "", outputs, share=share, each=each))
    return found


def shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """{their name: shape} of every tensor."""
    return {name: row.their_shape(arch) for row in rows(arch) for name in row.names(arch)}


def fused(arch: Architecture) -> dict[str, list[Row]]:
    """{their first name: the rows that share these tensors, or the one that has them alone}, in the table's order."""
    found: dict[str, list[Row]] = {}
    for row in rows(arch):
        found.setdefault(row.names(arch)[0], []).append(row)
    return found


@dataclass(frozen=True)
class Leaf:
    """One of our leaves and the tensors it comes from: one, or one for each entry of its axes apart there."""

    row: Row
    arch: Architecture
    tensors: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Our shape."""
        return self.row.shape(self.arch)

    def read(self, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """The part of the leaf that `index` (a slice per axis) selects, as fresh memory, read tensor by tensor."""
        index = tuple(index) + (slice(None),) * (len(self.shape) - len(index))
        if not self.row.lead:
            tensor = self.tensors[0]
            part = self.row.to_ours(tensor.read(), self.arch)[index]
            return np.array(part, dtype, order="C", copy=tensor.mapped or None)
        lead = self.row.lead
        picked = [range(*s.indices(n)) for s, n in zip(index[:lead], self.shape[:lead], strict=True)]
        inner = [len(range(*s.indices(n))) for s, n in zip(index[lead:], self.shape[lead:], strict=True)]
        out = np.empty((*map(len, picked), *inner), dtype)
        for at in np.ndindex(*map(len, picked)):
            where = [some[i] for some, i in zip(picked, at, strict=True)]
            tensor = self.tensors[np.ravel_multi_index(where, self.shape[:lead])]
            part = self.row.to_ours(tensor.read(), self.arch)[index[lead:]]
            # cast in the source's memory order, then transpose: several times faster than both at once
            out[at] = part.astype(dtype, order="K", copy=False)
        return out


def match(tensors: Mapping[str, Tensor], arch: Architecture, where: str) -> dict[str, Leaf]:
    """{our path: Leaf}; UsageError lists the tensors that are missing, left over or of another shape or kind."""
    expected, ignored = shapes(arch), {name.format(i=i) for name in IGNORED for i in range(arch.num_layers)}
    for old, new in RENAMED.get(arch.family, {}).items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    prefix = MODULES[arch.family]["embed"].split(".")[0] + "."
    # of a model saved without its head, as OpenAI's GPT-2 is published, all names lack the first part
    bare = {name for name in expected if name.startswith(prefix) and name not in tensors}
    if {name.removeprefix(prefix) for name in bare} & tensors.keys():
        tensors = {prefix + name if prefix + name in bare | ignored else name: t for name, t in tensors.items()}
    surplus = [name for name in tensors if name not in expected and name not in ignored]
    further = [name for name in surplus if name.startswith(f"model.layers.{arch.num_layers}.")]
    if arch.family in FURTHER and further:
        print(f"{where}: the layer for predicting further tokens is left out ({len(further)} tensors)", file=sys.stderr)
        surplus = [name for name in surplus if name not in further]
    twin, original = (f"{MODULES[arch.family][module]}.weight" for module in ("head", "embed"))
    # a tied head that was written out all the same: it must equal the embedding, else the config is wrong
    if arch.tie_embeddings and twin in surplus and original in tensors:
        if not _equal(tensors[twin], tensors[original]):
            raise UsageError(
                f"{where}: {twin} differs from {original}, but config.json says tie_word_embeddings: true "
                "(or says nothing where true is the default): set it to false if the head is its own weight"
            )
        surplus.remove(twin)
    problems = []
    if missing := [name for name in expected if name not in tensors]:
        problems.append(f"{len(missing)} missing: {listing(missing)}")
    if surplus:
        problems.append(f"{len(surplus)} that this architecture has no place for: {listing(surplus)}")
    wrong = []
    for name, shape in expected.items():
        if name in tensors and tensors[name].shape != shape:
            wrong.append(f"{name} {list(tensors[name].shape)} instead of {list(shape)}")
        elif name in tensors and tensors[name].dtype is None:
            wrong.append(f"{name} is {tensors[name].stored}, not a float (a quantised checkpoint?)")
    if wrong:
        problems.append(f"{len(wrong)} that do not fit the config: {listing(wrong)}")
    if problems:
        raise UsageError(f"{where}: tensors {'; '.join(problems)}")
    return {row.ours: Leaf(row, arch, tuple(tensors[name] for name in row.names(arch))) for row in rows(arch)}


def listing(names: list[str]) -> str:
    """The names, or the first of them and how many more there are."""
    shown = ", ".join(names[:LIST_AT_MOST])
    return shown if len(names) <= LIST_AT_MOST else f"{shown} and {len(names) - LIST_AT_MOST} more"


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bytes."""
    return (a.shape, a.dtype) == (b.shape, b.dtype) and all(
        np.array_equal(x.view(np.uint8), y.view(np.uint8)) for x, y in zip(a.read(), b.read(), strict=True)
    )
