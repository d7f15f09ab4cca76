"""Per-token log-probs of texts and token rows, and perplexity."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from decode.choose import largest
from decode.engine import on
from decode.load import Model
from decode.prompts import batches, bucket, check_row, encode_prompt, pad_right
from decode.results import Top
from model.architecture import Architecture
from model.compute import Compute
from model.head import head_of, logits, token_logprobs
from model.transformer import forward


@dataclass(frozen=True)
class Scored:
    """logprobs[i] = log p(tokens[i + 1] | tokens[.. i]) in nats: one fewer than tokens."""

    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[Top] | None = None  # with `top`: the likeliest tokens at each place


def score(
    model: Model,
    rows: Sequence[str | Sequence[int]],
    *,
    batch_size: int | None = 8,
    top: int = 0,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[Scored]:
    """Score every row: text (with the tokenizer's default special tokens) or token ids as they are.

    batch_size: rows at a time, of like lengths (None = all at once); top: how many of the likeliest tokens to tell of
    at each place; progress hears how many rows are done. Raises UsageError before any compile when a row is empty or
    longer than the context.
    """
    encoded = [encode_prompt(model.tokenizer, row) for row in rows]
    for number, row in enumerate(encoded, 1):
        check_row(row, model.arch.vocab_size, model.arch.max_position, f"row {number}")
    results: dict[int, Scored] = {}
    for batch in batches([len(row) for row in encoded], batch_size):
        chosen = [encoded[i] for i in batch]
        filled = chosen + [[0]] * ((batch_size or len(batch)) - len(batch))
        tokens, segments = pad_right(filled, min(bucket(max(map(len, chosen))), model.arch.max_position))
        with on(model):
            found = _logprobs(model.arch, model.compute, model.params, tokens, segments, top)
        out, ids, values = (np.asarray(x) for x in found)
        for n, i in enumerate(batch):
            size = len(encoded[i]) - 1
            likeliest = [
                dict(zip(*pair, strict=True))
                for pair in zip(ids[n, :size].tolist(), values[n, :size].tolist(), strict=True)
            ]
            results[i] = Scored(encoded[i], out[n, :size].tolist(), likeliest if top else None)
        progress(len(batch))
    return [results[i] for i in range(len(encoded))]


@partial(jax.jit, static_argnames=("arch", "compute", "top"))
def _logprobs(
    arch: Architecture,
    compute: Compute,
    params: Any,
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    top: int,
) -> tuple[Float[Array, "B T"], Int[Array, "B T k"], Float[Array, "B T k"]]:
    """Log-prob of the next token at every position, and the `top` likeliest; the last position of a row is rubbish."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, head = forward(arch, compute, params, tokens, positions, segments), head_of(arch, params)
    chosen = token_logprobs(hidden, head, jnp.roll(tokens, -1, axis=1))
    if not top:
        nothing = jnp.zeros((*tokens.shape, 0))
        return chosen, nothing.astype(jnp.int32), nothing

    def column(x: Float[Array, "B D"]) -> tuple[Array, Array]:  # one position of every row: never [B, T, V]
        raw = logits(x[:, None], head)[:, 0]
        values, ids = largest(raw, top)
        return ids, values - jax.nn.logsumexp(raw, axis=-1, keepdims=True)

    ids, values = jax.lax.map(column, hidden.swapaxes(0, 1))
    return chosen, ids.swapaxes(0, 1), values.swapaxes(0, 1)


def perplexity(scored: Iterable[Scored]) -> float:
    """exp of the mean negative log-prob over all scored tokens together; nan when there is none."""
    values = [value for row in scored for value in row.logprobs]
    return math.exp(-math.fsum(values) / len(values)) if values else math.nan
