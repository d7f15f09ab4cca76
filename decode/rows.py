"""Rows in the making, on the device: read prompts, place them into rows, go on token by token. All jitted, all pure."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from decode.choose import first_largest, largest, sample
from decode.logits import Context, process
from decode.rule import Rule
from model import cache as kv
from model.architecture import Architecture
from model.cache import Buffer, Cache
from model.compute import Compute
from model.head import head_of, logits
from model.transformer import extend, read

NEVER = -1


@partial(jax.tree_util.register_dataclass, data_fields=("hidden", "k", "v"), meta_fields=())
@dataclass(frozen=True)
class Prompts:
    """F prompts as the model read them: the last token's hidden state, keys and values."""

    hidden: Float[Array, "F D"]
    k: Buffer
    v: Buffer


@partial(jax.tree_util.register_dataclass, data_fields=("logprobs", "ids", "values"), meta_fields=())
@dataclass(frozen=True)
class Told:
    """Log-probs of the new tokens [B, N], and of the k likeliest tokens at each (k may be 0), before processors."""

    logprobs: Float[Array, "B N"]
    ids: Int[Array, "B N k"]
    values: Float[Array, "B N k"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("cache", "context", "told", "rule", "done", "failed", "steps", "live", "draft"),
    meta_fields=(),
)
@dataclass(frozen=True)
class State:
    """B rows; the last token of each is chosen, but not in the cache yet. A guided cache has B more rows behind."""

    cache: Cache
    context: Context
    told: Told
    rule: Rule
    done: Bool[Array, "B"]
    failed: Int[Array, "B"]  # the first new token whose logits were not finite, or NEVER
    steps: Int[Array, ""]
    live: Int[Array, ""]  # rows that were not done, summed over the steps
    draft: Cache | None = None  # a draft model's, of the same tokens


@partial(jax.jit, static_argnames=("arch", "compute", "dtype"))
def read_prompts(
    arch: Architecture,
    compute: Compute,
    params: Any,
    tokens: Int[Array, "F T"],
    segments: Int[Array, "F T"],
    dtype: Any,
) -> Prompts:
    """Read prompts, padded on the right; their cache is kept as `dtype`."""
    hidden, k, v = read(arch, compute, params, tokens, segments)
    last = jnp.take_along_axis(hidden, segments.sum(1)[:, None, None] - 1, axis=1)[:, 0]
    return Prompts(last, kv.pack(k, dtype), kv.pack(v, dtype))


@partial(jax.jit, static_argnames=("arch", "compute", "prompts", "prompt_slots", "slots", "dtype", "draft"))
def empty(
    arch: Architecture,
    compute: Compute,
    rule: Rule,
    prompts: int,
    prompt_slots: int,
    slots: int,
    dtype: Any,
    draft: Architecture | None = None,
) -> State:
    """No rows yet: all are done. rule: any values, of the right shapes; draft: another model reads along.

    prompts: for how many there is room; 0: each row keeps its prompt among its own tokens.
    """
    rows = rule.limit.shape[0]
    copies = 1 if rule.guidance is None else 2
    sizes = slots if prompts else prompt_slots + slots, dtype
    cache = kv.init_cache(arch, copies * rows, *sizes, copies * prompts, prompt_slots, compute.apart)
    wide = jnp.promote_types(compute.dtype, jnp.float32)
    count = jnp.zeros(rows, jnp.int32)
    context = Context(jnp.zeros((rows, prompt_slots + slots + 1), jnp.int32), count, count)
    told = Told(
        jnp.zeros((rows, slots), wide),
        jnp.zeros((rows, slots, rule.logprobs), jnp.int32),
        jnp.zeros((rows, slots, rule.logprobs), wide),
    )
    zero = jnp.zeros((), jnp.int32)
    drafted = None if draft is None else kv.init_cache(draft, rows, *sizes, prompts, prompt_slots, compute.apart)
    return State(cache, context, told, rule, jnp.ones(rows, bool), jnp.full(rows, NEVER), zero, zero, drafted)


