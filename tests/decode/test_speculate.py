"""Speculative decoding says, token for token, what plain decoding says; guesses only save steps."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.errors import UsageError
from decode.generate import Sampling, Stats, generate
from decode.logits import Context
from decode.speculate import look_up

GREEDY = Sampling(max_new_tokens=14, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=1.2, top_p=0.9, repetition_penalty=1.1, seed=3)


def same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert (a.tokens, a.finish_reason, a.text) == (b.tokens, b.finish_reason, b.text)
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def draft(tiny):
    """Nearly the model: its weights, shaken."""
    noise = np.random.default_rng(5)
    params = jax.tree.map(lambda x: x * (1 + 0.02 * noise.normal(size=x.shape).astype(np.float32)), tiny.params)
    return replace(tiny, params=params)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("by", ["lookup", "draft"])
def test_the_same_tokens_in_fewer_steps(tiny, draft, rows, sampling, by):
    prompts = [row * 2 for row in rows[:3]] + [[7] * 9]
    plain, fewer = Stats(), Stats()
    expected = generate(tiny, prompts, sampling, stats=plain)
    stop = expected[1].tokens[6]
    for one in (sampling, replace(sampling, stop_token_ids=(stop,)), replace(sampling, max_new_tokens=1)):
        guessing = replace(one, prompt_lookup_num_tokens=3) if by == "lookup" else replace(one, num_assistant_tokens=3)
        extra = {} if by == "lookup" else {"draft": draft}
        got = generate(tiny, prompts, guessing, stats=fewer if one is sampling else None, **extra)
        same(got, generate(tiny, prompts, one))
    assert fewer.steps <= plain.steps
    if by == "draft":
        assert fewer.steps < 0.7 * plain.steps, "a good draft model saves steps"


@pytest.mark.slow
def test_a_perfect_draft_is_always_right(tiny, rows):
    stats = Stats()
    sampling = replace(SAMPLED, num_assistant_tokens=4, max_new_tokens=11)
    same(generate(tiny, rows, sampling, draft=tiny, stats=stats), generate(tiny, rows, sampling))
    assert stats.steps == 2  # the first token, then five at a time


@pytest.mark.slow
def test_slots_are_refilled_while_guessing(tiny, draft, rows):
    prompts = rows * 2
    sampling = replace(SAMPLED, num_assistant_tokens=2)
    same(generate(tiny, prompts, sampling, draft=draft, batch_size=3), generate(tiny, prompts, sampling))


def test_a_repeating_row_is_guessed_from_its_past(tiny):
    tokens = np.zeros((3, 16), np.int32)
    tokens[0, :8] = [1, 2, 3, 4, 9, 1, 2, 3]  # 1 2 3 came before: 4 9 1 follow
    tokens[1, :6] = [5, 6, 7, 5, 8, 5]  # the latest 5 was followed by 8 5
    tokens[2, :4] = [1, 2, 3, 4]  # nothing came before
    length = np.asarray([8, 6, 4], np.int32)
    context = Context(jnp.asarray(tokens), jnp.asarray(length), jnp.asarray(length))
    guessed = np.asarray(look_up(context, 3, 2))
    assert guessed[0].tolist() == [4, 9, 1]
    assert guessed[1].tolist()[:2] == [8, 5]


def test_contradictions_are_refused(tiny, draft, rows):
    for sampling, words in (
        (replace(GREEDY, prompt_lookup_num_tokens=2), "prompt_lookup"),
        (replace(GREEDY, guidance_scale=2.0), "guidance_scale"),
    ):
        with pytest.raises(UsageError, match=words):
            generate(tiny, rows, sampling, draft=draft)
    other = replace(draft, arch=replace(draft.arch, vocab_size=299))
    with pytest.raises(UsageError, match="299"):
        generate(tiny, rows, GREEDY, draft=other)
    with pytest.raises(UsageError, match="context is 20"):
        generate(tiny, rows, GREEDY, draft=replace(draft, arch=replace(draft.arch, max_position=20)))
    each = [replace(GREEDY, prompt_lookup_num_tokens=2, max_matching_ngram_size=n) for n in (2, 3)]
    with pytest.raises(UsageError, match="max_matching_ngram_size"):
        generate(tiny, rows[:2], each)
