"""From token log-probs of packed rows to numbers per completion: pairs, or single completions with a label.

An example is a segment of a row; its branches 1 and 2 go on from a common prompt (branch 0).
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from model.architecture import Architecture
from model.compute import Compute
from model.head import head_of, token_logprobs, token_logprobs_and
from model.transformer import forward
from train.losses.pairs import Pairs, ld_weights, wide, wpo_weight
from train.losses.unpaired import Unpaired
from train.step import Batch, Norms

EDGES = (-20.0, -10.0, -5.0, -2.0, -1.0, -0.5, -0.2, -0.1, 0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)


def by_branch(
    values: Float[Array, "B T"], segments: Int[Array, "B T"], branches: Int[Array, "B T"], count: int = 2
) -> Float[Array, "B S {count}"]:
    """Sums over each of a segment's `count` branches, which have a token each: so S = T / count is enough."""
    B, T = values.shape
    S = T // count
    inside = (branches > 0) & (branches <= count)
    at = jnp.where(inside, (segments - 1) * count + branches - 1, S * count)
    rows = jnp.arange(B)[:, None]
    return jnp.zeros((B, S * count), values.dtype).at[rows, at].add(values, mode="drop").reshape(B, S, count)


def policy_logprobs(
    params: Any,
    batch: Batch,
    *,
    arch: Architecture,
    compute: Compute,
    chunk: int,
    where: Any = None,
    temperature: float = 1.0,
) -> Float[Array, "B T"]:
    """log p, at a temperature, of every target that carries loss, or is in `where`, in nats; 0 elsewhere."""
    hidden, where = _hidden(params, batch, arch, compute), batch["weights"] > 0 if where is None else where
    return token_logprobs(hidden, head_of(arch, params, compute.rules), batch["targets"], chunk, temperature, where)


