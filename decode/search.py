"""The host side of the searches that run whole inside jit: batches in, completions out."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from configs.errors import RunError, UsageError
from decode.beam import Judge, Search, search_beams
from decode.contrastive import search_contrastive
from decode.engine import Finished, on
from decode.load import Model
from decode.prompts import batches, bucket, pad_right
from decode.results import find_stop
from decode.rows import read_prompts
from decode.rule import make_rule
from decode.sampling import Sampling

ALIKE = (
    "num_beams",
    "num_return_sequences",
    "length_penalty",
    "early_stopping",
    "num_beam_groups",
    "diversity_penalty",
)
NOTHING = np.zeros((0, 0))  # the likeliest tokens are not told while searching


def run_beams(
    model: Model,
    prompts: Sequence[list[int]],
    samplings: Sequence[Sampling],
    seeds: Sequence[int],
    *,
    batch_size: int | None = None,
    cache_dtype: Any = None,
    timeout: float | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[list[tuple[Finished, float]]]:
    """(sequence, score) of the num_return_sequences best of each prompt.

    batch_size: rows (prompts times beams) at a time. timeout: prompts whose batch has not begun by then have none.
    """
    first = samplings[0]
    _check_alike(samplings, ALIKE)
    if any(s.stop for s in samplings):
        raise UsageError("stop (texts) does not go with num_beams above 1: give stop_token_ids")
    start, K = time.perf_counter(), first.num_beams
    results: dict[int, list[tuple[Finished, float]]] = {}
    size = None if batch_size is None else max(1, batch_size // K)
    model = _ready(model, prompts, samplings, size)
    for batch in batches([len(row) for row in prompts], size):
        if timeout is not None and time.perf_counter() - start > timeout:
            late = Finished([], [], NOTHING, NOTHING, "timeout", None, time.perf_counter() - start)
            results |= {i: [(late, float("-inf"))] * first.num_return_sequences for i in batch}
            continue
        filled = batch + batch[:1] * ((size or len(batch)) - len(batch))  # the last batch needs no compile of its own
        found = _search(model, [prompts[i] for i in filled], [samplings[i] for i in filled], [seeds[i] for i in filled],
                        cache_dtype, batch)  # fmt: skip
        tokens, logprobs, scores, lengths = found
        for n, i in enumerate(batch):
            ends = (() if samplings[i].ignore_eos else tuple(model.eos_ids)) + samplings[i].stop_token_ids
            results[i] = []
            for k in range(first.num_return_sequences):
                made = tokens[n, k, : lengths[n, k]].tolist()
                reason = "stop" if made and made[-1] in ends else "length"
                values = logprobs[n, k, : lengths[n, k]].tolist()
                end = Finished(made, values, NOTHING, NOTHING, reason, None, time.perf_counter() - start)
                results[i].append((end, float(scores[n, k])))
        progress(len(batch) * first.num_return_sequences)
    return [results[i] for i in range(len(prompts))]


def run_contrastive(
    model: Model,
    prompts: Sequence[list[int]],
    samplings: Sequence[Sampling],
    *,
    batch_size: int | None = None,
    cache_dtype: Any = None,
    timeout: float | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[Finished]:
    """The sequence that contrastive search finds for each prompt; batch_size: rows (prompts times top_k) at a time."""
    _check_alike(samplings, ("penalty_alpha", "top_k"))
    start, first, results = time.perf_counter(), samplings[0], {}
    size = None if batch_size is None else max(1, batch_size // first.top_k)
    model = _ready(model, prompts, samplings, size)
    dtype = jnp.dtype(cache_dtype or model.compute.dtype)
    for batch in batches([len(row) for row in prompts], size):
        if timeout is not None and time.perf_counter() - start > timeout:
            late = Finished([], [], NOTHING, NOTHING, "timeout", None, time.perf_counter() - start)
            results |= dict.fromkeys(batch, late)
            continue
        filled = batch + batch[:1] * ((size or len(batch)) - len(batch))
        rows, each = [prompts[i] for i in filled], [samplings[i] for i in filled]
        tokens, segments = pad_right(rows, min(bucket(max(map(len, rows))), model.arch.max_position))
        rule = make_rule(each, [len(row) for row in rows], [(0, 0)] * len(rows), model.eos_ids, model.arch.vocab_size)
        with on(model):
            out = search_contrastive(
                model.arch, model.compute, model.params, tokens, segments, rule,
                np.float32(first.penalty_alpha), min(first.top_k, model.arch.vocab_size),
                bucket(int(rule.limit.max())), dtype,
            )  # fmt: skip
        found, made, logprobs, failed = (np.asarray(x) for x in out)
        _check_failed(batch, failed)
        for n, i in enumerate(batch):
            new = found[n, len(prompts[i]) : len(prompts[i]) + made[n]].tolist()
            ended = new[-1] in rule.stop_ids[n]
            cut = find_stop(model.tokenizer, new[:-1] if ended else new, samplings[i].texts)
            new = new if cut is None else new[: cut.tokens]
            reason = "stop" if ended or cut is not None else "length"
            seconds = time.perf_counter() - start
            results[i] = Finished(new, logprobs[n, : len(new)].tolist(), NOTHING, NOTHING, reason, cut, seconds)
        progress(len(batch))
    return [results[i] for i in range(len(prompts))]


def _ready(model: Model, prompts: Sequence[list[int]], samplings: Sequence[Sampling], size: int | None) -> Model:
    """The model for this many batches."""
    longest = max(sampling.limit(len(row)) for sampling, row in zip(samplings, prompts, strict=True))
    return model.ready(longest * (-(-len(prompts) // size) if size else 1))


def _check_alike(samplings: Sequence[Sampling], names: Sequence[str]) -> None:
    for name in names:
        if any(getattr(s, name) != getattr(samplings[0], name) for s in samplings):
            raise UsageError(f"{name} must be the same for all prompts of a call")


def _check_failed(names: list[int], failed: np.ndarray) -> None:
    for name, step in zip(names, failed[: len(names)], strict=True):
        if step >= 0:
            raise RunError(
                f"prompt {name + 1}: the logits of new token {step + 1} are not finite: the weights or a logits "
                "processor are broken, or the processors leave no token"
            )


def _search(
    model: Model,
    rows: list[list[int]],
    samplings: list[Sampling],
    seeds: list[int],
    cache_dtype: Any,
    names: list[int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, log-probs, scores and lengths of the pool of one batch."""
    K, first = samplings[0].num_beams, samplings[0]
    tokens, segments = pad_right(rows, min(bucket(max(map(len, rows))), model.arch.max_position))
    each = [s for s in samplings for _ in range(K)]
    rule = make_rule(
        each, [len(row) for row in rows for _ in range(K)], [(seed, 0) for seed in seeds for _ in range(K)],
        model.eos_ids, model.arch.vocab_size, beams=K,
    )  # fmt: skip
    ends = max(int((rule.stop_ids >= 0).sum(1).max()), 1)
    # more change nothing (one compile serves up to 7 ends) but draws: their number is part of the distribution
    candidates = 1 + ends if rule.drawn else 1 << max(ends, 4).bit_length()
    search = Search(K, candidates, rule.drawn, first.num_beam_groups)
    wide = np.float64 if model.compute.dtype == jnp.float64 else np.float32
    judge = Judge(
        wide(first.length_penalty), np.bool_(first.early_stopping is True), np.bool_(first.early_stopping == "never"),
        wide(first.diversity_penalty),
    )  # fmt: skip
    dtype = jnp.dtype(cache_dtype or model.compute.dtype)
    with on(model):
        read = read_prompts(model.arch, model.compute, model.params, tokens, segments, dtype)
        beams, failed = search_beams(
            model.arch, model.compute, model.params, read, tokens, segments.sum(1).astype(np.int32), rule, judge,
            search, bucket(int(rule.limit.max())),
        )  # fmt: skip
    _check_failed(names, np.asarray(failed))
    return tuple(np.asarray(x) for x in (beams.tokens, beams.logprobs, beams.score, beams.length))  # type: ignore[return-value]
