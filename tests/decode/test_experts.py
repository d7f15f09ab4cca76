"""Decoding with experts, latent attention with its compressed cache, and sinks: the same as the full forward."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.generate import Sampling, generate
from decode.load import Model
from model import lora
from model.cache import init_cache
from model.compute import Compute
from model.families import architecture_from_hf
from model.head import head_of, logits
from model.transformer import declare, forward
from tests.decode.conftest import make_tokenizer
from tests.golden import families
from tests.golden.families import CONFIGS

NEW = 8


def tiny(name):
    arch = architecture_from_hf(CONFIGS[name])
    params = families.params_of(arch, families.tensors(CONFIGS[name]), jnp.float32)
    return Model(arch, Compute(attention="reference"), params, make_tokenizer())


def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(3, 97, n).tolist() for n in (3, 11, 6)]


def logprobs(model):
    """Of a whole row, by one program: the log-probs of every next token."""

    @jax.jit
    def run(tokens, positions, segments):
        hidden = forward(model.arch, model.compute, model.params, tokens, positions, segments)
        return logits(hidden, head_of(model.arch, model.params))

    def of(tokens):
        row = np.zeros((1, 24), np.int32)
        row[0, : len(tokens)] = tokens
        full = run(row, np.arange(24, dtype=np.int32)[None], (np.arange(24) < len(tokens))[None].astype(np.int32))
        return np.asarray(jax.nn.log_softmax(full[0, : len(tokens)], axis=-1))

    return of


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_greedy_and_beams_are_the_full_forward(name):
    """Also with layers apart; beams share a prompt's cache."""
    model = tiny(name)
    of = logprobs(model)
    greedy = generate(model, prompts(), Sampling(max_new_tokens=NEW, ignore_eos=True))
    for done in greedy:
        new = of([*done.prompt_tokens, *done.tokens])[len(done.prompt_tokens) - 1 : -1]
        assert new.argmax(1).tolist() == done.tokens
        np.testing.assert_allclose(done.logprobs, new.max(1), atol=2e-5)
    apart = generate(replace(model, unroll=True), prompts(), Sampling(max_new_tokens=NEW, ignore_eos=True))
    assert [done.tokens for done in apart] == [done.tokens for done in greedy]
    sampling = Sampling(max_new_tokens=NEW, num_beams=3, num_return_sequences=3, ignore_eos=True)
    for done in generate(model, prompts()[:2], sampling):
        rows = of([*done.prompt_tokens, *done.tokens])[len(done.prompt_tokens) - 1 : -1]
        chosen = rows[np.arange(NEW), done.tokens]
        np.testing.assert_allclose(done.logprobs, chosen, atol=2e-5)
        assert done.score == pytest.approx(chosen.mean(), abs=2e-5)


def test_a_latent_cache_holds_the_latent_and_one_key():
    model = tiny("deepseek_v3")
    cache = init_cache(model.arch, 2, 16, jnp.float32)
    assert (cache.k.shape, cache.v.shape) == ((4, 2, 1, 16, 10), (4, 2, 1, 16, 4))


@pytest.mark.slow
def test_adapters_on_latent_attention_decode_as_merged_ones():
    model = tiny("deepseek_v3")
    declared = declare(model.arch)
    shapes = lora.adapter_shapes(declared, lora.target_paths(list(declared), "all-linear"), 2)
    pairs = lora.init_adapter(shapes, jax.random.key(0))
    noise = lambda b: 0.1 * jax.random.normal(jax.random.key(b.size), b.shape)  # noqa: E731
    pairs = {path: (a, noise(b)) for path, (a, b) in pairs.items()}
    attached = replace(model, params=lora.attach(model.params, pairs, 0.5))
    merged = replace(model, params=lora.merge(attached.params))
    one, other = (generate(m, prompts(), Sampling(max_new_tokens=NEW)) for m in (attached, merged))
    assert [done.tokens for done in one] == [done.tokens for done in other]
    assert [d.tokens for d in one] != [d.tokens for d in generate(model, prompts(), Sampling(max_new_tokens=NEW))]
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-5)
