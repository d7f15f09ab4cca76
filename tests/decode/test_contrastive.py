"""Contrastive search against the plain reference (reference.py, from the paper)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.generate import Sampling, generate
from decode.prompts import pad_right
from model.head import head_of, logits
from model.transformer import forward
from tests.decode import reference


@partial(jax.jit, static_argnums=(0, 1))
def _forward(arch, compute, params, tokens, segments):
    hidden = forward(arch, compute, params, tokens, jnp.arange(tokens.shape[1])[None], segments)
    return hidden, logits(hidden, head_of(arch, params))


@pytest.mark.parametrize(("top_k", "alpha"), [(4, 0.6), (4, 0.1), (7, 0.9)])
def test_the_reference_finds_the_same(tiny, rows, top_k, alpha):
    def full(tokens):
        row, segments = pad_right([tokens], 32)
        hidden, out = _forward(tiny.arch, tiny.compute, tiny.params, row, segments)
        return np.asarray(hidden[0, : len(tokens)]), np.asarray(out[0, len(tokens) - 1], np.float64)

    choose = reference.contrastive(lambda t: full(t)[1], lambda t: full(t)[0], top_k=top_k, penalty_alpha=alpha)
    done = generate(tiny, rows, Sampling(max_new_tokens=8, top_k=top_k, penalty_alpha=alpha))
    for row, got in zip(rows, done, strict=True):
        loop = reference.decode_loop(choose, row, max_new_tokens=8, stop_ids=tiny.eos_ids)
        assert (got.tokens, got.finish_reason) == loop
    greedy = generate(tiny, rows, Sampling(max_new_tokens=8))
    assert any(a.tokens != b.tokens for a, b in zip(done, greedy, strict=True)), "the penalty matters"


def test_alpha_nearly_zero_is_greedy_and_stops_cut(tiny, rows):
    nearly = Sampling(max_new_tokens=8, top_k=4, penalty_alpha=1e-6)
    greedy = generate(tiny, rows, Sampling(max_new_tokens=8))
    done = generate(tiny, rows, nearly, batch_size=8)
    for a, b in zip(done, greedy, strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-5)
        assert a.score == pytest.approx(b.score, abs=1e-4)
