"""Our weights beside Hugging Face's names: one table, read in both directions.

A row says which axes of a weight are inputs and which are outputs, in DESIGN's letters. From that follow both shapes,
both transforms and the names and shapes of adapters:

    linear   ours [inputs.., outputs..]   theirs [prod(outputs), prod(inputs)], torch.nn.Linear's layout
    same     ours = theirs                embeddings, norms, biases (outputs flattened), GPT-2's Conv1D

A name with {i} is one tensor a layer there, and one leaf stacked on a leading L axis here; one with {e} is one tensor
for each entry of the axis `each` (a head, an expert), which comes first in a layer here. Several rows may share one
tensor there (a fused projection): then each says which part of its output axis it is.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np

from configs.errors import UsageError
from convert.modules import CONV1D, MODULES, Share
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
    each: str = ""  # the axis over which there are several tensors there

    @property
    def stacked(self) -> bool:
        """Whether the leaf has a leading L axis."""
        return "{i}" in self.theirs

    def layer_shape(self, arch: Architecture) -> tuple[int, ...]:
        """Our shape of one layer."""
        return _sizes(arch, self.each) + _sizes(arch, self.inputs) + _sizes(arch, self.outputs)

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
        return both if self.inputs else (outputs,)

    def layers(self, arch: Architecture) -> range:
        """The layers that have this weight, by their number there."""
        return arch.groups.get(self.ours.partition("/")[0], range(0))

    def names(self, arch: Architecture) -> list[str]:
        """Their names, layer by layer, and in a layer one for each entry of `each`."""
        layers = self.layers(arch) if self.stacked else (0,)
        entries = range(math.prod(_sizes(arch, self.each)))
        return [self.theirs.format(i=i, e=e) for i in layers for e in entries]

    def to_ours(self, theirs: np.ndarray, arch: Architecture) -> np.ndarray:
        """A view of one of their tensors in our shape of one layer (of one entry of `each`)."""
        inputs, outputs = _sizes(arch, self.inputs), _sizes(arch, self.outputs)
        part = self._part(theirs, arch)
        if self.layout == "same":
            return part.reshape(inputs + outputs)
        n = len(outputs)
        return part.reshape(outputs + inputs).transpose(*range(n, n + len(inputs)), *range(n))

    def to_theirs(self, ours: np.ndarray, arch: Architecture) -> np.ndarray:
        """The inverse of `to_ours` (a copy where the axes move): their tensor, or this row's part of it."""
        n, m = len(self.inputs), len(self.outputs)
        if self.layout == "linear":
            ours = ours.transpose(*range(n, n + m), *range(n))
        if self.share is None:
            return ours.reshape(self.their_shape(arch))
        return ours.reshape(self._part(np.empty(self.their_shape(arch), bool), arch).shape)

    def put(self, whole: np.ndarray, ours: np.ndarray, arch: Architecture) -> None:
        """Write this row's part of their tensor."""
        self._part(whole, arch)[...] = self.to_theirs(ours, arch)

    def _part(self, theirs: np.ndarray, arch: Architecture) -> np.ndarray:
        """This row's part of their tensor, its output axis cut in (groups, entries)."""
        if self.share is None:
            return theirs
        axis = 0 if self.layout == "linear" else theirs.ndim - 1
        groups, low, high, whole = self._cut(arch, self.share)
        cut = theirs.reshape(*theirs.shape[:axis], groups, whole, *theirs.shape[axis + 1 :])
        return cut[(*[slice(None)] * (axis + 1), slice(low, high))]

    def _cut(self, arch: Architecture, share: Share) -> tuple[int, int, int, int]:
        """Groups of the fused output axis; where this part begins and ends in a group; a group's size."""
        sizes = [math.prod(_sizes(arch, part)) for part in share.parts]
        low = sum(sizes[: share.at])
        return math.prod(_sizes(arch, share.groups)), low, low + sizes[share.at], sum(sizes)


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
    }
    if (e := arch.experts) is not None:
        known |= {"E": e.count, "I": e.d_ff, "S": e.shared_d_ff, "1": 1}
    return tuple(known[letter] for letter in letters)


@dataclass(frozen=True)
class Leaves:
    """Weights of our tree: the module, and the axes of its weight, bias or scale."""

    ours: str
    inputs: str = ""
    outputs: str = ""
    when: Callable[[Architecture], bool] = lambda arch: True
    bias: Callable[[Architecture], bool] = lambda arch: False
    scale: bool = False  # a norm
    bare: bool = False  # a tensor without a module there, a leaf without one here


def _experts(field: str = "count") -> Callable[[Architecture], bool]:
    """Whether an architecture has experts that have this."""
    return lambda arch: arch.experts is not None and bool(getattr(arch.experts, field))


def _norm(ours: str, when: Callable[[Architecture], bool] = lambda arch: True, outputs: str = "D") -> Leaves:
    return Leaves(ours, "", outputs, when, lambda a: a.norm_bias, True)