@partial(jax.jit, static_argnames=("arch",), donate_argnames=("state",))
def place(
    arch: Architecture,
    params: Any,
    state: State,
    prompts: Prompts,
    tokens: Int[Array, "F T"],
    lengths: Int[Array, "F"],
    source: Int[Array, "Q"],
    slot: Int[Array, "Q"],
    prompt_of: Int[Array, "R2"],
    row: Int[Array, "R"],
    rule: Rule,
    drafted: Prompts | None = None,
) -> State:
    """Start rows from prompts that were read, and choose the first new token of each.

    Prompt source[q] goes into the cache's prompt slot slot[q] if it has those; row row[r] starts after prompt
    prompt_of[r]. A slot or row beyond the last one is dropped. Guided: the second half of prompt_of are the prompts to
    lead away from.
    drafted: the prompts as the draft model read them.
    """
    first, rows = prompt_of[: rule.limit.shape[0]], state.done.shape[0]
    context, told = state.context, state.told
    cache_rows = row if rule.guidance is None else jnp.concatenate([jnp.where(row < rows, row, 2 * rows), row + rows])

    def put(buffer: Buffer, at: Array, new: Buffer, of: Array) -> Buffer:
        copy = lambda whole, part: whole.at[..., at, :, : part.shape[-2], :].set(part, mode="drop")  # noqa: E731
        return jax.tree.map(lambda whole, part: copy(whole, jnp.take(part, of, axis=-4)), buffer, new)

    def start(cache: Cache, prompts: Prompts) -> Cache:
        begun = lambda x, value: x.at[cache_rows].set(value, mode="drop")  # noqa: E731
        if cache.prompt_k is None:
            k, v = put(cache.k, cache_rows, prompts.k, prompt_of), put(cache.v, cache_rows, prompts.v, prompt_of)
            return replace(cache, k=k, v=v, length=begun(cache.length, lengths[prompt_of]))
        k, v = put(cache.prompt_k, slot, prompts.k, source), put(cache.prompt_v, slot, prompts.v, source)
        lasts = begun(cache.prompt_length, lengths[prompt_of])
        return replace(cache, prompt_k=k, prompt_v=v, prompt_length=lasts, length=begun(cache.length, 0))

    started = lengths[first]
    size = context.tokens.shape[1]
    full = jnp.pad(tokens[first], ((0, 0), (0, max(0, size - tokens.shape[1]))))[:, :size]
    # only what it looks at: a new row's context, not the whole state's
    fresh = Context(full, started, started)
    choice = choose(arch, params, rule, fresh, prompts.hidden[prompt_of])
    state = State(
        start(state.cache, prompts),
        Context(
            context.tokens.at[row].set(full, mode="drop"),
            context.prompt_length.at[row].set(started, mode="drop"),
            context.length.at[row].set(started, mode="drop"),
        ),
        told,
        jax.tree.map(lambda old, new: old.at[row].set(new, mode="drop"), state.rule, rule),
        state.done.at[row].set(False, mode="drop"),
        state.failed.at[row].set(NEVER, mode="drop"),
        state.steps,
        state.live,
        None if drafted is None or state.draft is None else start(state.draft, drafted),
    )
    return record(state, row, choice)


@partial(jax.jit, static_argnames=("arch", "compute"), donate_argnames=("state",))
def advance(
    arch: Architecture, compute: Compute, params: Any, state: State, steps: Int[Array, ""], enough: Int[Array, ""]
) -> State:
    """Go on for `steps` more steps, or until `enough` rows are done, or all."""
    until, rows = state.steps + steps, state.done.shape[0]

    def body(state: State) -> State:
        state, hidden = forward(arch, compute, params, state)
        rule = state.rule
        choice = choose(arch, params, rule, state.context, hidden)
        return record(state, jnp.arange(rows), choice, counted=True)

    return jax.lax.while_loop(lambda s: (s.steps < until) & (s.done.sum() < jnp.minimum(enough, rows)), body, state)


def forward(arch: Architecture, compute: Compute, params: Any, state: State) -> tuple[State, Float[Array, "B2 D"]]:
    """Read the last token of each row that is not done; a finished row's cache stands still."""
    context, guided = state.context, state.rule.guidance is not None
    last = jnp.take_along_axis(context.tokens, jnp.maximum(context.length - 1, 0)[:, None], axis=1)
    segments = (~state.done).astype(jnp.int32)[:, None]
    if guided:
        last, segments = jnp.tile(last, (2, 1)), jnp.tile(segments, (2, 1))
    hidden, cache = extend(arch, compute, params, last, segments, state.cache)
    return replace(state, cache=cache), hidden[:, 0]


@partial(jax.tree_util.register_dataclass, data_fields=("token", "logprob", "ids", "values", "fine"), meta_fields=())
@dataclass(frozen=True)
class Choice:
    """A token a row, its log-prob at rule.scale, the k likeliest and theirs; fine: the logits were finite."""

    token: Int[Array, "B"]
    logprob: Float[Array, "B"]
    ids: Int[Array, "B k"]
    values: Float[Array, "B k"]
    fine: Bool[Array, "B"]


