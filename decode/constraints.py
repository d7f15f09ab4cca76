"""Processors that look at the rows so far, or that allow, forbid and force tokens.

Token ids are arrays [N], the same for all rows, or [B, N], filled up with -1. Each works by gathers and scatters at
the tokens concerned; nothing here is as large as vocabulary times length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from decode.logits import Context, Number, column, per_row, register

Ids = Any  # i32[N] or i32[B, N], filled up with NO_TOKEN
NO_TOKEN = -1


@register("penalty")
@dataclass(frozen=True)
class RepetitionPenalty:
    """Divide the logits of tokens in the prompt or among the new ones, multiply the negative ones. Off: 1.

    arXiv 1909.05858.
    """

    penalty: Number = 1.0

    def __call__(self, logits: Float[Array, "B V"], context: Context) -> Float[Array, "B V"]:
        penalty = column(self.penalty, logits)
        ids = seen(context, jnp.zeros_like(context.length))
        old = pick(logits, ids)
        return put(logits, ids, jnp.where(old < 0, old * penalty, old / penalty))


@register("penalty")
@dataclass(frozen=True)
class PresencePenalty:
    """Subtract it from the logits of tokens that were generated, the prompt's aside (OpenAI's API). Off: 0."""

    penalty: Number = 0.0

    def __call__(self, logits: Float[Array, "B V"], context: Context) -> Float[Array, "B V"]:
        ids = seen(context, context.prompt_length)
        return put(logits, ids, pick(logits, ids) - column(self.penalty, logits))


@register("penalty")
@dataclass(frozen=True)
class FrequencyPenalty:
    """Subtract it once for each time that the token was generated, the prompt's aside (OpenAI's API). Off: 0."""

    penalty: Number = 0.0

    def __call__(self, logits: Float[Array, "B V"], context: Context) -> Float[Array, "B V"]:
        ids = seen(context, context.prompt_length)
        return add(logits, ids, jnp.broadcast_to(-column(self.penalty, logits), ids.shape))


@register("size")
@dataclass(frozen=True)
class NoRepeatNgram:
    """Remove tokens that would end an n-gram of this size which the row, its prompt included, has already. Off: 0."""

    size: Number = 0

    def __call__(self, logits: Float[Array, "B V"], context: Context) -> Float[Array, "B V"]:
        tokens, length = context.tokens, context.length[:, None]
        size = per_row(self.size, logits.shape[0], jnp.int32)[:, None]
        slots = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 1)

        def compare(back: Int[Array, ""], same: Bool[Array, "B S"]) -> Bool[Array, "B S"]:
            last = jnp.take_along_axis(tokens, jnp.maximum(length - back, 0), axis=1)
            return same & ((jnp.roll(tokens, back, axis=1) == last) | (back >= size))

        # where a whole n-gram ends, and its first size - 1 tokens are the row's last
        ends = (size > 0) & (slots >= size - 1) & (slots < length)
        ends = jax.lax.fori_loop(1, jnp.maximum(size.max(), 1), compare, ends)
        return remove(logits, jnp.where(ends, tokens, NO_TOKEN))


@register("ids", "min_new_tokens")
@dataclass(frozen=True)
class MinNewTokens:
    """Remove the ids (those that end a row) until so many new tokens are made. Off: 0."""

    ids: Ids
    min_new_tokens: Number = 0

    def __call__(self, logits: Float[Array, "B V"], context: Context) -> Float[Array, "B V"]:
        early = context.length - context.prompt_length < jnp.asarray(self.min_new_tokens)
        return remove(logits, self.ids, early)


@register("ids", "min_length")
@dataclass(frozen=True)
class MinLength:
    """Remove the ids (those that end a row) until prompt and new tokens are so many. Off: 0."""

    ids: Ids
    min_length: Number = 0

    def __call__(self, logits: Float[Array, "B V"], context: Context) -> Float[Array, "B V"]:
        return remove(logits, self.ids, context.length < jnp.asarray(self.min_length))


@register("ids")
@dataclass(frozen=True)
class SuppressTokens:
    """Remove the ids, always. Off: all -1."""

    ids: Ids

    def __call__(self, logits: Float[Array, "B V"], context: Context) -> Float[Array, "B V"]:
        return remove(logits, self.ids)


@register("ids", "after_bos")
@dataclass(frozen=True)
class BeginSuppressTokens:
    """Remove the ids at the first new token; with after_bos, at the second behind a prompt of one. Off: all -1.

    after_bos is for use beside ForcedBos, whose token comes first behind such a prompt.
    """

    ids: Ids
    after_bos: Number = False

    def __call__(self, logits: Float[Array, "B V"], context: Context) -> Float[Array, "B V"]:
        later = jnp.asarray(self.after_bos, bool) & (context.prompt_length == 1)
        return remove(logits, self.ids, context.length == context.prompt_length + later)


@register("ids")
@dataclass(frozen=True)
class AllowedTokens:
    """Remove all but the ids. Off: all -1."""

    ids: Ids

    def __call__(self, logits: Float[Array, "B V"], context: Context) -> Float[Array, "B V"]:
        ids = by_row(self.ids, logits)
        return jnp.where(among(logits, ids) | (ids < 0).all(1, keepdims=True), logits, -jnp.inf)


@register("token")
@dataclass(frozen=True)
class ForcedBos:
    """Force this token where the row has one token only. Off: -1."""

    token: Number = NO_TOKEN

    def __call__(self, logits: Float[Array, "B V"], context: Context) -> Float[Array, "B V"]:
        token = per_row(self.token, logits.shape[0], jnp.int32)
        return force(logits, token[:, None], context.length == 1)


@register("ids", "max_new_tokens")
@dataclass(frozen=True)
class ForcedEos:
    """Force one of the ids (equally likely) as the last of max_new_tokens. Off: all -1."""

    ids: Ids
    max_new_tokens: Number = 0

    def __call__(self, logits: Float[Array, "B V"], context: Context) -> Float[Array, "B V"]:
        made = context.length - context.prompt_length
        return force(logits, by_row(self.ids, logits), made == jnp.asarray(self.max_new_tokens) - 1)


@register("ids", "bias")
@dataclass(frozen=True)
class LogitBias:
    """Add the biases ([N] or [B, N], as the ids) to the ids' logits. Off: ids -1, or biases 0."""

    ids: Ids
    bias: Any

    def __call__(self, logits: Float[Array, "B V"], context: Context) -> Float[Array, "B V"]:
        ids = by_row(self.ids, logits)
        return add(logits, ids, jnp.broadcast_to(jnp.asarray(self.bias, logits.dtype), ids.shape))


