"""The device side of the decoding parameters: one row of arrays for each row of a batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, UInt

from configs.errors import UsageError
from decode import constraints as c
from decode import logits as w
from decode.prompts import bucket
from decode.sampling import Sampling

DRAWN = Sampling(temperature=1.0)  # every warper off
Array = Any  # of numpy on the host, of jax inside jit


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("processors", "stop_ids", "limit", "seeds", "greedy", "guidance", "scale"),
    meta_fields=("drawn", "logprobs"),
)
@dataclass(frozen=True)
class Rule:
    """How the next token of each row is chosen, and what ends the row. Every array leaf has a leading axis [B]."""

    processors: tuple[Any, ...]
    stop_ids: Int[Array, "B E"]
    limit: Int[Array, "B"]  # the most new tokens
    seeds: UInt[Array, "B 2"]
    greedy: Bool[Array, "B"]
    guidance: Float[Array, "B"] | None  # scale; the cache then has B more rows, without the prompt
    scale: Float[Array, "B"] | None  # the temperature of the log-probs that are told; None: 1
    drawn: bool  # some row is not greedy
    logprobs: int  # so many likeliest tokens are told

    def rows(self, index: Any) -> "Rule":
        """The rules of some rows."""
        return jax.tree.map(lambda x: x[index], self)


def make_rule(
    samplings: Sequence[Sampling],
    prompts: Sequence[int],
    seeds: Sequence[tuple[int, int]],
    eos_ids: Sequence[int],
    vocab_size: int,
    beams: int = 1,
) -> Rule:
    """The rules of rows with these parameters, prompt lengths and (seed, sample number).

    beams: rows that belong together in beam search. Raises UsageError for token ids outside the vocabulary, and for
    what must be one for all rows of a call and is not.
    """
    for sampling in set(map(id, samplings)):
        _check_ids(next(s for s in samplings if id(s) == sampling), vocab_size)
    ends = [(() if s.ignore_eos else tuple(eos_ids)) + s.stop_token_ids for s in samplings]
    return Rule(
        processors=_processors(samplings, prompts, ends, beams),
        stop_ids=id_table(ends, least=8),
        limit=np.asarray([s.limit(n) for s, n in zip(samplings, prompts, strict=True)], np.int32),
        seeds=np.asarray(seeds, np.uint32).reshape(-1, 2),
        greedy=np.asarray([s.temperature == 0 for s in samplings]),
        guidance=_numbers(samplings, "guidance_scale") if any(s.guidance_scale != 1 for s in samplings) else None,
        scale=_scales(samplings) if any(s.scaled_logprobs for s in samplings) else None,
        drawn=any(s.temperature > 0 for s in samplings),
        logprobs=max(s.logprobs for s in samplings),
    )


def _processors(
    samplings: Sequence[Sampling], prompts: Sequence[int], ends: list[tuple[int, ...]], beams: int
) -> tuple[Any, ...]:
    """The union of what the rows use, in transformers' order; where a row does not use one, its values are 'off'."""
    number = partial(_numbers, samplings)
    ids = lambda name: id_table([getattr(s, name) for s in samplings])  # noqa: E731
    one = lambda name: id_table([[] if (i := getattr(s, name)) is None else [i] for s in samplings])  # noqa: E731
    used = lambda name, off: any(getattr(s, name) != off for s in samplings)  # noqa: E731
    ending = id_table(ends)
    chain: list[Any] = []

    def add(wanted: bool, make: Callable[[], Any]) -> None:
        if wanted:
            chain.append(make())

    add(used("logit_bias", {}), lambda: _biases(samplings))
    add(used("repetition_penalty", 1), lambda: c.RepetitionPenalty(number("repetition_penalty")))
    add(used("presence_penalty", 0), lambda: c.PresencePenalty(number("presence_penalty")))
    add(used("frequency_penalty", 0), lambda: c.FrequencyPenalty(number("frequency_penalty")))
    add(used("no_repeat_ngram_size", 0), lambda: c.NoRepeatNgram(number("no_repeat_ngram_size", np.int32)))
    add(used("bad_words_ids", ()), lambda: _bad_words(samplings, ends))
    add(used("min_length", 0), lambda: c.MinLength(ending, number("min_length", np.int32)))
    add(used("min_new_tokens", 0), lambda: c.MinNewTokens(ending, number("min_new_tokens", np.int32)))
    prefix = _same(samplings, "prefix_allowed_tokens")
    add(prefix is not None, lambda: c.PrefixConstrained(prefix, beams))
    add(used("forced_bos_token_id", None), lambda: c.ForcedBos(one("forced_bos_token_id")[:, 0]))
    limits = np.asarray([s.limit(n) for s, n in zip(samplings, prompts, strict=True)], np.int32)
    add(used("forced_eos_token_id", None), lambda: c.ForcedEos(one("forced_eos_token_id"), limits))
    add(used("exponential_decay_length_penalty", None), lambda: _decay(samplings, ending))
    add(used("suppress_tokens", ()), lambda: c.SuppressTokens(ids("suppress_tokens")))
    after_bos = np.asarray([s.forced_bos_token_id is not None for s in samplings])
    add(used("begin_suppress_tokens", ()), lambda: c.BeginSuppressTokens(ids("begin_suppress_tokens"), after_bos))
    add(used("allowed_token_ids", ()), lambda: c.AllowedTokens(ids("allowed_token_ids")))
    chain += [own if _is_node(own) else w.Custom(own) for own in _same(samplings, "processors")]
    # a greedy row among drawn ones is not warped: typical_p, for one, would remove its likeliest token
    samplings = [s if s.temperature > 0 else DRAWN for s in samplings]
    number = partial(_numbers, samplings)
    if any(s is not DRAWN for s in samplings):
        # a search needs somewhere to go when every end is likely
        keep = np.asarray([1 if beams == 1 else 1 + max(1, len(e)) for e in ends], np.int32)
        add(used("temperature", 1), lambda: w.Temperature(number("temperature")))
        add(used("top_n_sigma", 0), lambda: w.TopNSigma(number("top_n_sigma")))
        add(used("top_h", 1), lambda: w.TopH(np.where(number("top_h") < 1, number("top_h"), 0)))  # its 0 is off
        add(used("top_k", 0), lambda: w.TopK(number("top_k", np.int32), keep))
        add(used("top_p", 1), lambda: w.TopP(number("top_p"), keep))
        add(used("min_p", 0), lambda: w.MinP(number("min_p"), keep))
        add(used("typical_p", 1), lambda: w.Typical(number("typical_p"), keep))
        add(used("epsilon_cutoff", 0), lambda: w.EpsilonCutoff(number("epsilon_cutoff"), keep))
        add(used("eta_cutoff", 0), lambda: w.EtaCutoff(number("eta_cutoff"), keep))
    return tuple(chain)


