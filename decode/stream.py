"""One sequence, its text as it comes; what the cache already holds of a conversation is not computed again."""

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from configs.errors import RunError, UsageError
from decode.engine import Finished, on
from decode.generate import Completion, Sampling, check_fits, completion
from decode.load import Model
from decode.prompts import bucket, pad_right
from decode.results import Teller, find_stop
from decode.rows import NEVER, State, advance, begin, read_on
from decode.rule import make_rule
from model.cache import Cache, init_cache

LEAST_SLOTS = 256  # a conversation grows: start with room, so that the first turns share their compiles
CHUNK = 256  # tokens of a prompt read at a time


@dataclass
class Memory:
    """What a conversation's cache holds: pass the same one to every turn."""

    tokens: list[int] = field(default_factory=list)
    cache: Cache | None = None


def stream(
    model: Model, prompt: Sequence[int], sampling: Sampling, memory: Memory | None = None
) -> Generator[str, None, Completion]:
    """Yield the new text piece by piece; the generator's value is the Completion. Same tokens as generate.

    A step is one call of the jitted function, so that text can be shown at once. Raises UsageError as generate does,
    and for what needs more than one row at a time: several samples, beams, guidance.
    """
    memory, began = Memory() if memory is None else memory, time.perf_counter()
    row = list(prompt)
    check_fits(model, row, sampling, "the prompt")
    check_single(sampling)
    rule = make_rule([sampling], [len(row)], [(sampling.seed, 0)], model.eos_ids, model.arch.vocab_size)
    limit = int(rule.limit[0])
    model = model.ready(0)
    teller, tokens, cut = Teller(model.tokenizer, sampling.texts), [], None
    with on(model):
        cache, known = _room(model, memory, row, min(len(row) + limit, model.arch.max_position))
        memory.cache, memory.tokens = None, []  # its buffers are given away now
        state = _start(model, cache, row, known, rule)
        try:
            while True:
                if tokens:
                    state = advance(model.arch, model.compute, model.params, state, np.int32(1), np.int32(1))
                if int(state.failed[0]) != NEVER:
                    raise RunError(f"the logits of new token {len(tokens) + 1} are not finite")
                tokens.append(int(state.context.tokens[0, len(row) + len(tokens)]))
                done = bool(state.done[0])
                ended = done and tokens[-1] in rule.stop_ids[0]
                shown = tokens[:-1] if ended else tokens
                cut = find_stop(model.tokenizer, shown, sampling.texts, len(tokens) - 1)
                if cut is None and not done:
                    piece = teller.more(tokens)
                else:
                    whole = model.tokenizer.decode(shown, skip_special=True) if cut is None else cut.text
                    piece = teller.rest(whole)
                if piece:
                    yield piece
                if done or cut is not None:
                    break
        finally:  # also when the reader stops listening
            if not state.done.is_deleted():
                memory.cache, memory.tokens = state.cache, (row + tokens)[: int(state.cache.length[0])]
    logprobs, ids, values = jax.device_get((state.told.logprobs, state.told.ids, state.told.values))
    n = len(tokens)
    reason = "stop" if ended or cut is not None else "length"
    end = Finished(
        tokens, logprobs[0, :n].tolist(), ids[0, :n], values[0, :n], reason, cut, time.perf_counter() - began
    )  # fmt: skip
    return completion(model, row, end, sampling)


def check_single(sampling: Sampling) -> None:
    """Raise UsageError for what needs more than one row."""
    more = {"num_return_sequences": sampling.num_return_sequences > 1, "best_of": (sampling.best_of or 1) > 1,
            "num_beams": sampling.num_beams > 1, "guidance_scale": sampling.guidance_scale != 1,
            "penalty_alpha": sampling.penalty_alpha > 0}  # fmt: skip
    if any(more.values()):
        raise UsageError(f"{', '.join(n for n, on in more.items() if on)}: not while text is shown as it comes")


def _start(model: Model, cache: Cache, row: list[int], known: int, rule: object) -> State:
    """Read what is new of the row, a chunk at a time, and choose the first new token."""
    fresh, hidden = row[known:], None
    for at in range(0, len(fresh), CHUNK):
        piece = fresh[at : at + CHUNK]
        tokens, segments = pad_right([piece], min(bucket(len(piece)), CHUNK))
        hidden, cache = read_on(model.arch, model.compute, model.params, tokens, segments, cache)
    tokens, lengths = pad_right([row], cache.slots + 1)[0], np.asarray([len(row)], np.int32)
    return begin(model.arch, model.params, cache, tokens, lengths, hidden, rule)


def _room(model: Model, memory: Memory, row: list[int], slots: int) -> tuple[Cache, int]:
    """A cache of at least `slots` slots, and how many tokens of the row it holds (the last is always read anew)."""
    slots = min(bucket(slots, LEAST_SLOTS), model.arch.max_position)
    old = memory.cache
    if old is None:
        return init_cache(model.arch, 1, slots, model.compute.dtype, apart=model.compute.apart), 0
    pairs = zip(memory.tokens, row[:-1], strict=False)
    known = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(memory.tokens), len(row) - 1))
    if old.slots < slots:
        wider = ((0, 0), (0, 0), (0, slots - old.slots), (0, 0))
        longer = lambda x: jnp.pad(x, ((0, 0),) * (x.ndim - 4) + wider)  # noqa: E731
        old = replace(old, k=jax.tree.map(longer, old.k), v=jax.tree.map(longer, old.v))
    return replace(old, length=jnp.full(1, known, jnp.int32)), known
