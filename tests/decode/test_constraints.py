"""Processors that look at the rows so far, against plain Python, one row at a time, each row with its own numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode import constraints as c
from decode.logits import Context, process

RUN = jax.jit(process)
VOCAB, SLOTS = 31, 16
LENGTHS = [1, 2, 5, 9, 13, 16]
PROMPTS = [1, 1, 5, 4, 6, 3]
ROWS = len(LENGTHS)


def draw(dtype=np.float32, seed=0):
    """Logits, some removed; rows of few different tokens, with rubbish behind each row's end."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(ROWS, VOCAB)) * 3
    logits[rng.random(logits.shape) < 0.1] = -np.inf
    tokens = rng.integers(0, 4, (ROWS, SLOTS))
    for row, length in zip(tokens, LENGTHS, strict=True):
        row[length:] = rng.choice([-7, -1, 0, 3, 10**6], SLOTS - length)
    return logits.astype(dtype), tokens.astype(np.int32)


def repetition(row, text, prompt, penalty):
    for token in set(text):
        row[token] = row[token] * penalty if row[token] < 0 else row[token] / penalty


def presence(row, text, prompt, penalty):
    for token in set(text[prompt:]):
        row[token] -= penalty


def frequency(row, text, prompt, penalty):
    for token in text[prompt:]:
        row[token] -= penalty


def ngram(row, text, prompt, size):
    for end in range(size - 1, len(text)) if size > 0 else ():
        if text[end - size + 1 : end] == text[len(text) - size + 1 :]:
            row[text[end]] = -np.inf


def named(ids):
    return [i for i in ids if i >= 0]


def suppress(row, text, prompt, ids):
    row[named(ids)] = -np.inf


def min_new(row, text, prompt, ids, count):
    if len(text) - prompt < count:
        suppress(row, text, prompt, ids)


def min_length(row, text, prompt, ids, count):
    if len(text) < count:
        suppress(row, text, prompt, ids)


def begin(row, text, prompt, ids, after_bos):
    if len(text) == prompt + (1 if after_bos and prompt == 1 else 0):
        suppress(row, text, prompt, ids)


def allowed(row, text, prompt, ids):
    if named(ids):
        row[[i for i in range(VOCAB) if i not in named(ids)]] = -np.inf


def force(row, ids):
    if named(ids):
        row[:] = -np.inf
        row[named(ids)] = 0


def forced_bos(row, text, prompt, token):
    if len(text) == 1:
        force(row, [token])


def forced_eos(row, text, prompt, ids, count):
    if len(text) - prompt == count - 1:
        force(row, ids)


def bias(row, text, prompt, ids, biases):
    for i, b in zip(ids, biases, strict=True):
        if i >= 0:
            row[i] += b


def sequence(row, text, prompt, words, biases):
    for padded, b in zip(words, biases, strict=True):
        word = named(padded)
        if word and len(word) - 1 <= len(text) and text[len(text) - len(word) + 1 :] == word[:-1]:
            row[word[-1]] += b


def bad_words(row, text, prompt, words):
    sequence(row, text, prompt, words, [-np.inf] * len(words))


def decay(row, text, prompt, ids, start, factor):
    since = len(text) - prompt - start
    for i in named(ids):
        if since > 0 and np.isfinite(row[i]):
            row[i] += abs(row[i]) * (factor**since - 1)


IDS = [[5, 7], [5, -1], [-1, -1], [1, 30], [0, 2], [29, -1]]
WORD_ROWS = np.stack(
    [c.pad_words([[i % 4], [1, 2], [2, 1, 9], [0, 0], [3, 3, 3, 3, 4]][: 2 + i % 4], 5, 5) for i in range(ROWS)]
)
ONE = [3, 9]  # the same for all rows
# ours, reference, the numbers with a row each
CASES = {
    "repetition": (c.RepetitionPenalty, repetition, [[1.0, 1.3, 0.7, 2.0, 1.1, 1.5]]),
    "presence": (c.PresencePenalty, presence, [[0.0, 0.5, 1.0, -0.5, 2.0, 0.25]]),
    "frequency": (c.FrequencyPenalty, frequency, [[0.0, 0.5, 1.0, -0.5, 2.0, 0.25]]),
    "ngram": (c.NoRepeatNgram, ngram, [[1, 2, 0, 3, 2, 1]]),
    "long ngram": (c.NoRepeatNgram, ngram, [[5, 9, 20, 2, 3, 4]]),
    "min_new": (c.MinNewTokens, min_new, [IDS, [1, 1, 4, 5, 8, 0]]),
    "min_length": (c.MinLength, min_length, [IDS, [1, 3, 9, 10, 14, 0]]),
    "suppress": (c.SuppressTokens, suppress, [IDS]),
    "begin": (c.BeginSuppressTokens, begin, [IDS, [False, True, True, False, False, True]]),
    "begin later": (c.BeginSuppressTokens, begin, [IDS[::-1], [True, False, False, True, True, False]]),
    "allowed": (c.AllowedTokens, allowed, [IDS]),
    "forced_bos": (c.ForcedBos, forced_bos, [[4, 4, -1, 4, 4, 4]]),
    "forced_eos": (c.ForcedEos, forced_eos, [IDS, [1, 2, 1, 6, 7, 14]]),
    "bias": (c.LogitBias, bias, [IDS, [[1.0, -2.0], [0.5, 9.0], [1.0, 1.0], [-np.inf, 3.0], [0.0, 0.0], [4.0, 1.0]]]),
    "repeated bias": (c.LogitBias, bias, [[[5, 5]] * ROWS, [[1.0, 2.5]] * ROWS]),
    "sequence": (
        c.SequenceBias,
        sequence,
        [WORD_ROWS, np.random.default_rng(0).normal(size=(ROWS, 5)).round(2)],
    ),
    "bad_words": (c.BadWords, bad_words, [WORD_ROWS]),
    "decay": (c.ExponentialDecayLengthPenalty, decay, [IDS, [0, 0, 0, 2, 9, 4], [1.1, 1.5, 2.0, 1.2, 1.3, 1.01]]),
}


