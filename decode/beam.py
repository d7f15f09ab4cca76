"""Beam search, wholly inside jit: the prompt is read once and kept once, whatever the number of beams.

Semantics are those of transformers' beam search: `num_beams` running beams; max(2, 1 + number of stop tokens) times as
many candidates a step; a pool of the best num_beams finished ones, by score = sum of log-probs / length **
length_penalty; only a candidate among the num_beams best may enter it.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from decode.choose import gumbel_perturbed, largest
from decode.logits import Context, process
from decode.rows import NEVER, Prompts
from decode.rule import Rule
from model import cache as kv
from model.architecture import Architecture
from model.cache import Cache
from model.compute import Compute
from model.head import head_of, logits
from model.transformer import extend

LOW = -1e9  # the score of what is not there, as in transformers


@dataclass(frozen=True)
class Search:
    """What is compiled in."""

    num_beams: int
    candidates: int  # for each beam
    sampled: bool = False
    groups: int = 1


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("length_penalty", "always", "never", "diversity"),
    meta_fields=(),
)
@dataclass(frozen=True)
class Judge:
    """How finished beams are scored and when a prompt is done. always, never: early_stopping True and "never"."""

    length_penalty: Any
    always: Any
    never: Any
    diversity: Any = 0.0


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("tokens", "logprobs", "score", "length"),
    meta_fields=(),
)
@dataclass(frozen=True)
class Beams:
    """K beams of each of P prompts: new tokens, raw log-prob of each, score, how many tokens."""

    tokens: Int[Array, "P K N"]
    logprobs: Float[Array, "P K N"]
    score: Float[Array, "P K"]
    length: Int[Array, "P K"]

    def take(self, at: Int[Array, "P J"]) -> "Beams":
        """Some beams of each prompt."""
        return jax.tree.map(lambda x: _take(x, at), self)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("cache", "running", "pool", "finished", "open", "failed", "step"),
    meta_fields=(),
)
@dataclass(frozen=True)
class BeamState:
    """A search under way. `score` of running beams is their sum of processed log-probs, of the pool the final one."""

    cache: Cache
    running: Beams
    pool: Beams
    finished: Bool[Array, "P K"]  # is this place of the pool taken?
    open: Bool[Array, "P Q"]  # may this group still improve its pool?
    failed: Int[Array, "P"]
    step: Int[Array, ""]


@partial(jax.jit, static_argnames=("arch", "compute", "search", "slots"))
def search_beams(
    arch: Architecture,
    compute: Compute,
    params: Any,
    prompts: Prompts,
    tokens: Int[Array, "P T"],
    lengths: Int[Array, "P"],
    rule: Rule,
    judge: Judge,
    search: Search,
    slots: int,
) -> tuple[Beams, Int[Array, "P"]]:
    """(The best num_beams sequences of each prompt, best first; the first step whose logits were not finite, or -1).

    rule: one row for each beam [P * K]; a prompt's rows are alike. No host sync until the end.
    """
    P, K = lengths.shape[0], search.num_beams
    k, v = kv.blank(arch, P * K, slots, kv.dtype_of(prompts.k), compute.apart)
    rows = jnp.repeat(lengths, K)
    cache = Cache(k, v, jnp.zeros(P * K, jnp.int32), prompts.k, prompts.v, rows)
    wide = jnp.promote_types(prompts.hidden.dtype, jnp.float32)
    blank = Beams(
        jnp.zeros((P, K, slots), jnp.int32), jnp.zeros((P, K, slots), wide),
        jnp.full((P, K), LOW, wide), jnp.zeros((P, K), jnp.int32),
    )  # fmt: skip
    first = jnp.arange(K) % (K // search.groups) == 0  # one beam of each group: equal beams would stay equal
    running = replace(blank, score=jnp.broadcast_to(jnp.where(first, 0.0, LOW).astype(wide), (P, K)))
    state = BeamState(
        cache, running, blank, jnp.zeros((P, K), bool), jnp.ones((P, search.groups), bool),
        jnp.full(P, NEVER), jnp.zeros((), jnp.int32),
    )  # fmt: skip
    size = tokens.shape[1] + slots
    known = jnp.repeat(jnp.pad(tokens, ((0, 0), (0, size - tokens.shape[1]))), K, axis=0)
    place = rows[:, None] + jnp.arange(slots)[None]
    limit = rule.limit.max()

    def context(beams: Beams) -> Context:
        flat = beams.tokens.reshape(P * K, slots)
        whole = known.at[jnp.arange(P * K)[:, None], place].set(flat, mode="drop")
        return Context(whole, rows, rows + beams.length.reshape(-1))

    def choose(state: BeamState, hidden: Float[Array, "B D"]) -> BeamState:
        return _step(arch, params, state, hidden, context(state.running), rule, judge, search)

    def body(state: BeamState) -> BeamState:
        beams = state.running
        last = jnp.take_along_axis(beams.tokens, beams.length[..., None] - 1, axis=2).reshape(P * K, 1)
        hidden, cache = extend(arch, compute, params, last, jnp.ones_like(last), state.cache)
        return choose(replace(state, cache=cache), hidden[:, 0])

    state = choose(state, jnp.repeat(prompts.hidden, K, axis=0))
    going = lambda s: (s.step < limit) & s.open.any() & (s.failed < 0).all()  # noqa: E731
    state = jax.lax.while_loop(going, body, state)
    order = jnp.argsort(-state.pool.score, axis=1)  # groups have pools of their own
    return state.pool.take(order), state.failed


def _step(
    arch: Architecture,
    params: Any,
    state: BeamState,
    hidden: Float[Array, "B D"],
    context: Context,
    rule: Rule,
    judge: Judge,
    search: Search,
) -> BeamState:
    """One token further: candidates of every beam, the best go on, finished ones may enter the pool."""
    P, K = state.running.score.shape
    raw = jax.nn.log_softmax(logits(hidden[:, None], head_of(arch, params))[:, 0], axis=-1)
    processed = process(rule.processors, raw, context)
    fine = jnp.isfinite(processed.max(-1)).reshape(P, K).all(1) & ~jnp.isnan(raw.sum(-1)).reshape(P, K).any(1)
    V, size = raw.shape[1], K // search.groups
    raw, processed = raw.reshape(P, K, V), processed.reshape(P, K, V)
    parts, said = [], jnp.zeros((P, V), raw.dtype)
    for group in range(search.groups):
        own = slice(group * size, (group + 1) * size)
        beams, pool = (jax.tree.map(lambda x: x[:, own], b) for b in (state.running, state.pool))  # noqa: B023
        scored = processed[:, own] if search.groups == 1 else processed[:, own] - judge.diversity * said[:, None]
        total = (scored + beams.score[:, :, None]).reshape(P, size * V)
        parts.append(_continue(
            beams, pool, raw[:, own], total, state.finished[:, own], state.open[:, group], state.step, rule, judge,
            search,
        ))  # fmt: skip
        if group + 1 < search.groups:
            latest = jnp.take(parts[-1][0].tokens, state.step, axis=2)
            said = said.at[jnp.arange(P)[:, None], latest].add(state.open[:, group, None].astype(said.dtype))
    running, pool, finished, open_, parents = zip(*parts, strict=True)
    join = lambda trees: jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *trees)  # noqa: E731
    parent = jnp.concatenate([p + g * size for g, p in enumerate(parents)], axis=1)
    rows = (jnp.arange(P)[:, None] * K + parent).reshape(-1)
    return BeamState(
        kv.reorder(state.cache, rows), join(running), join(pool), jnp.concatenate(finished, axis=1),
        jnp.stack(open_, axis=1), jnp.where(fine | (state.failed >= 0), state.failed, state.step), state.step + 1,
    )  # fmt: skip


def _continue(
    beams: Beams,
    pool: Beams,
    raw: Float[Array, "P K V"],
    total: Float[Array, "P KV"],
    finished: Bool[Array, "P K"],
    open_: Bool[Array, "P"],
    step: Int[Array, ""],
    rule: Rule,
    judge: Judge,
    search: Search,
) -> tuple[Beams, Beams, Bool[Array, "P K"], Bool[Array, "P"], Int[Array, "P K"]]:
    """One group's step: (running beams, pool, finished, still open, the beam that each running one goes on from)."""
    P, K, V = raw.shape
    count = search.candidates * K
    if search.sampled:  # draws without replacement, then in order of score
        seeds = rule.seeds[:: rule.seeds.shape[0] // P]
        at = largest(gumbel_perturbed(total, seeds, jnp.broadcast_to(step, (P,))), count)[1]
        score, order = jax.lax.top_k(_take(total, at), count)
        at = _take(at, order)
    else:
        score, at = largest(total, count)
    parent, token = at // V, at % V
    chosen = jnp.take_along_axis(raw.reshape(P, K * V), at, axis=1)
    longer = beams.take(parent)
    put = lambda x, value: x.at[:, :, step].set(value.astype(x.dtype), mode="drop")  # noqa: E731
    longer = Beams(put(longer.tokens, token), put(longer.logprobs, chosen), score, longer.length + 1)
    every = rule.limit.shape[0] // P
    stops, limit = rule.stop_ids[::every], rule.limit[::every]
    stopped = (token[:, :, None] == stops[:, None]).any(-1)
    ended = stopped | (step + 1 >= limit)[:, None]
    going = score + jnp.where(stopped, LOW, 0.0)
    going, on = jax.lax.top_k(going, K)
    running = replace(longer.take(on), score=going)
    length = (step + 1).astype(score.dtype)
    final = score / length**judge.length_penalty
    full = finished.all(1) & judge.always
    allowed = ended & (jnp.arange(count) < K)[None]
    final += jnp.where(full, LOW, 0.0)[:, None] + jnp.where(open_, 0.0, LOW)[:, None] + jnp.where(allowed, 0.0, LOW)
    best, of = jax.lax.top_k(jnp.concatenate([pool.score, final], axis=1), K)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), pool, longer)
    pool = replace(both.take(of), score=best)
    finished = _take(jnp.concatenate([finished, allowed], axis=1), of)
    # can the best running beam still come before the worst of the pool?
    hoped = jnp.where(judge.never & (judge.length_penalty > 0), limit, step + 1).astype(score.dtype)
    possible = running.score[:, 0] / hoped**judge.length_penalty
    worst = jnp.where(finished, best.min(1, keepdims=True), LOW)
    open_ &= (possible[:, None] > worst).any(1) & ~(finished.all(1) & judge.always) & (step + 1 < limit)
    return running, pool, finished, open_, _take(parent, on)


def _take(x: Shaped[Array, "P K *rest"], at: Int[Array, "P J"]) -> Any:
    """x[p, at[p, j]]."""
    return jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 2)), axis=1)
