"""One sequence, its text as it comes; what the cache already holds of a conversation is not computed again."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

from decode.generate import Completion, Sampling, advance, completion, new_cache, on, prefill, rule_of
from decode.load import Model
from decode.prompts import bucket, check_row, pad_right
from model.cache import Cache

LEAST_SLOTS = 256  # a conversation grows: start with room, so that the first turns share their compiles
REPLACEMENT = "\ufffd"  # the decoder's sign of a character whose bytes are not all there yet


@dataclass
class Memory:
    """What a conversation's cache holds: pass the same one to every turn."""

    tokens: list[int] = field(default_factory=list)
    cache: Cache | None = None


def stream(
    model: Model, prompt: Sequence[int], sampling: Sampling, memory: Memory | None = None
) -> Generator[str, None, Completion]:
    """Yield the new text piece by piece; the generator's value is the Completion. Same tokens as generate.

    A step is one call of the jitted function, so that text can be shown at once. Raises UsageError as generate does.
    """
    memory = Memory() if memory is None else memory
    row = list(prompt)
    check_row(row, model.arch.vocab_size, model.arch.max_position, "the prompt", sampling.max_new_tokens)
    rule, made, shown = rule_of(model, sampling), 0, 0
    tokens, logprobs = [], []
    with on(model):
        cache, known = _room(model, memory, row, min(len(row) + sampling.max_new_tokens, model.arch.max_position))
        memory.cache, memory.tokens = None, []  # its buffers are given away now
        fresh = row[known:]
        chunk, segments = pad_right([fresh], min(bucket(len(fresh)), model.arch.max_position))
        seeds = np.asarray([[sampling.seed, 0]], np.uint32)
        state = prefill(model.arch, model.compute, model.params, chunk, segments, cache, seeds, np.ones(1, bool), rule)
        try:
            while True:
                if made:
                    state = advance(model.arch, model.compute, model.params, state, np.int32(made + 1), rule)
                tokens.append(int(state.tokens[0, made]))
                logprobs.append(float(state.logprobs[0, made]))
                made += 1
                ended = bool(state.done[0])
                text = model.tokenizer.decode(tokens[:-1] if ended else tokens, skip_special=True)
                last = ended or made == sampling.max_new_tokens
                if last or not text.endswith(REPLACEMENT):
                    if text[shown:]:
                        yield text[shown:]
                    shown = len(text)
                if last:
                    break
        finally:  # also when the reader stops listening
            if not state.cache.k.is_deleted():
                memory.cache, memory.tokens = state.cache, (row + tokens)[: int(state.cache.length[0])]
    return completion(model, row, tokens, logprobs, rule)


def _room(model: Model, memory: Memory, row: list[int], slots: int) -> tuple[Cache, int]:
    """A cache of at least `slots` slots, and how many tokens of the row it holds (the last is always read anew)."""
    slots = min(bucket(slots, LEAST_SLOTS), model.arch.max_position)
    old = memory.cache
    if old is None:
        return new_cache(model, 1, slots), 0
    pairs = zip(memory.tokens, row[:-1], strict=False)
    known = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(memory.tokens), len(row) - 1))
    k, v = old.k, old.v
    if k.shape[2] < slots:
        k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, slots - x.shape[2]), (0, 0), (0, 0))) for x in (k, v))
    return Cache(k, v, jnp.full(1, known, jnp.int32)), known
