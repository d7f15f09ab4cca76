"""What the logits goldens are about: each of our processors beside transformers' own. No torch here."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decode import constraints as c
from decode import logits as p
from decode.logits import Context

FILE = Path(__file__).with_name("logits.npz")
ROWS, VOCAB, SLOTS, PROMPT = 4, 37, 24, 5
EOS = [3, 11]
WORDS = [[7], [2, 9], [4, 4, 4], [1, 2, 5], list(range(12)), [30, 6]]
BIASES = [0.5, -1.5, 2.0, 3.25, 1.0, -float("inf")]
EOS_IDS, WORD_IDS = np.asarray(EOS), c.pad_words(WORDS)


def even_after_odd(tokens: Any, length: Any) -> Any:
    """A constraint: behind an odd token only even ones, behind an even one only 1, 2 and 5."""
    allowed = jnp.zeros(VOCAB, bool).at[jnp.asarray([1, 2, 5])].set(True)
    return jnp.where(tokens[length - 1] % 2 == 1, jnp.arange(VOCAB) % 2 == 0, allowed)


# name -> ours, transformers' class, its arguments; LENGTH stands for the row's length
CASES: dict[str, tuple[tuple[Any, ...], str, dict[str, Any]]] = {
    "temperature": ((p.Temperature(0.7),), "TemperatureLogitsWarper", {"temperature": 0.7}),
    "top_k": ((p.TopK(5),), "TopKLogitsWarper", {"top_k": 5}),
    "top_k all": ((p.TopK(500),), "TopKLogitsWarper", {"top_k": 500}),
    "top_k fewest": ((p.TopK(1, 3),), "TopKLogitsWarper", {"top_k": 1, "min_tokens_to_keep": 3}),
    "top_p": ((p.TopP(0.8),), "TopPLogitsWarper", {"top_p": 0.8}),
    "top_p tiny": ((p.TopP(1e-6),), "TopPLogitsWarper", {"top_p": 1e-6}),
    "top_p fewest": ((p.TopP(0.1, 4),), "TopPLogitsWarper", {"top_p": 0.1, "min_tokens_to_keep": 4}),
    "min_p": ((p.MinP(0.15),), "MinPLogitsWarper", {"min_p": 0.15}),
    "min_p fewest": ((p.MinP(0.9, 3),), "MinPLogitsWarper", {"min_p": 0.9, "min_tokens_to_keep": 3}),
    "typical": ((p.Typical(0.6),), "TypicalLogitsWarper", {"mass": 0.6}),
    "typical fewest": ((p.Typical(0.01, 5),), "TypicalLogitsWarper", {"mass": 0.01, "min_tokens_to_keep": 5}),
    "epsilon": ((p.EpsilonCutoff(0.03),), "EpsilonLogitsWarper", {"epsilon": 0.03}),
    "epsilon fewest": ((p.EpsilonCutoff(0.9, 3),), "EpsilonLogitsWarper", {"epsilon": 0.9, "min_tokens_to_keep": 3}),
    "eta": ((p.EtaCutoff(0.1),), "EtaLogitsWarper", {"epsilon": 0.1}),
    "eta fewest": ((p.EtaCutoff(0.99, 12),), "EtaLogitsWarper", {"epsilon": 0.99, "min_tokens_to_keep": 12}),
    "top_h": ((p.TopH(0.5),), "TopHLogitsWarper", {"top_h": 0.5}),
    "repetition_penalty": ((c.RepetitionPenalty(1.3),), "RepetitionPenaltyLogitsProcessor", {"penalty": 1.3}),
    "repetition reward": ((c.RepetitionPenalty(0.8),), "RepetitionPenaltyLogitsProcessor", {"penalty": 0.8}),
    **{
        f"no_repeat_ngram {n}": ((c.NoRepeatNgram(n),), "NoRepeatNGramLogitsProcessor", {"ngram_size": n})
        for n in (1, 2, 3)
    },
    "min_new_tokens": (
        (c.MinNewTokens(EOS_IDS, 4),),
        "MinNewTokensLengthLogitsProcessor",
        {"prompt_length_to_skip": PROMPT, "min_new_tokens": 4, "eos_token_id": EOS},
    ),
    "min_length": (
        (c.MinLength(EOS_IDS, 9),),
        "MinLengthLogitsProcessor",
        {"min_length": 9, "eos_token_id": EOS},
    ),
    "bad_words": ((c.BadWords(WORD_IDS),), "NoBadWordsLogitsProcessor", {"bad_words_ids": WORDS}),
    "sequence_bias": (
        (c.SequenceBias(WORD_IDS, np.asarray(BIASES)),),
        "SequenceBiasLogitsProcessor",
        {"sequence_bias": [[word, bias] for word, bias in zip(WORDS, BIASES, strict=True)]},
    ),
    "suppress": (
        (c.SuppressTokens(np.asarray([0, 5, 36])),),
        "SuppressTokensLogitsProcessor",
        {"suppress_tokens": [0, 5, 36]},
    ),
    "begin_suppress": (
        (c.BeginSuppressTokens(np.asarray([8, 9])),),
        "SuppressTokensAtBeginLogitsProcessor",
        {"begin_suppress_tokens": [8, 9], "begin_index": PROMPT},
    ),
    "forced_bos": ((c.ForcedBos(2),), "ForcedBOSTokenLogitsProcessor", {"bos_token_id": 2}),
    "forced_eos": (
        (c.ForcedEos(EOS_IDS, 8),),
        "ForcedEOSTokenLogitsProcessor",
        {"max_length": PROMPT + 8, "eos_token_id": EOS},
    ),
    "exponential_decay": (
        (c.ExponentialDecayLengthPenalty(EOS_IDS, 2, 1.1),),
        "ExponentialDecayLengthPenalty",
        {"exponential_decay_length_penalty": (2, 1.1), "eos_token_id": EOS, "input_ids_seq_length": PROMPT},
    ),
    "prefix": (
        (c.PrefixConstrained(even_after_odd),),
        "PrefixConstrainedLogitsProcessor",
        {
            "prefix_allowed_tokens_fn": lambda _, row: np.flatnonzero(
                even_after_odd(jnp.asarray(row.numpy()), len(row))
            ).tolist(),
            "num_beams": 1,
        },
    ),
}


def draw(seed: int, length: int, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, V], some removed before, and rows [B, S] of few different tokens, rubbish behind `length`."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(ROWS, VOCAB)) * rng.choice([0.5, 2, 6], size=(ROWS, 1))
    logits[rng.random(logits.shape) < 0.1] = -np.inf
    logits[:, [6, 11]] = np.abs(logits[:, [6, 11]])  # something always stays
    logits[~np.isfinite(logits[:, 11]), 11] = 0.5
    logits[~np.isfinite(logits[:, 6]), 6] = 0.25
    tokens = rng.choice([1, 2, 4, 9, 7, 11, 36, 30], size=(ROWS, SLOTS), p=[0.2, 0.2, 0.3, 0.1, 0.05, 0.05, 0.05, 0.05])
    return logits.astype(dtype), tokens.astype(np.int32)


def context_of(tokens: np.ndarray, length: int) -> Context:
    """All rows with the same lengths, as transformers has them."""
    return Context(jnp.asarray(tokens), jnp.full(ROWS, PROMPT), jnp.full(ROWS, length))


def ours(name: str, logits: np.ndarray, tokens: np.ndarray, length: int) -> np.ndarray:
    """Our processor's result."""
    return np.asarray(RUN(CASES[name][0], jnp.asarray(logits), context_of(tokens, length)))


RUN = jax.jit(p.process)


def same(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """The same tokens removed, the same logits up to the tolerance."""
    assert (np.isfinite(found) == np.isfinite(expected)).all()
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
