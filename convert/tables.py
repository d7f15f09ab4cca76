"""Our weights beside Hugging Face's names: one table, read in both directions.

A row says which axes of a weight are inputs and which are outputs, in DESIGN's letters. From that follow both shapes,
both transforms and the names and shapes of adapters:

    linear   ours [inputs.., outputs..]   theirs [prod(outputs), prod(inputs)], torch.nn.Linear's layout
    same     ours = theirs                embeddings, norms (one axis), biases (outputs flattened)

A name with {i} is one tensor a layer there, and one leaf stacked on a leading L axis here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from configs.errors import UsageError
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
    when: Callable[[Architecture], bool] = lambda arch: True

    @property
    def stacked(self) -> bool:
        """Whether the leaf has a leading L axis."""
        return "{i}" in self.theirs

    def layer_shape(self, arch: Architecture) -> tuple[int, ...]:
        """Our shape of one layer."""
        return _sizes(arch, self.inputs) + _sizes(arch, self.outputs)

    def shape(self, arch: Architecture) -> tuple[int, ...]:
        """Our shape, with the L axis where there is one."""
        return (arch.num_layers,) * self.stacked + self.layer_shape(arch)

    def their_shape(self, arch: Architecture) -> tuple[int, ...]:
        """The shape of each of their tensors."""
        inputs, outputs = _sizes(arch, self.inputs), _sizes(arch, self.outputs)
        if self.layout == "linear":
            return math.prod(outputs), math.prod(inputs)
        return tuple(math.prod(part) for part in (inputs, outputs) if part)

    def names(self, arch: Architecture) -> list[str]:
        """Their names, layer by layer."""
        return [self.theirs.format(i=i) for i in range(arch.num_layers)] if self.stacked else [self.theirs]

    def to_ours(self, theirs: np.ndarray, arch: Architecture) -> np.ndarray:
        """A view of one of their tensors in our shape of one layer."""
        inputs, outputs = _sizes(arch, self.inputs), _sizes(arch, self.outputs)
        if self.layout == "same":
            return theirs.reshape(inputs + outputs)
        n = len(outputs)
        return theirs.reshape(outputs + inputs).transpose(*range(n, n + len(inputs)), *range(n))

    def to_theirs(self, ours: np.ndarray, arch: Architecture) -> np.ndarray:
        """The inverse of `to_ours` (a copy where the axes move)."""
        if self.layout == "same":
            return ours.reshape(self.their_shape(arch))
        n, m = len(self.inputs), len(self.outputs)
        return ours.transpose(*range(n, n + m), *range(n)).reshape(self.their_shape(arch))


def _sizes(arch: Architecture, letters: str) -> tuple[int, ...]:
    known = {
        "V": arch.vocab_size,
        "D": arch.d_model,
        "N": arch.num_heads,
        "K": arch.num_kv_heads,
        "H": arch.head_dim,
        "F": arch.d_ff,
        "C": arch.num_labels,
    }
    return tuple(known[letter] for letter in letters)


def _linear(ours: str, theirs: str, inputs: str, outputs: str, bias: Callable[[Architecture], bool]) -> list[Row]:
    """A linear layer's weight and its optional bias."""
    return [
        Row(f"{ours}/weight", f"{theirs}.weight", inputs, outputs, "linear"),
        Row(f"{ours}/bias", f"{theirs}.bias", outputs=outputs, when=bias),
    ]


def _post_norms(arch: Architecture) -> bool:
    return arch.post_norms


def _pre_norms_only(arch: Architecture) -> bool:
    return not arch.post_norms


_LAYER = "model.layers.{i}"
_ATTENTION, _MLP = f"{_LAYER}.self_attn", f"{_LAYER}.mlp"

