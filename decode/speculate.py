"""Speculative decoding: guess several tokens, read them at once, keep what the model would have said itself.

A token is chosen at every guessed place exactly as without guessing (greedy, or a draw whose random bits come from the
row's seed and the position), and a guess counts if it is that token. So the output is plain decoding's own, token for
token, whatever guesses; a draft model guesses with the same random bits, which makes it agree often
("drafter-invariant" speculative decoding, arXiv 2408.07978).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from decode.logits import Context
from decode.rows import State, choose, record
from decode.rule import Rule
from model.architecture import Architecture
from model.cache import Cache
from model.compute import Compute
from model.transformer import extend


@dataclass(frozen=True)
class Guess:
    """How many tokens are guessed at a time; from the row's own past (the n-grams it knows), or by a draft model."""

    tokens: int
    ngram: int = 2
    draft: tuple[Architecture, Compute] | None = None


@partial(jax.jit, static_argnames=("arch", "compute", "guess"), donate_argnames=("state",))
def advance_guessing(
    arch: Architecture,
    compute: Compute,
    params: Any,
    draft: Any,
    state: State,
    steps: Int[Array, ""],
    enough: Int[Array, ""],
    guess: Guess,
) -> State:
    """Go on for `steps` more steps, each of one to guess.tokens + 1 tokens a row, or until `enough` rows are done."""
    until, total = state.steps + steps, state.done.shape[0]

    def body(state: State) -> State:
        if guess.draft is None:
            guessed = look_up(state.context, guess.tokens, guess.ngram)
        else:
            guessed, drafted = _draft(*guess.draft, draft, state, guess.tokens)
            state = replace(state, draft=drafted)
        return _verify(arch, compute, params, state, guessed)

    return jax.lax.while_loop(lambda s: (s.steps < until) & (s.done.sum() < jnp.minimum(enough, total)), body, state)


def look_up(context: Context, count: int, ngram: int) -> Int[Array, "B count"]:
    """What followed the last time that the row's last tokens (up to `ngram` of them, the most that match) came before.

    Rubbish where nothing matches: a wrong guess costs nothing but its place.
    """
    tokens, length = context.tokens, context.length
    slots = jnp.arange(tokens.shape[1])[None]
    run = jnp.zeros(tokens.shape, jnp.int32)  # how many tokens up to here equal the row's last ones
    alive = slots < length[:, None] - 1
    for back in range(ngram):
        last = jnp.take_along_axis(tokens, jnp.maximum(length - 1 - back, 0)[:, None], axis=1)
        moved = jnp.pad(tokens, ((0, 0), (back, 0)))[:, : tokens.shape[1]]
        alive &= (moved == last) & (slots >= back)
        run += alive
    best = (run * tokens.shape[1] + slots).argmax(1)  # the longest run, of those the latest
    at = best[:, None] + 1 + jnp.arange(count)[None]
    return jnp.take_along_axis(tokens, jnp.minimum(at, length[:, None] - 1), axis=1)


def _draft(
    arch: Architecture, compute: Compute, params: Any, state: State, count: int
) -> tuple[Int[Array, "B count"], Cache]:
    """The draft model's next tokens, chosen by the row's own rule; its cache afterwards holds all of them."""
    rows = jnp.arange(state.done.shape[0])
    last = jnp.take_along_axis(state.context.tokens, jnp.maximum(state.context.length - 1, 0)[:, None], axis=1)

    def step(carry: tuple[Context, Cache, Array], _: None) -> tuple[tuple[Context, Cache, Array], Array]:
        context, cache, last = carry
        hidden, cache = extend(arch, compute, params, last, jnp.ones_like(last), cache)
        token = choose(arch, params, state.rule, context, hidden[:, 0]).token
        tokens = context.tokens.at[rows, context.length].set(token, mode="drop")
        return (Context(tokens, context.prompt_length, context.length + 1), cache, token[:, None]), token

    assert state.draft is not None
    # one step more than there are guesses: the last guess is read too, since all may be right
    (_, cache, _), tokens = jax.lax.scan(step, (state.context, state.draft, last), None, length=count + 1)
    return tokens[:count].T, cache


def _verify(arch: Architecture, compute: Compute, params: Any, state: State, guessed: Int[Array, "B g"]) -> State:
    """Read the last token and the guesses; write down what the model says up to its first disagreement."""
    context, (B, g) = state.context, guessed.shape
    rows = jnp.arange(B)
    last = jnp.take_along_axis(context.tokens, jnp.maximum(context.length - 1, 0)[:, None], axis=1)
    read = jnp.concatenate([last, guessed], axis=1)
    hidden, cache = extend(arch, compute, params, read, jnp.ones_like(read), state.cache)
    at = context.length[:, None] + jnp.arange(g)[None]
    ahead = context.tokens.at[rows[:, None], at].set(guessed, mode="drop")
    repeat = lambda x: jnp.repeat(x, g + 1, axis=0)  # noqa: E731
    lengths = (context.length[:, None] + jnp.arange(g + 1)[None]).reshape(-1)
    seen = Context(repeat(ahead), repeat(context.prompt_length), lengths)
    rule: Rule = jax.tree.map(repeat, state.rule)
    choice = choose(arch, params, rule, seen, hidden.reshape(B * (g + 1), -1))
    tokens = choice.token.reshape(B, g + 1)
    right = jnp.cumprod(jnp.concatenate([jnp.ones((B, 1), bool), tokens[:, :-1] == guessed], axis=1), axis=1)
    leaves, tree = jax.tree.flatten(choice)
    by_place = [leaf.reshape(B, g + 1, *leaf.shape[1:]).swapaxes(0, 1) for leaf in leaves]

    def write(state: State, place: Any) -> tuple[State, None]:
        said, fine = place
        # behind a wrong guess nothing is said
        return record(state, jnp.where(fine > 0, rows, B), jax.tree.unflatten(tree, said)), None

    counted = replace(state, steps=state.steps + 1, live=state.live + (~state.done).sum())
    state, _ = jax.lax.scan(write, counted, (by_place, right.T))
    # all but the last token written down is in the caches; what they hold beyond is written over
    until = lambda c: replace(c, length=jnp.maximum(state.context.length - 1 - c.prompt_length, 0))  # noqa: E731
    return replace(state, cache=until(cache), draft=None if state.draft is None else until(state.draft))
