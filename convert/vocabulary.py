"""A tokenizer and the rows that stand for its tokens: whether they fit, and rows for more tokens."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from configs.errors import UsageError
from convert.source import Index, Placer, Read, Source
from data.tokenizer import Tokenizer
from model.architecture import Architecture

MULTIPLE = 64  # sizes that matrix units take without padding, and that any usual mesh divides
# The axis of tokens, in the weights and in adapters of them: a mean of rows goes through both factors alike.
TOKENS = {"embed/weight": 0, "embed/weight/a": 0, "head/weight": 1, "head/weight/b": 1}


def round_up(tokens: int) -> int:
    """The rows that a vocabulary of so many tokens gets."""
    return -(-tokens // MULTIPLE) * MULTIPLE


def check_vocabulary(tokenizer: Tokenizer, arch: Architecture) -> None:
    """Raise UsageError when the tokenizer has tokens that the model has no rows for."""
    if tokenizer.vocab_size > arch.vocab_size:
        raise UsageError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding only {arch.vocab_size} rows: "
            "they do not belong together (model.tokenizer, model.source), or tokens were added: then "
            "model.resize_vocab=true adds rows for them"
        )


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """The special tokens as config.json and generation_config.json say them."""
    ends = tokenizer.eos_ids
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends) or None,
        "pad_token_id": tokenizer.pad_id,
    }
    return {name: value for name, value in ids.items() if value is not None}


def with_tokenizer(source: Source, tokenizer: Tokenizer) -> Source:
    """The model with another tokenizer, whose special tokens its configs name."""
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | token_ids(tokenizer)
    generation = {**(source.generation_config or {}), **ids}
    return replace(source, tokenizer=tokenizer, config={**source.config, **ids}, generation_config=generation)


def grow(source: Source, tokens: int) -> Source:
    """The model with rows for so many tokens: the old ones, and more that are their mean (John Hewitt, 2021).

    A new token's logit is then the mean of the old ones, so that it takes little from what the model predicts.
    """
    if tokens <= source.arch.vocab_size:
        return source
    rows = round_up(tokens)
    arch, config = replace(source.arch, vocab_size=rows), {**source.config, "vocab_size": rows}
    return replace(source, kind="grown", arch=arch, config=config, base=source, fresh={})


def growing(placer: Placer, old: int, new: int) -> Placer:
    """A placer that gives weights with `old` tokens `new` ones."""

    def place(path: str, shape: tuple[int, ...], dtype: Any, read: Read) -> Any:
        axis = TOKENS.get(path)
        if axis is None or shape[axis] != old:
            return placer(path, shape, dtype, read)
        return placer(path, _put(shape, axis, new), dtype, _with_means(read, shape, axis, new))

    return place


def _with_means(read: Read, shape: tuple[int, ...], axis: int, new: int) -> Callable[[Index], np.ndarray]:
    old = shape[axis]

    def read_grown(index: Index) -> np.ndarray:
        index = (*index, *[slice(None)] * (len(shape) - len(index)))
        start, stop, _ = index[axis].indices(new)
        part = read(_put(index, axis, slice(min(start, old), min(stop, old))))
        if stop <= old:
            return part
        mean = np.mean(read(_put(index, axis, slice(0, old))), axis, np.float64, keepdims=True).astype(part.dtype)
        return np.concatenate([part, np.repeat(mean, stop - max(start, old), axis)], axis)

    return read_grown


def _put(values: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*values[:at], value, *values[at + 1 :])