# Llama, and what differs from it only by biases, norms and a tied head: so does Gemma 3.
ROWS: tuple[Row, ...] = (
    Row("embed/weight", "model.embed_tokens.weight", "V", "D"),
    Row("layers/attn_norm/scale", f"{_LAYER}.input_layernorm.weight", outputs="D"),
    *_linear("layers/attn/q", f"{_ATTENTION}.q_proj", "D", "NH", lambda a: a.attention_bias),
    *_linear("layers/attn/k", f"{_ATTENTION}.k_proj", "D", "KH", lambda a: a.attention_bias),
    *_linear("layers/attn/v", f"{_ATTENTION}.v_proj", "D", "KH", lambda a: a.attention_bias),
    *_linear("layers/attn/o", f"{_ATTENTION}.o_proj", "NH", "D", lambda a: a.output_bias),
    Row("layers/attn/q_norm/scale", f"{_ATTENTION}.q_norm.weight", outputs="H", when=lambda a: a.qk_norm),
    Row("layers/attn/k_norm/scale", f"{_ATTENTION}.k_norm.weight", outputs="H", when=lambda a: a.qk_norm),
    Row("layers/attn_post_norm/scale", f"{_LAYER}.post_attention_layernorm.weight", outputs="D", when=_post_norms),
    # the same name for another norm, where there is none behind the attention
    Row("layers/mlp_norm/scale", f"{_LAYER}.post_attention_layernorm.weight", outputs="D", when=_pre_norms_only),
    Row("layers/mlp_norm/scale", f"{_LAYER}.pre_feedforward_layernorm.weight", outputs="D", when=_post_norms),
    *_linear("layers/mlp/gate", f"{_MLP}.gate_proj", "D", "F", lambda a: a.mlp_bias),
    *_linear("layers/mlp/up", f"{_MLP}.up_proj", "D", "F", lambda a: a.mlp_bias),
    *_linear("layers/mlp/down", f"{_MLP}.down_proj", "F", "D", lambda a: a.mlp_bias),
    Row("layers/mlp_post_norm/scale", f"{_LAYER}.post_feedforward_layernorm.weight", outputs="D", when=_post_norms),
    Row("norm/scale", "model.norm.weight", outputs="D"),
    Row("head/weight", "lm_head.weight", "D", "V", "linear", lambda a: not a.tie_embeddings and not a.num_labels),
    Row("score/weight", "score.weight", "D", "C", "linear", lambda a: a.num_labels > 0),
    Row("score/bias", "score.bias", outputs="C", when=lambda a: a.token_labels),
)
# Tensors that carry nothing: buffers that older transformers saved.
IGNORED = ("model.layers.{i}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
# A tied head that was written out all the same: theirs must equal the other tensor, else the config is wrong.
SAME_WHEN_TIED = ("lm_head.weight", "model.embed_tokens.weight")


def rows(arch: Architecture) -> list[Row]:
    """The rows of this architecture."""
    return [row for row in ROWS if row.when(arch)]


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
        layers = range(*index[0].indices(len(self.tensors)))
        inner = [len(range(*s.indices(n))) for s, n in zip(index[1:], self.shape[1:], strict=True)]
        out = np.empty((len(layers), *inner), dtype)
        for at, layer in enumerate(layers):
            part = self.row.to_ours(self.tensors[layer].read(), self.arch)[index[1:]]
            # cast in the source's memory order, then transpose: several times faster than both at once
            out[at] = part.astype(dtype, order="K", copy=False)
        return out


def match(tensors: Mapping[str, Tensor], arch: Architecture, where: str) -> dict[str, Leaf]:
    """{our path: Leaf}; UsageError lists the tensors that are missing, left over or of another shape or kind."""
    expected = {name: row for row in rows(arch) for name in row.names(arch)}
    ignored = {name.format(i=i) for name in IGNORED for i in range(arch.num_layers)}
    surplus = [name for name in tensors if name not in expected and name not in ignored]
    twin, original = SAME_WHEN_TIED
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
    for name, row in expected.items():
        if name in tensors and tensors[name].shape != row.their_shape(arch):
            wrong.append(f"{name} {list(tensors[name].shape)} instead of {list(row.their_shape(arch))}")
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