def choose(arch: Architecture, params: Any, rule: Rule, context: Context, hidden: Float[Array, "B2 D"]) -> Choice:
    """Choose the token after `hidden` in each row.

    Classifier-free guidance (arXiv 2306.17806): scale * (log p - log p') + log p', p' without the prompt.
    """
    raw = logits(hidden[:, None], head_of(arch, params))[:, 0]
    if rule.guidance is None:
        processed = process(rule.processors, raw, context)
    else:
        raw, other = jnp.split(raw, 2)
        led, away, scale = jax.nn.log_softmax(raw), jax.nn.log_softmax(other), rule.guidance[:, None]
        # an unguided row's logits as they are: penalties look at the sign
        processed = process(rule.processors, jnp.where(scale == 1, raw, scale * (led - away) + away), context)
    token, normaliser = first_largest(processed), None
    if rule.drawn:
        drawn, normaliser = sample(processed, rule.seeds, context.length)
        token = jnp.where(rule.greedy, token, drawn)
    told = raw if rule.scale is None else raw / rule.scale[:, None].astype(raw.dtype)
    if normaliser is None or rule.processors or rule.guidance is not None:  # else one pass over V serves both
        normaliser = jax.nn.logsumexp(told, axis=-1)
    at = lambda x: jnp.take_along_axis(x, token[:, None], axis=1)[:, 0]  # noqa: E731
    values, ids = largest(told, rule.logprobs) if rule.logprobs else (told[:, :0], token[:, None][:, :0])
    fine = jnp.isfinite(normaliser) & jnp.isfinite(at(processed))
    return Choice(token, at(told) - normaliser, ids, values - normaliser[:, None], fine)


def record(state: State, row: Int[Array, "R"], choice: Choice, counted: bool = False) -> State:
    """Write the chosen tokens of these rows down where they are not done; a row beyond the last one is dropped."""
    context, told, rule, total = state.context, state.told, state.rule, state.done.shape[0]
    get = lambda x: x.at[row].get(mode="clip")  # noqa: E731
    live = ~get(state.done) & (row < total)
    target = jnp.where(live, row, total)
    length = get(context.length)
    made = length - get(context.prompt_length)
    put = lambda x, at, value: x.at[target, at].set(value, mode="drop")  # noqa: E731
    stopped = (choice.token[:, None] == get(rule.stop_ids)).any(1)
    ended = stopped | (made + 1 >= get(rule.limit)) | ~choice.fine
    return replace(
        state,
        context=replace(
            context,
            tokens=put(context.tokens, length, choice.token),
            length=context.length.at[target].add(1, mode="drop"),
        ),
        told=Told(
            put(told.logprobs, made, choice.logprob.astype(told.logprobs.dtype)),
            put(told.ids, made, choice.ids),
            put(told.values, made, choice.values.astype(told.values.dtype)),
        ),
        done=state.done.at[target].set(ended, mode="drop"),
        failed=state.failed.at[target].set(jnp.where(choice.fine, NEVER, made), mode="drop"),
        steps=state.steps + counted,
        live=state.live + (live.sum() if counted else 0),
    )


@partial(jax.jit, donate_argnames=("state",))
def finish(state: State, rows: Bool[Array, "B"]) -> State:
    """Take these rows as done."""
    return replace(state, done=state.done | rows)


@partial(jax.jit, static_argnames=("arch", "compute"), donate_argnames=("cache",))
def read_on(
    arch: Architecture,
    compute: Compute,
    params: Any,
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    cache: Cache,
) -> tuple[Float[Array, "B D"], Cache]:
    """Read more tokens (padding on the right) behind what the cache holds; the last one's hidden state."""
    hidden, cache = extend(arch, compute, params, tokens, segments, cache)
    return jnp.take_along_axis(hidden, segments.sum(1)[:, None, None] - 1, axis=1)[:, 0], cache


@partial(jax.jit, static_argnames=("arch",), donate_argnames=("cache",))
def begin(
    arch: Architecture,
    params: Any,
    cache: Cache,
    tokens: Int[Array, "B S"],
    lengths: Int[Array, "B"],
    hidden: Float[Array, "B D"],
    rule: Rule,
) -> State:
    """Rows whose prompts the cache holds among their own tokens; the first new token of each is chosen."""
    context, rows = Context(tokens, lengths, lengths), tokens.shape[0]
    choice = choose(arch, params, rule, context, hidden)
    wide, slots = choice.logprob.dtype, cache.slots
    told = Told(
        jnp.zeros((rows, slots), wide),
        jnp.zeros((rows, slots, rule.logprobs), jnp.int32),
        jnp.zeros((rows, slots, rule.logprobs), wide),
    )
    zero = jnp.zeros((), jnp.int32)
    state = State(cache, context, told, rule, jnp.zeros(rows, bool), jnp.full(rows, NEVER), zero, zero)
    return record(state, jnp.arange(rows), choice)
