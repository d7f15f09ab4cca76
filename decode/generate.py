"""Complete prompts: the one entry to sampling, beam search, contrastive search and speculative decoding."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from configs.errors import UsageError
from decode.engine import Finished, Row, Stats, run
from decode.load import Model
from decode.prompts import Prompt, check_row, encode_prompt, unpad
from decode.results import Completion, Top
from decode.rule import make_rule
from decode.sampling import SEEDS, Sampling
from decode.search import run_beams, run_contrastive
from decode.speculate import Guess

__all__ = ["Completion", "Sampling", "Stats", "generate"]

GREEDY = Sampling()
Heard = Callable[[int, int, str], None]


def generate(
    model: Model,
    prompts: Sequence[Prompt] | np.ndarray,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    *,
    attention_mask: np.ndarray | None = None,
    seeds: Sequence[int] | None = None,
    batch_size: int | None = None,
    timeout: float | None = None,
    cache_dtype: Any = None,
    hear: Heard | None = None,
    progress: Callable[[int], None] = lambda rows: None,
    stats: Stats | None = None,
    draft: Model | None = None,
) -> list[Completion]:
    """Complete every prompt: num_return_sequences completions each, in the order of the prompts.

    prompts: text (the tokenizer's default special tokens are added), token ids, or messages (through the chat
    template); or, with attention_mask, an array [B, T] padded on either side. sampling: one for all, or one a prompt.
    seeds: one a prompt, instead of seed + its number. batch_size: rows at a time (None = all at once); as soon as one
    is done, the next takes its place. timeout, in seconds: what is not done by then ends as it is. cache_dtype: of the
    KV cache: None = the compute dtype, "bfloat16" or "int8". hear(prompt, sample, piece): text as it comes. progress
    hears how many rows are done. draft: a smaller model with the same tokens that guesses num_assistant_tokens at a
    time; the result is the same, sooner.

    Raises UsageError before any compile, such as for a prompt that with max_new_tokens does not fit the context, and
    RunError when logits are not finite.
    """
    if attention_mask is not None:
        prompts = unpad(np.asarray(prompts), attention_mask)
    rows = [encode_prompt(model.tokenizer, prompt) for prompt in prompts]
    each = [sampling] * len(rows) if isinstance(sampling, Sampling) else list(sampling)
    if len(each) != len(rows):
        raise UsageError(f"{len(each)} samplings for {len(rows)} prompts: give one, or one a prompt")
    if cache_dtype not in (None, *CACHES):
        raise UsageError(f"cache_dtype is {cache_dtype!r}, allowed: {', '.join(CACHES)}")
    for number, (row, one) in enumerate(zip(rows, each, strict=True), 1):
        check_fits(model, row, one, f"prompt {number}")
    if seeds is None:
        seeds = [(one.seed + i) % SEEDS for i, one in enumerate(each)]
    if len(seeds) != len(rows):
        raise UsageError(f"{len(seeds)} seeds for {len(rows)} prompts: give one a prompt")
    if not rows:
        return []
    told = _prompt_logprobs(model, rows, each)
    how: Any = {"batch_size": batch_size, "cache_dtype": cache_dtype, "timeout": timeout, "progress": progress}
    beams, contrast = any(one.num_beams > 1 for one in each), any(one.penalty_alpha for one in each)
    if (beams or contrast) and (hear is not None or draft is not None):
        what = "text as it comes" if hear is not None else "a draft model"
        raise UsageError(f"{what} does not go with {'num_beams above 1' if beams else 'penalty_alpha'}")
    if beams:
        return _searched(model, rows, each, run_beams(model, rows, each, seeds, **how), told)
    if contrast:
        found = [[(end, float(sum(end.logprobs)))] for end in run_contrastive(model, rows, each, **how)]
        return _searched(model, rows, each, found, told)
    done = _sample(model, rows, each, seeds, how, hear, stats, draft)
    completions: list[Completion] = []
    for i, (one, ends) in enumerate(zip(each, done, strict=True)):
        mine = [completion(model, rows[i], end, one, told.get(i)) for end in ends]
        if one.best_of is not None:
            mine.sort(key=lambda c: -c.score / max(1, len(c.tokens)))
        completions += mine[: one.num_return_sequences]
    return completions


def _sample(
    model: Model,
    rows: list[list[int]],
    each: list[Sampling],
    seeds: Sequence[int],
    how: dict[str, Any],
    hear: Heard | None,
    stats: Stats | None,
    draft: Model | None,
) -> list[list[Finished]]:
    """All samples of each prompt, by the engine."""
    wanted = [(i, j) for i, one in enumerate(each) for j in range(one.samples)]  # (prompt, sample number)
    lengths = [len(rows[i]) for i, _ in wanted]
    pairs = [(seeds[i], j) for i, j in wanted]
    rule = make_rule([each[i] for i, _ in wanted], lengths, pairs, model.eos_ids, model.arch.vocab_size)
    negatives = [_negative(model, row, one, i) for i, (row, one) in enumerate(zip(rows, each, strict=True), 1)]
    away = {i: len(rows) + n for n, i in enumerate(i for i, row in enumerate(negatives) if row)}
    heard = None if hear is None else lambda row, piece: hear(wanted[row][0], wanted[row][1], piece)
    done = run(
        model, rows + [row for row in negatives if row], [Row(i, away.get(i), each[i].texts) for i, _ in wanted], rule,
        slots=how["batch_size"], cache_dtype=how["cache_dtype"], timeout=how["timeout"], progress=how["progress"],
        hear=heard, stats=stats, guess=_guess(model, each, draft, max(map(len, rows))), draft=draft,
    )  # fmt: skip
    ends = iter(done)
    return [[next(ends) for _ in range(one.samples)] for one in each]


CACHES = ("float32", "bfloat16", "float16", "int8")


def check_fits(model: Model, row: Sequence[int], sampling: Sampling, where: str) -> None:
    """Raise UsageError when a prompt and its new tokens do not fit the model's context or max_length."""
    limit = sampling.limit(len(row))
    check_row(row, model.arch.vocab_size, model.arch.max_position, where, max(limit, 0))
    if limit < 1:
        raise UsageError(
            f"{where} has {len(row)} tokens and max_length is {sampling.max_length}: no room for a new token; raise "
            "max_length or use max_new_tokens"
        )


