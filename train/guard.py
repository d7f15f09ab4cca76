"""Steps that would do harm, a loss or gradient that is no number or a spike, change nothing."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from train.state import State

Tree = Any
KEY = "guard"  # in State.carried: outlives a step, is saved with it, and so resumes bitwise
DECAY, GOOD = 0.98, 20  # of the running average of log-norms; good steps before spikes are looked for


@dataclass(frozen=True)
class Guard:
    """A step is bad when its loss or gradient norm is not finite, or the norm is above spike_factor x the average."""

    spike_factor: float | None = None


def start_guard() -> dict[str, Array]:
    """Nothing seen yet. bad: steps in a row that were bad, up to now; skipped: all that the weights know nothing of."""
    zero = jnp.zeros((), jnp.int32)
    return {"log_norm": jnp.zeros((), jnp.float32), "good": zero, "bad": zero, "skipped": zero, "rollbacks": zero}


def judge(
    guard: Guard, seen: dict[str, Array], total: Float[Array, ""], norm: Float[Array, ""]
) -> tuple[Bool[Array, ""], dict[str, Array]]:
    """Whether a step is bad, and what has been seen with it; only good steps move the average."""
    log = jnp.log(norm).astype(jnp.float32)
    bad = ~(jnp.isfinite(total) & jnp.isfinite(norm))
    if guard.spike_factor is not None:
        bad |= (seen["good"] >= GOOD) & (log > seen["log_norm"] + math.log(guard.spike_factor))
    counts = ~bad & (norm > 0)  # a batch without anything to learn tells nothing
    good = seen["good"] + counts
    rate = jnp.maximum(1 - DECAY, 1 / jnp.maximum(good, 1))  # of the first steps the plain mean
    mean = jnp.where(counts, seen["log_norm"] + rate.astype(jnp.float32) * (log - seen["log_norm"]), seen["log_norm"])
    in_a_row = jnp.where(bad, seen["bad"] + 1, 0)
    return bad, {**seen, "log_norm": mean, "good": good, "bad": in_a_row, "skipped": seen["skipped"] + bad}


def keep_good(
    guard: Guard, old: State, new: State, total: Float[Array, ""], norm: Float[Array, ""]
) -> tuple[State, dict[str, Array]]:
    """The new state, or the old one with only its step counted on; and what to tell of it."""
    bad, seen = judge(guard, old.carried[KEY], total, norm)
    kept = jax.tree.map(partial(jnp.where, bad), replace(old, step=new.step), new)
    average = jnp.where(seen["good"] > 0, jnp.exp(seen["log_norm"]), jnp.nan)
    told = {"skipped": bad, "skipped_steps": seen["skipped"], "bad_steps": seen["bad"], "grad_norm_average": average}
    return replace(kept, carried={**kept.carried, KEY: seen}), told


def roll_back(restored: State, step: int, rollbacks: int) -> State:
    """A restored state that goes on behind `step`, older weights and newer data: what is between is skipped."""
    seen = {**restored.carried[KEY]}
    skipped = int(seen["skipped"]) + step - int(restored.step)
    changes = {"bad": 0, "skipped": skipped, "rollbacks": rollbacks}
    for name, value in changes.items():
        seen[name] = jax.device_put(np.int32(value), seen[name].sharding)
    at = jax.device_put(np.int32(step), restored.step.sharding)
    return replace(restored, step=at, carried={**restored.carried, KEY: seen})


def count_of(state: State, name: str) -> int:
    """One of the guard's counts; 0 without a guard."""
    return int(state.carried[KEY][name]) if KEY in state.carried else 0