def id_table(lists: Sequence[Sequence[int]], least: int = 1) -> Int[np.ndarray, "B N"]:
    """Lists of token ids as rows of one length, filled up with -1; few lengths, so few compiles."""
    width = max((len(ids) for ids in lists), default=0)
    table = np.full((len(lists), least if width <= least else bucket(width, 8)), c.NO_TOKEN, np.int32)
    for row, ids in zip(table, lists, strict=True):
        row[: len(ids)] = ids
    return table


def _numbers(samplings: Sequence[Sampling], name: str, dtype: Any = np.float32) -> np.ndarray:
    return np.asarray([getattr(s, name) for s in samplings], dtype)


def _scales(samplings: Sequence[Sampling]) -> np.ndarray:
    return np.asarray([s.temperature if s.scaled_logprobs and s.temperature else 1 for s in samplings], np.float32)


def _same(samplings: Sequence[Sampling], name: str) -> Any:
    """What all rows of a call must share: functions are compiled in."""
    first = getattr(samplings[0], name)
    if any(getattr(s, name) != first for s in samplings):
        raise UsageError(f"{name} must be the same for all prompts of a call: it is compiled into the program")
    return first


def _is_node(processor: Any) -> bool:
    """Is it a registered dataclass, whose numbers are traced?"""
    return not jax.tree_util.all_leaves([processor])


def _biases(samplings: Sequence[Sampling]) -> Any:
    ids = id_table([list(s.logit_bias) for s in samplings])
    bias = np.zeros(ids.shape, np.float32)
    for row, s in zip(bias, samplings, strict=True):
        row[: len(s.logit_bias)] = list(s.logit_bias.values())
    return c.LogitBias(ids, bias)


def _bad_words(samplings: Sequence[Sampling], ends: list[tuple[int, ...]]) -> Any:
    """transformers never forbids a word that is an end-of-sequence token alone."""
    words = [
        [word for word in s.bad_words_ids if not (len(word) == 1 and word[0] in end)]
        for s, end in zip(samplings, ends, strict=True)
    ]
    count = bucket(max(1, *map(len, words)), 4)
    length = max((len(word) for row in words for word in row), default=1)
    return c.BadWords(np.stack([c.pad_words(row, count, length) for row in words]))


def _decay(samplings: Sequence[Sampling], ending: np.ndarray) -> Any:
    pairs = [s.exponential_decay_length_penalty or (0, 1.0) for s in samplings]
    starts, factors = zip(*pairs, strict=True)
    return c.ExponentialDecayLengthPenalty(ending, np.asarray(starts, np.int32), np.asarray(factors, np.float32))


def _check_ids(sampling: Sampling, vocab_size: int) -> None:
    """Refuse token ids that the model does not have, by name."""
    given = {
        "logit_bias": sampling.logit_bias,
        "bad_words_ids": [i for word in sampling.bad_words_ids for i in word],
        "forced_bos_token_id": () if sampling.forced_bos_token_id is None else [sampling.forced_bos_token_id],
        "forced_eos_token_id": () if sampling.forced_eos_token_id is None else [sampling.forced_eos_token_id],
    }
    names = ("allowed_token_ids", "suppress_tokens", "begin_suppress_tokens", "stop_token_ids")
    for name, ids in (given | {name: getattr(sampling, name) for name in names}).items():
        for token in ids:
            if not 0 <= token < vocab_size:
                raise UsageError(f"{name}: token id {token} is outside the model's vocabulary (0 to {vocab_size - 1})")
    if sampling.logprobs > vocab_size:
        raise UsageError(f"logprobs is {sampling.logprobs}: the vocabulary has {vocab_size} tokens")