def policy_logprobs_and(
    statistic: str,
    params: Any,
    batch: Batch,
    *,
    arch: Architecture,
    compute: Compute,
    chunk: int,
    where: Any = None,
    temperature: float = 1.0,
    learn: bool = False,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """The same, and a statistic of the distribution there (model/head.py), with a gradient if it is to learn."""
    hidden, where = _hidden(params, batch, arch, compute), batch["weights"] > 0 if where is None else where
    head = head_of(arch, params, compute.rules)
    return token_logprobs_and(statistic, hidden, head, batch["targets"], chunk, temperature, where, learn)


def _hidden(params: Any, batch: Batch, arch: Architecture, compute: Compute) -> Array:
    columns = batch["tokens"], batch["positions"], batch["segments"], batch.get("branches")
    return forward(arch, compute, params, *columns)


# Pairs: branch 1 is chosen, branch 2 rejected.


def pair_mask(batch: Batch) -> Bool[Array, "B S"]:
    """Which places hold a pair."""
    return by_branch(batch["weights"], batch["segments"], batch["branches"]).min(-1) > 0


def pair_weights(batch: Batch) -> Norms:
    """The denominators: pairs, and tokens of a likelihood term (of chosen completions; of them and their prompts)."""
    chosen, sequence = likelihood_weights(batch, "completion"), likelihood_weights(batch, "sequence")
    return {"pairs": pair_mask(batch).sum(dtype=chosen.dtype), "completion": chosen.sum(), "sequence": sequence.sum()}


def likelihood_weights(batch: Batch, tokens: str) -> Float[Array, "B T"]:
    """How much each prediction counts in -log p of chosen completions; "sequence": their prompts' predictions too."""
    if tokens == "completion":
        return jnp.where(batch["branches"] == 1, batch["weights"], 0)
    return ((batch["segments"] > 0) & (batch["branches"] < 2)).astype(batch["weights"].dtype)


def pairs_of(logprobs: Float[Array, "B T"], batch: Batch, ld_alpha: float = 1.0) -> Pairs:
    """Completions' sums, the policy's and (from the column ref_logprobs, else 0) the reference's, [B, S]."""
    segments, branches, weights = batch["segments"], batch["branches"], batch["weights"]
    counts = by_branch(weights, segments, branches)
    if ld_alpha != 1:
        least = jnp.take_along_axis(counts.min(-1), jnp.maximum(segments - 1, 0), axis=1)
        # positions in the completion: weights before this one in its branch
        weights = ld_weights(weights, _place(batch), least.astype(jnp.int32), ld_alpha)
    sums, ref = _sums(logprobs, batch, weights)
    return Pairs(sums[..., 0], sums[..., 1], ref[..., 0], ref[..., 1], counts[..., 0], counts[..., 1])


def pair_wpo_weights(logprobs: Float[Array, "B T"], squares: Float[Array, "B T"], batch: Batch) -> Float[Array, "B S"]:
    """WPO's weight of each pair: the product of its completions' (arXiv 2406.11827); no gradient."""
    by = lambda x: by_branch(x, batch["segments"], batch["branches"])  # noqa: E731
    weights = batch["weights"]
    return wpo_weight(by(logprobs * weights), by(squares * weights), by(weights)).prod(-1)


def _sums(logprobs: Array, batch: Batch, weights: Array, count: int = 2) -> tuple[Array, Array]:
    segments, branches = batch["segments"], batch["branches"]
    sums = by_branch(logprobs * weights, segments, branches, count)
    reference = batch.get("ref_logprobs")
    ref = jnp.zeros_like(sums) if reference is None else by_branch(reference * weights, segments, branches, count)
    return sums, ref


def _place(batch: Batch) -> Int[Array, "B T"]:
    """The number of each token in its completion, from 0."""
    learnt = (batch["weights"] > 0).astype(jnp.int32)
    before = jnp.cumsum(learnt, axis=1) - learnt
    new = (batch["branches"] != jnp.roll(batch["branches"], 1, axis=1)).at[:, 0].set(True)
    start = jnp.where(new, before, 0)
    return before - jnp.maximum.accumulate(start, axis=1)


# Single completions: branch 1 is the completion, branch 2 (for KTO) another example's.


def single_mask(batch: Batch, count: int = 2) -> Bool[Array, "B S"]:
    """Which places hold a completion."""
    return by_branch(batch["weights"], batch["segments"], batch["branches"], count)[..., 0] > 0


def single_weights(batch: Batch, count: int = 2) -> Norms:
    """The denominator: completions."""
    return {"completions": single_mask(batch, count).sum(dtype=batch["weights"].dtype)}


def singles_of(logprobs: Float[Array, "B T"], batch: Batch, count: int = 2) -> tuple[Unpaired, Unpaired | None]:
    """The labelled completions, and those that do not belong to their prompts (if count is 2), [B, S]."""
    sums, ref = _sums(logprobs, batch, batch["weights"], count)
    desirable = (
        by_branch(batch["desirable"] * batch["weights"], batch["segments"], batch["branches"], count)[..., 0] > 0
    )
    examples = [Unpaired(sums[..., i], ref[..., i], desirable) for i in range(count)]
    return examples[0], examples[1] if count > 1 else None


# Metrics.


def drift(logprobs: Float[Array, "B T"], batch: Batch, weights: Float[Array, "B T"]) -> dict[str, Any]:
    """{"kl": (sum, weight)} over tokens with a weight, in nats: half the mean square of log(policy / reference).

    The k2 estimate of KL(policy, reference) where the policy wrote the tokens (Schulman 2020), elsewhere a distance: k3
    would be ruled by single tokens that a policy has learnt to avoid. Nothing without reference.
    """
    if "ref_logprobs" not in batch:
        return {}
    ratio = wide(logprobs) - wide(batch["ref_logprobs"])
    return {"kl": ((weights * ratio**2).sum() / 2, weights.sum())}


def histogram(rewards: Float[Array, "*P"], mask: Bool[Array, "*P"]) -> tuple[Array, Array]:
    """(counts, total): how many rewards lie in each interval between EDGES, the first and the last without end."""
    at = jnp.searchsorted(jnp.asarray(EDGES, rewards.dtype), rewards, side="right")
    counts = jnp.zeros(len(EDGES) + 1, rewards.dtype).at[at].add(mask.astype(rewards.dtype))
    return counts, mask.sum(dtype=rewards.dtype)