def completion(model: Model, prompt: list[int], end: Finished, sampling: Sampling, told: Any = None) -> Completion:
    """The result of one row."""
    ends = sampling.stop_token_ids + (() if sampling.ignore_eos else tuple(model.eos_ids))
    stopped = end.reason == "stop" and end.cut is None and bool(end.tokens) and end.tokens[-1] in ends
    shown = end.tokens[:-1] if stopped else end.tokens
    text = model.tokenizer.decode(shown, skip_special=True) if end.cut is None else end.cut.text
    if sampling.echo:
        text = model.tokenizer.decode(prompt, skip_special=True) + text
    top = _tops(end.top_ids, end.top_values, sampling.logprobs) if sampling.logprobs else None
    return Completion(
        end.tokens, text, end.logprobs, float(sum(end.logprobs)), end.reason, prompt, top,
        None if told is None else told.logprobs, None if told is None or not sampling.logprobs else told.top_logprobs,
        end.seconds,
    )  # fmt: skip


def _searched(
    model: Model,
    rows: list[list[int]],
    each: list[Sampling],
    found: list[list[tuple[Finished, float]]],
    told: dict[int, Any],
) -> list[Completion]:
    """Completions of a search, with their scores; the likeliest tokens are scored afterwards."""
    done = [
        (i, replace(completion(model, rows[i], end, replace(each[i], logprobs=0), told.get(i)), score=score))
        for i, ends in enumerate(found)
        for end, score in ends
    ]
    top = max(one.logprobs for one in each)
    if not top:
        return [c for _, c in done]
    from decode.score import score

    scored = score(model, [c.prompt_tokens + c.tokens for _, c in done], top=top)
    likeliest = [(s.top_logprobs or [])[len(rows[i]) - 1 :] for (i, _), s in zip(done, scored, strict=True)]
    return [
        replace(c, top_logprobs=[dict(list(top.items())[: each[i].logprobs]) for top in mine])
        for (i, c), mine in zip(done, likeliest, strict=True)
    ]


def _tops(ids: np.ndarray, values: np.ndarray, count: int) -> list[Top]:
    return [dict(zip(i[:count].tolist(), v[:count].tolist(), strict=True)) for i, v in zip(ids, values, strict=True)]


def _guess(model: Model, each: list[Sampling], draft: Model | None, longest: int) -> Guess | None:
    """What is guessed ahead, if anything."""
    names = ("num_assistant_tokens",) if draft is not None else ("prompt_lookup_num_tokens", "max_matching_ngram_size")
    first = each[0]
    for name in names:
        if any(getattr(one, name) != getattr(first, name) for one in each):
            raise UsageError(f"{name} must be the same for all prompts of a call")
    if draft is None:
        count = first.prompt_lookup_num_tokens
        return Guess(count, first.max_matching_ngram_size) if count else None
    if any(one.prompt_lookup_num_tokens or one.guidance_scale != 1 for one in each):
        raise UsageError("a draft model goes with neither prompt_lookup_num_tokens nor guidance_scale")
    if draft.arch.vocab_size != model.arch.vocab_size:
        raise UsageError(
            f"the draft model has {draft.arch.vocab_size} tokens, the model {model.arch.vocab_size}: they must share a "
            "tokenizer"
        )
    if longest + max(one.limit(longest) for one in each) > draft.arch.max_position:
        raise UsageError(f"the draft model's context is {draft.arch.max_position}: too short for these prompts")
    return Guess(first.num_assistant_tokens, draft=(draft.arch, draft.compute))


def _negative(model: Model, row: list[int], sampling: Sampling, number: int) -> list[int]:
    """What guidance leads away from: none is the prompt's last token alone, as in transformers."""
    if sampling.guidance_scale == 1:
        return []
    if sampling.negative_prompt is None:
        return row[-1:]
    negative = encode_prompt(model.tokenizer, sampling.negative_prompt)
    check_fits(model, negative, sampling, f"the negative_prompt of prompt {number}")
    return negative


def _prompt_logprobs(model: Model, rows: list[list[int]], each: list[Sampling]) -> dict[int, Any]:
    """What is told of the prompts themselves, where it is asked for."""
    from decode.score import score

    asked = [i for i, one in enumerate(each) if one.prompt_logprobs]
    top = max((each[i].logprobs for i in asked), default=0)
    return dict(zip(asked, score(model, [rows[i] for i in asked], top=top), strict=True))