@register("words", "bias")
@dataclass(frozen=True)
class SequenceBias:
    """Add a bias to the last token of a word where the tokens before it are the row's last. Off: words all -1.

    words: i32[W, N], or [B, W, N], as `pad_words` makes them; bias: [W] or [B, W].
    """

    words: Any
    bias: Any

    def __call__(self, logits: Float[Array, "B V"], context: Context) -> Float[Array, "B V"]:
        words = jnp.asarray(self.words, jnp.int32)
        words = jnp.broadcast_to(words, (logits.shape[0], *words.shape[-2:]))
        prefix = words.shape[2] - 1
        at = context.length[:, None] - prefix + jnp.arange(prefix)[None]
        tail = jnp.take_along_axis(context.tokens, jnp.maximum(at, 0), axis=1)
        tail = jnp.where(at >= 0, tail, NO_TOKEN - 1)  # before the row: like no token, nor like padding
        same = (words[:, :, :-1] == tail[:, None]) | (words[:, :, :-1] < 0)
        ids = jnp.where(same.all(-1), words[:, :, -1], NO_TOKEN)
        return add(logits, ids, jnp.broadcast_to(jnp.asarray(self.bias, logits.dtype), ids.shape))


@register("words")
@dataclass(frozen=True)
class BadWords:
    """Remove the last token of each word, as `pad_words` makes them, where its others come before. Off: all -1.

    transformers leaves words out that are an end-of-sequence token alone: do so too when you make them.
    """

    words: Any

    def __call__(self, logits: Float[Array, "B V"], context: Context) -> Float[Array, "B V"]:
        return SequenceBias(self.words, -jnp.inf)(logits, context)


@register("ids", "start", "factor")
@dataclass(frozen=True)
class ExponentialDecayLengthPenalty:
    """After `start` new tokens, raise the ids' logits by |logit| (factor ** (tokens since then) - 1). Off: factor 1."""

    ids: Ids
    start: Number = 0
    factor: Number = 1.0

    def __call__(self, logits: Float[Array, "B V"], context: Context) -> Float[Array, "B V"]:
        since = context.length - context.prompt_length - jnp.asarray(self.start)
        growth = column(self.factor, logits) ** jnp.maximum(since, 0)[:, None].astype(logits.dtype) - 1
        ids = by_row(self.ids, logits)
        old = pick(logits, ids)
        return put(logits, ids, jnp.where(jnp.isfinite(old), old + jnp.abs(old) * growth, old))


