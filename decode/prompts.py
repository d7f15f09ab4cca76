"""Prompts as people have them (text, token ids, messages, padded arrays) -> token rows, checked before any compile."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from configs.errors import UsageError
from data.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Token ids: text with the tokenizer's default special tokens, messages through the template, ids as they are."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, special=True)
    if len(prompt) and isinstance(prompt[0], Mapping):
        messages: Any = prompt
        return tokenizer.encode(tokenizer.render(messages, add_generation_prompt=True))
    ids: Any = prompt
    return [int(token) for token in ids]


def unpad(tokens: np.ndarray, attention_mask: np.ndarray) -> list[list[int]]:
    """The rows of a padded [B, T] array without their padding, wherever that is (transformers pads on the left)."""
    tokens, attention_mask = np.asarray(tokens), np.asarray(attention_mask)
    if tokens.ndim != 2 or tokens.shape != attention_mask.shape:
        raise UsageError(f"tokens {tokens.shape} and attention_mask {attention_mask.shape} must be of one shape [B, T]")
    return [row[mask > 0].tolist() for row, mask in zip(tokens, attention_mask, strict=True)]


def check_row(tokens: Sequence[int], vocab_size: int, context: int, where: str, max_new_tokens: int = 0) -> None:
    """Raise UsageError when a row is empty, has ids outside the vocabulary, or does not fit the context."""
    if not tokens:
        raise UsageError(f"{where} is empty: at least one token is needed")
    low, high = min(tokens), max(tokens)
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise UsageError(f"{where}: token id {bad} is outside the model's vocabulary (0 to {vocab_size - 1})")
    if len(tokens) > context:
        raise UsageError(f"{where} has {len(tokens)} tokens, the model's context is {context}: shorten it")
    if len(tokens) + max_new_tokens > context:
        raise UsageError(
            f"{where} has {len(tokens)} tokens and max_new_tokens is {max_new_tokens}, together beyond the model's "
            f"context of {context}: lower max_new_tokens or shorten it"
        )


def bucket(n: int, least: int = 16) -> int:
    """n rounded up to one of a few lengths (four an octave), so that a handful of shapes is ever compiled."""
    step = max(least, (1 << (n - 1).bit_length()) // 8)
    return -(-n // step) * step


def pad_right(rows: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, segments) i32[B, length]: segment 1 on the tokens, 0 on the padding."""
    tokens = np.zeros((len(rows), length), np.int32)
    segments = np.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        segments[i, : len(row)] = 1
    return tokens, segments


def batches(lengths: Sequence[int], size: int | None) -> list[list[int]]:
    """Row numbers in batches of `size`, longest first so that a batch holds like lengths; None = one batch as given."""
    if size is None:
        return [list(range(len(lengths)))] if lengths else []
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[at : at + size] for at in range(0, len(order), size)]