def numbers(values, dtype):
    """Whole numbers as int32, others in the dtype."""
    array = np.asarray(values)
    return array.astype(dtype if array.dtype.kind == "f" else np.int32 if array.dtype.kind == "i" else bool)


def check(made, reference, arguments, dtype, seed):
    logits, tokens = draw(dtype, seed)
    context = Context(jnp.asarray(tokens), jnp.asarray(PROMPTS, jnp.int32), jnp.asarray(LENGTHS, jnp.int32))
    found = np.asarray(RUN((made,), jnp.asarray(logits), context))
    assert found.dtype == dtype
    expected = logits.astype(np.float64)
    for i, row in enumerate(expected):
        reference(row, tokens[i, : LENGTHS[i]].tolist(), PROMPTS[i], *(value[i] for value in arguments))
    assert (np.isneginf(found) == np.isneginf(expected)).all()
    np.testing.assert_allclose(found, expected, rtol=np.finfo(dtype).eps * 8)
    return (expected != logits).any(1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", CASES)
def test_as_plain_python_with_other_numbers_in_each_row(name, dtype):
    kind, reference, arguments = CASES[name]
    arguments = [numbers(value, dtype) for value in arguments]
    with jax.enable_x64(dtype == np.float64):
        made = kind(*map(jnp.asarray, arguments))
        changed = [check(made, reference, arguments, dtype, seed) for seed in range(6)]
    assert np.any(changed)


@pytest.mark.parametrize("name", CASES)
def test_numbers_for_all_rows(name):
    kind, reference, arguments = CASES[name]
    arguments = [numbers(value, np.float32) for value in arguments]
    last = [value[3] for value in arguments]
    made = kind(*(value.item() if value.ndim == 0 else value for value in last))
    check(made, reference, [[value] * ROWS for value in last], np.float32, 0)


NEUTRAL = {
    "repetition": c.RepetitionPenalty(),
    "presence": c.PresencePenalty(),
    "frequency": c.FrequencyPenalty(),
    "ngram": c.NoRepeatNgram(),
    "min_new": c.MinNewTokens(np.asarray(ONE)),
    "min_length": c.MinLength(np.asarray(ONE)),
    "suppress": c.SuppressTokens(np.asarray([-1])),
    "begin": c.BeginSuppressTokens(np.asarray([-1])),
    "allowed": c.AllowedTokens(np.asarray([-1])),
    "forced_bos": c.ForcedBos(),
    "forced_eos": c.ForcedEos(np.asarray([-1]), 1),
    "bias": c.LogitBias(np.asarray([-1]), 5.0),
    "no bias": c.LogitBias(np.asarray(ONE), 0.0),
    "sequence": c.SequenceBias(c.pad_words([]), 1.0),
    "bad_words": c.BadWords(c.pad_words([], 2, 3)),
    "decay": c.ExponentialDecayLengthPenalty(np.asarray(ONE)),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_numbers_change_nothing(name):
    logits, tokens = draw()
    context = Context(jnp.asarray(tokens), jnp.asarray(PROMPTS, jnp.int32), jnp.asarray(LENGTHS, jnp.int32))
    assert (np.asarray(RUN((NEUTRAL[name],), jnp.asarray(logits), context)) == logits).all()


def next_two(tokens, length):
    """Behind token t: t + 1 and t + 2; a row of 13 tokens: nothing but 20."""
    ids = jnp.arange(VOCAB)
    last = tokens[length - 1]
    return jnp.where(length == 13, ids == 20, (ids == last + 1) | (ids == last + 2))


@pytest.mark.parametrize("beams", [1, 2])
def test_a_function_that_allows(beams):
    logits, tokens = draw(seed=3)
    logits[np.isneginf(logits)] = -9
    logits[4:, 20] = -np.inf  # row 4 is stuck; its neighbour is not
    logits[0:2] = -np.inf  # both are
    context = Context(jnp.asarray(tokens), jnp.asarray(PROMPTS, jnp.int32), jnp.asarray(LENGTHS, jnp.int32))
    found = np.asarray(RUN((c.PrefixConstrained(next_two, beams),), jnp.asarray(logits), context))
    for i, length in enumerate(LENGTHS):
        last = tokens[i, length - 1]
        ids = [20] if length == 13 else [last + 1, last + 2]
        expected = np.full(VOCAB, -np.inf, np.float32)
        back = i < 2 or (i == 4 and beams == 1)
        expected[ids] = 0 if back else logits[i, ids]
        assert (found[i] == expected).all()


def test_words_are_padded_on_the_left():
    assert c.pad_words([[1], [2, 3, 4]], 3, 2).tolist() == [[-1, -1, 1], [2, 3, 4], [-1, -1, -1]]
    assert c.pad_words([]).tolist() == [[-1]]
    with pytest.raises(ValueError, match="a word without tokens"):
        c.pad_words([[1], []])
