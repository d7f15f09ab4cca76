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

from decode.generate import on
from decode.load import Model
from decode.prompts import batches, bucket, check_row, encode_prompt, pad_right
from model.architecture import Architecture
from model.head import head_of, token_logprobs
from model.transformer import Compute, forward


@dataclass(frozen=True)
class Scored:
    """logprobs[i] = log p(tokens[i + 1] | tokens[.. i]) in nats: one fewer than tokens."""

    tokens: list[int]
    logprobs: list[float]


def score(
    model: Model,
    rows: Sequence[str | Sequence[int]],
    *,
    batch_size: int | None = 8,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[Scored]:
    """Score every row: text (with the tokenizer's default special tokens) or token ids as they are.

    batch_size: rows at a time, of like lengths (None = all at once); progress hears how many rows are done. Raises
    UsageError before any compile when a row is empty or longer than the context.
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
            out = np.asarray(_logprobs(model.arch, model.compute, model.params, tokens, segments))
        for i, row, logprobs in zip(batch, chosen, out, strict=False):
            results[i] = Scored(row, logprobs[: len(row) - 1].tolist())
        progress(len(batch))
    return [results[i] for i in range(len(encoded))]


@partial(jax.jit, static_argnames=("arch", "compute"))
def _logprobs(
    arch: Architecture, compute: Compute, params: Any, tokens: Int[Array, "B T"], segments: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Log-prob of the next token at every position; the last position of a row is rubbish."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = forward(arch, compute, params, tokens, positions, segments)
    return token_logprobs(hidden, head_of(arch, params), jnp.roll(tokens, -1, axis=1))


def perplexity(scored: Iterable[Scored]) -> float:
    """exp of the mean negative log-prob over all scored tokens together; nan when there is none."""
    values = [value for row in scored for value in row.logprobs]
    return math.exp(-math.fsum(values) / len(values)) if values else math.nan