@register(meta_fields=("function", "beams"))
@dataclass(frozen=True)
class PrefixConstrained:
    """Remove what function(tokens i32[S], length i32[]) -> bool[V] does not allow after tokens[:length].

    The function is traced, for one row. Where other processors have removed all that it allows, from each of the
    `beams` neighbouring rows that belong together, the allowed tokens come back with logit 0.
    """

    function: Callable[[Int[Array, "S"], Int[Array, ""]], Bool[Array, "V"]]
    beams: int = 1

    def __call__(self, logits: Float[Array, "B V"], context: Context) -> Float[Array, "B V"]:
        allowed = jax.vmap(self.function)(context.tokens, context.length)
        out = jnp.where(allowed, logits, -jnp.inf)
        stuck = (out.max(-1) == -jnp.inf).reshape(-1, self.beams).all(1)
        stuck = jnp.repeat(stuck, self.beams, total_repeat_length=logits.shape[0])
        return jnp.where(allowed & stuck[:, None], 0, out)


def pad_words(words: Sequence[Sequence[int]], count: int = 1, length: int = 1) -> np.ndarray:
    """Words of several tokens as one array i32[W, N], filled up with -1 on the left; at least so many and so long."""
    if not all(words):
        raise ValueError("a word without tokens")
    out = np.full((max(count, len(words)), max(length, *map(len, words), 1)), NO_TOKEN, np.int32)
    for row, word in zip(out, words, strict=False):
        row[-len(word) :] = word
    return out


def seen(context: Context, start: Int[Array, "B"]) -> Int[Array, "B S"]:
    """The tokens from `start` to the row's end, NO_TOKEN elsewhere."""
    slots = jax.lax.broadcasted_iota(jnp.int32, context.tokens.shape, 1)
    inside = (slots >= start[:, None]) & (slots < context.length[:, None])
    return jnp.where(inside, context.tokens, NO_TOKEN)


def by_row(ids: Ids, logits: Float[Array, "B V"]) -> Int[Array, "B N"]:
    """The ids of each row."""
    ids = jnp.asarray(ids, jnp.int32)
    return jnp.broadcast_to(ids, (logits.shape[0], ids.shape[-1]))


def spots(ids: Int[Array, "B N"]) -> tuple[Int[Array, "B 1"], Int[Array, "B N"]]:
    """Where a row's ids lie; NO_TOKEN lies beyond any vocabulary, where writes are dropped."""
    return jnp.arange(ids.shape[0])[:, None], jnp.where(ids < 0, jnp.iinfo(jnp.int32).max, ids)


def pick(logits: Float[Array, "B V"], ids: Int[Array, "B N"]) -> Float[Array, "B N"]:
    """The logits of the ids; anything for NO_TOKEN."""
    return logits.at[spots(ids)].get(mode="clip")


def put(logits: Float[Array, "B V"], ids: Int[Array, "B N"], values: Float[Array, "B N"]) -> Float[Array, "B V"]:
    """With these values at the ids."""
    return logits.at[spots(ids)].set(values, mode="drop")


def add(logits: Float[Array, "B V"], ids: Int[Array, "B N"], values: Float[Array, "B N"]) -> Float[Array, "B V"]:
    """With these values added at the ids, once for each time an id occurs."""
    return logits.at[spots(ids)].add(values, mode="drop")


def among(logits: Float[Array, "B V"], ids: Int[Array, "B N"]) -> Bool[Array, "B V"]:
    """Which tokens are among the row's ids."""
    return jnp.zeros(logits.shape, bool).at[spots(ids)].set(True, mode="drop")


def remove(logits: Float[Array, "B V"], ids: Ids, rows: Shaped[Array, "..."] | bool = True) -> Float[Array, "B V"]:
    """Without the ids, in these rows."""
    ids = jnp.where(jnp.reshape(jnp.asarray(rows), (-1, 1)), by_row(ids, logits), NO_TOKEN)
    return put(logits, ids, jnp.full(ids.shape, -jnp.inf, logits.dtype))


def force(logits: Float[Array, "B V"], ids: Int[Array, "B N"], rows: Bool[Array, "B"]) -> Float[Array, "B V"]:
    """Only the ids, with logit 0, in these rows if they have any."""
    forced = rows & (ids >= 0).any(1)
    only = jnp.where(among(logits, ids), 0, -jnp.inf).astype(logits.dtype)
    return jnp.where(forced[:, None], only, logits)
