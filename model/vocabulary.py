"""A vocabulary split over devices: each looks up, or makes logits of, its own part of it."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from model.scores import capped
from model.weights import Weight, materialise, take
from sharding.place import ALONE, Split, per_device, split
from sharding.rules import DEFAULT, Rules


@dataclass(frozen=True)
class Cut:
    """Over which devices a table of the vocabulary, and the tokens that use it, are split. Its methods are for what
    runs on each device; without a mesh they do nothing."""

    batch: Split = ALONE
    seq: Split = ALONE
    vocab: Split = ALONE
    embed: Split = ALONE

    @property
    def tokens(self) -> tuple[str, ...]:
        """The axes that split tokens."""
        return self.batch.axes + self.seq.axes

    @property
    def rows(self) -> P:
        """Of a column [B, T, ..]."""
        return P(self.batch.axes, self.seq.axes)

    def table(self, tied: bool) -> P:
        """Of a table [V, D], or of a head of its own [D, V]."""
        return P(self.vocab.axes, self.embed.axes) if tied else P(self.embed.axes, self.vocab.axes)

    def whole(self, w: Array, axis: int) -> Array:
        """This device's part of the vocabulary, at its full width."""
        return jax.lax.all_gather(w, self.embed.axes, axis=axis, tiled=True) if self.embed.axes else w

    def gradient(self, dw: Array, axis: int) -> Array:
        """The inverse, of what each device's tokens add to a gradient."""
        if self.embed.axes:
            dw = jax.lax.psum_scatter(dw, self.embed.axes, scatter_dimension=axis, tiled=True)
        rest = tuple(axis for axis in self.tokens if axis not in self.embed.axes)
        return jax.lax.psum(dw, rest) if rest else dw

    def summed(self, x: Any) -> Any:
        """Sums over the vocabulary, of sums over its parts."""
        return jax.lax.psum(x, self.vocab.axes) if self.vocab.axes else x

    def largest(self, x: Array) -> Array:
        """The largest of the vocabulary, of those of its parts."""
        return jax.lax.pmax(x, self.vocab.axes) if self.vocab.axes else x

    def of_all(self, x: Any) -> Any:
        """Sums over all tokens, of sums over a device's."""
        return jax.lax.psum(x, self.tokens) if self.tokens else x

    def anywhere(self, flags: Array) -> Array:
        """Whether any device has that; a device alone decides for itself."""
        alone = not (self.vocab.axes and self.tokens)
        return flags if alone else jax.lax.pmax(flags.astype(jnp.int32), self.tokens) > 0

    def local(self, ids: Array, size: int) -> Array:
        """Where in this device's part an id is; outside 0 .. size - 1 where it is another's."""
        return ids - jax.lax.axis_index(self.vocab.axes) * size if self.vocab.axes else ids


def cut_of(rules: Rules, rows: tuple[int, ...], vocab: int, width: int) -> Cut | None:
    """How the mesh in context splits it; None where it does not, or not evenly: the partitioner finds its own way."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    cut = Cut(*(split(rules, name) for name in ("batch", "seq", "vocab", "vocab_embed")))
    sizes = (rows[0], cut.batch), (rows[1], cut.seq), (vocab, cut.vocab), (width, cut.embed)
    even = all(size % part.size == 0 for size, part in sizes) and set(cut.embed.axes) <= set(cut.tokens)
    return cut if even and cut.tokens + cut.vocab.axes else None


@dataclass(frozen=True)
class Form:
    """How hidden states and the output projection make logits.

    tied: the projection is the embedding, [V, D], else it is [D, V]. The product times `scale` is, with a softcap c,
    bent to c tanh(product / c), as in Gemma 2.
    """

    tied: bool
    scale: float = 1.0
    softcap: float | None = None
    rules: Rules = DEFAULT

    @property
    def spec(self) -> str:
        return "BTD,VD->BTV" if self.tied else "BTD,DV->BTV"

    def logits(self, x: Any, w: Any) -> Any:
        """[B, T, V] in float32 at least."""
        return self.bent(jnp.einsum(self.spec, x, w, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32)))

    def bent(self, product: Any) -> Any:
        """The logits of a product."""
        return capped(product if self.scale == 1 else product * self.scale, self.softcap)

    def by_product(self, d: Any, logit: Any) -> Any:
        """Derivatives by the product of what has derivatives d by the logits."""
        d = d if self.scale == 1 else d * self.scale
        return d if self.softcap is None else d * (1 - jnp.square(logit / self.softcap))

    def by_hidden(self, d: Any, w: Any) -> Any:
        """Derivatives by the hidden states of what has derivatives d by the product."""
        return jnp.einsum("BTV,VD->BTD" if self.tied else "BTV,DV->BTD", d, w)

    def per_device(self, fn: Any, x: Any, w: Any, columns: int, out: Any) -> Any:
        """fn(x, w, *columns, cut=) of each device's tokens and part of the vocabulary, if the mesh splits them.

        out(rows, table): how its results are split, as the tokens or as the weight is.
        """
        vocab, width = w.shape if self.tied else w.shape[::-1]
        if (cut := cut_of(self.rules, x.shape, vocab, width)) is None:
            return partial(fn, cut=Cut())
        specs = (cut.rows, cut.table(self.tied), *(cut.rows,) * columns)
        return per_device(partial(fn, cut=cut), specs, out(cut.rows, cut.table(self.tied)))

    def whole(self, w: Any, dtype: Any, cut: Cut) -> Any:
        """The device's part of the weight as its products take it."""
        return cut.whole(w.astype(dtype), 1 if self.tied else 0)

    def gradient(self, dw: Any, dtype: Any, cut: Cut) -> Any:
        """The gradient of the weight, of a device's sum [D, V]."""
        return cut.gradient(dw.T if self.tied else dw, 1 if self.tied else 0).astype(dtype)


def look_up(table: Weight, ids: Int[Array, "B T"], rules: Rules) -> Float[Array, "B T D"]:
    """take(table, ids), of a table whose rows are split: each device gives those it has."""
    w = materialise(table)
    if (cut := cut_of(rules, ids.shape, *w.shape)) is None:
        return take(table, ids)
    # the sum over the parts of the vocabulary leaves each of its devices a part of the row, if the stream is split so
    stream = split(rules, "stream")
    scatter = stream.axes == cut.seq.axes + cut.vocab.axes and ids.shape[1] % stream.size == 0
    out = P(cut.batch.axes, stream.axes if scatter else cut.seq.axes)

    def mine(w: Array, ids: Array) -> Array:
        w, at = cut.whole(w, 1), cut.local(ids, w.shape[0])
        here = ((at >= 0) & (at < w.shape[0]))[..., None]
        rows = jnp.where(here, jnp.take(w, jnp.clip(at, 0, w.shape[0] - 1), axis=0), 0)
        if scatter and cut.vocab.axes:
            return jax.lax.psum_scatter(rows, cut.vocab.axes, scatter_dimension=1, tiled=True)
        return cut.summed(rows)

    return per_device(mine, (cut.table(True), cut.rows), out, typed=True)(w, ids)