def _qk_norm(ours: str, heads: str) -> list[Leaves]:
    """A scale for the numbers of a head, or for those of all heads."""
    one, all_ = (lambda a: a.qk_norm and a.qk_norm_over == "head"), (lambda a: a.qk_norm and a.qk_norm_over != "head")
    return [Leaves(ours, "", "H", one, scale=True), Leaves(ours, "", f"{heads}H", all_, scale=True)]


LEAVES: tuple[Leaves, ...] = (
    Leaves("embed", "V", "D"),
    Leaves("positions", "P", "D", lambda a: a.learned_positions),
    _norm("layers/attn_norm", lambda a: a.pre_norms),
    Leaves("layers/attn/q", "D", "NH", bias=lambda a: a.attention_bias),
    Leaves("layers/attn/k", "D", "KH", bias=lambda a: a.attention_bias),
    Leaves("layers/attn/v", "D", "KH", bias=lambda a: a.attention_bias),
    Leaves("layers/attn/o", "NH", "D", bias=lambda a: a.output_bias),
    *_qk_norm("layers/attn/q_norm", "N"),
    *_qk_norm("layers/attn/k_norm", "K"),
    _norm("layers/attn_post_norm", lambda a: a.post_norms),
    _norm("layers/mlp_norm", lambda a: a.pre_norms and a.block != "parallel_shared"),
    Leaves("layers/mlp/gate", "D", "F", lambda a: a.gated and not a.experts, bias=lambda a: a.mlp_bias),
    Leaves("layers/mlp/up", "D", "F", lambda a: not a.experts, bias=lambda a: a.mlp_bias),
    Leaves("layers/mlp/down", "F", "D", lambda a: not a.experts, bias=lambda a: a.mlp_bias),
    Leaves("layers/mlp/router", "D", "E", _experts(), bias=_experts("router_bias")),
    Leaves("layers/mlp/correction", "", "E", _experts("correction"), bare=True),
    Leaves("layers/mlp/experts/gate", "D", "EI", _experts(), bias=_experts("bias")),
    Leaves("layers/mlp/experts/up", "D", "EI", _experts(), bias=_experts("bias")),
    Leaves("layers/mlp/experts/down", "I", "ED", _experts(), bias=_experts("bias")),
    Leaves("layers/mlp/shared/gate", "D", "S", _experts("shared_d_ff")),
    Leaves("layers/mlp/shared/up", "D", "S", _experts("shared_d_ff")),
    Leaves("layers/mlp/shared/down", "S", "D", _experts("shared_d_ff")),
    Leaves("layers/mlp/shared_gate", "D", "1", _experts("shared_gate")),
    _norm("layers/mlp_post_norm", lambda a: a.post_norms),
    _norm("norm"),
    Leaves("head", "D", "V", lambda a: not a.tie_embeddings and not a.num_labels),
    Leaves("score", "D", "C", lambda a: a.num_labels > 0, bias=lambda a: a.token_labels),
)
# Tensors that carry nothing: buffers that older transformers saved.
IGNORED = ("model.layers.{i}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")


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
    name, share, outputs, each = *(name if isinstance(name, tuple) else (name, None)), leaves.outputs, ""
    if "{e}" in name:
        each, outputs = outputs[0], outputs[1:]
    ours = leaves.ours.replace("layers", group, 1) if group else leaves.ours
    if leaves.bare:
        return [Row(ours, name, leaves.inputs, outputs)]
    plain = leaves.scale or leaves.ours in ("embed", "positions") or arch.family in CONV1D and "{i}" in name
    layout = "same" if plain else "linear"
    kind = "scale" if leaves.scale else "weight"
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
    """One of our leaves and the tensors it comes from: one a layer, or one."""

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
        if not self.row.stacked:
            tensor = self.tensors[0]
            part = self.row.to_ours(tensor.read(), self.arch)[index]
            return np.array(part, dtype, order="C", copy=tensor.mapped or None)
        # one tensor an entry of the first axis or, with `each`, of the first two
        lead = 2 if self.row.each else 1
        picked = [range(*s.indices(n)) for s, n in zip(index[:lead], self.shape[:lead], strict=True)]
        inner = [len(range(*s.indices(n))) for s, n in zip(index[lead:], self.shape[lead:], strict=True)]
        out = np.empty((*map(len, picked), *inner), dtype)
        for at in np.ndindex(*map(len, picked)):
            tensor = self.tensors[np.ravel_multi_index([p[i] for p, i in zip(picked, at, strict=True)], self.shape[:lead])]
            part = self.row.to_ours(tensor.read(), self.arch)[index[lead:]]
            # cast in the source's memory order, then transpose: several times faster than both at once
            out[at] = part.astype(dtype, order="K", copy=False)
        return out


def match(tensors: Mapping[str, Tensor], arch: Architecture, where: str) -> dict[str, Leaf]:
    """{our path: Leaf}; UsageError lists the tensors that are missing, left over or of another shape or kind."""
    expected = shapes(arch)
    ignored = {name.format(i=i) for name in IGNORED for i in range(arch.num_layers)}
    surplus = [name for name in tensors if name not in expected and name not in ignored]
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
