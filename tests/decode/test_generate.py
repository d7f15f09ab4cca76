"""generate's invariances on a tiny model: cached = uncached, batched = alone, one compile per bucket."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.errors import UsageError
from decode.generate import Sampling, Stats, generate
from decode.prompts import bucket, pad_right
from decode.rows import advance, empty, place, read_prompts
from decode.score import score
from decode.stream import Memory, stream
from model.head import head_of, logits
from model.transformer import forward

GREEDY = Sampling(max_new_tokens=12, ignore_eos=True)
SAMPLED = Sampling(max_new_tokens=12, temperature=1.3, top_k=40, top_p=0.95, seed=7, ignore_eos=True)


def full_logits(model, row):
    """All logits of one row, without a cache."""
    tokens, segments = pad_right([row], 64)
    return np.asarray(_full_logits(model.arch, model.compute, model.params, tokens, segments)[0, : len(row)])


@partial(jax.jit, static_argnums=(0, 1))
def _full_logits(arch, compute, params, tokens, segments):
    hidden = forward(arch, compute, params, tokens, jnp.arange(tokens.shape[1])[None], segments)
    return logits(hidden, head_of(arch, params))


def test_greedy_is_the_argmax_of_repeated_full_forwards(tiny, rows):
    rows = [*rows[:3], [7]]
    done = generate(tiny, rows, GREEDY)
    assert len({token for c in done for token in c.tokens}) > 10, "a model that says one thing proves nothing"
    for row, got in zip(rows, done, strict=True):
        sequence = list(row)
        for _ in range(GREEDY.max_new_tokens):
            sequence.append(int(full_logits(tiny, sequence)[-1].argmax()))
        assert got.tokens == sequence[len(row) :]
        assert got.prompt_tokens == row
        assert got.finish_reason == "length"


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_row_does_not_depend_on_its_batch(tiny, rows, sampling):
    together = generate(tiny, rows, sampling)
    alone = [generate(tiny, [row], sampling, seeds=[sampling.seed + i])[0] for i, row in enumerate(rows)]
    in_twos = generate(tiny, rows, sampling, batch_size=2)
    for a, b, c in zip(together, alone, in_twos, strict=True):
        assert a.tokens == b.tokens == c.tokens
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
        np.testing.assert_allclose(a.logprobs, c.logprobs, atol=1e-5)


def test_samples_of_one_prompt_differ_and_keep_their_seeds(tiny, rows):
    three = generate(tiny, rows, replace(SAMPLED, num_return_sequences=3))
    assert [c.prompt_tokens for c in three] == [row for row in rows for _ in range(3)]
    assert len({tuple(c.tokens) for c in three[:3]}) == 3
    one = generate(tiny, rows, SAMPLED)
    assert [c.tokens for c in three[::3]] == [c.tokens for c in one]
    again = generate(tiny, [rows[0]] * 2, SAMPLED)
    assert again[0].tokens != again[1].tokens, "the same prompt twice is two samples"


def test_sampled_frequencies_are_the_distribution(tiny):
    n, row = 4000, [1, 2, 3]
    sampling = replace(SAMPLED, max_new_tokens=1, top_k=5, top_p=1.0, temperature=2.0, num_return_sequences=n)
    counts = np.bincount([c.tokens[0] for c in generate(tiny, [row], sampling)], minlength=tiny.arch.vocab_size)
    last = full_logits(tiny, row)[-1].astype(np.float64) / 2.0
    best = np.argsort(-last)[:5]
    expected = n * np.exp(last[best]) / np.exp(last[best]).sum()
    assert counts.sum() == counts[best].sum() == n
    assert ((counts[best] - expected) ** 2 / expected).sum() < 18.5  # chi-square, 4 degrees: one seed in a thousand


def test_logprobs_are_raw_and_equal_to_the_scorer(tiny, rows):
    for sampling in (GREEDY, SAMPLED):
        done = generate(tiny, rows, sampling)
        scored = score(tiny, [c.prompt_tokens + c.tokens for c in done], batch_size=3)
        for c, s in zip(done, scored, strict=True):
            np.testing.assert_allclose(c.logprobs, s.logprobs[-len(c.tokens) :], atol=1e-5)
            assert c.score == pytest.approx(sum(c.logprobs))


def test_stop_tokens_end_a_row(tiny, rows):
    free = generate(tiny, rows, GREEDY)
    stop = free[1].tokens[4]
    first = free[1].tokens.index(stop)
    for model, sampling in (
        (replace(tiny, eos_ids=(299, stop)), replace(GREEDY, ignore_eos=False)),
        (tiny, replace(GREEDY, stop_token_ids=(299, stop))),
    ):
        cut = generate(model, rows, sampling)
        assert cut[1].tokens == free[1].tokens[: first + 1]
        assert cut[1].finish_reason == "stop"
        assert len(cut[1].logprobs) == first + 1
        assert cut[1].text == tiny.tokenizer.decode(cut[1].tokens[:-1], skip_special=True)
        for a, b in zip(cut, free, strict=True):
            if stop not in b.tokens:
                assert (a.tokens, a.finish_reason) == (b.tokens, "length")


def test_the_loop_ends_when_all_rows_have(tiny, rows):
    first = generate(tiny, rows[:1], GREEDY)[0].tokens[1]
    stats = Stats()
    generate(tiny, rows[:1], replace(GREEDY, stop_token_ids=(first,)), stats=stats)
    assert stats.steps == 1


def test_padding_on_either_side_is_taken_away(tiny, rows):
    longest = max(map(len, rows))
    ids, mask = np.full((2, len(rows), longest), 9), np.zeros((2, len(rows), longest), int)
    for i, row in enumerate(rows):
        for side, cut in enumerate((slice(longest - len(row), None), slice(0, len(row)))):
            ids[side, i, cut], mask[side, i, cut] = row, 1
    expected = [c.tokens for c in generate(tiny, rows, GREEDY)]
    for side in (0, 1):
        assert [c.tokens for c in generate(tiny, ids[side], GREEDY, attention_mask=mask[side])] == expected


def test_one_compile_per_bucket(tiny, rows):
    parts = (read_prompts, empty, place, advance)
    for part in parts:
        part.clear_cache()
    for lengths in ((3, 16), (9, 12), (16, 16)):
        for n, temperature, seed in ((5, 0.5, 1), (8, 0.9, 2)):
            sampling = replace(SAMPLED, max_new_tokens=n, temperature=temperature, seed=seed)
            generate(tiny, [[1] * length for length in lengths], sampling)
    assert [part._cache_size() for part in parts] == [1, 1, 1, 1]
    generate(tiny, [[1] * 17, [2]], SAMPLED)
    assert read_prompts._cache_size() == 2


def test_buckets_are_few_and_close():
    sizes = {bucket(n) for n in range(1, 8193)}
    assert len(sizes) < 40
    assert all(n <= bucket(n) <= max(n + 15, n * 1.25) for n in range(1, 8193))


def test_streamed_turns_equal_generate_and_reuse_the_cache(tiny, rows):
    memory, prompt, sampling = Memory(), list(rows[0]), replace(SAMPLED, seed=9, max_new_tokens=5)
    for turn in range(3):
        pieces, result = [], None
        pieces_of = stream(tiny, prompt, sampling, memory)
        while result is None:
            try:
                pieces.append(next(pieces_of))
            except StopIteration as end:
                result = end.value
        whole = generate(tiny, [prompt], sampling)[0]
        assert result.tokens == whole.tokens, turn
        assert "".join(pieces) == result.text == whole.text
        assert memory.tokens == (prompt + result.tokens)[:-1]
        np.testing.assert_allclose(result.logprobs, whole.logprobs, atol=1e-5)
        prompt = prompt + result.tokens + [65] if turn == 0 else prompt[:-3]
    list(stream(tiny, rows[2], sampling, memory))  # another conversation: nothing in common
    assert memory.tokens[: len(rows[2])] == rows[2]


def test_a_stream_that_is_left_keeps_what_it_has(tiny, rows):
    memory = Memory()
    pieces = stream(tiny, rows[1], GREEDY, memory)
    next(pieces)
    pieces.close()
    assert memory.tokens[: len(rows[1])] == rows[1]
    assert memory.cache is not None
    list(stream(tiny, rows[1], GREEDY, memory))


def test_bad_requests_are_refused_before_any_compile(tiny):
    read_prompts.clear_cache()
    for prompts, sampling, words in (
        ([[1] * 129], Sampling(max_new_tokens=1), ("prompt 1", "129", "128")),
        ([[1], [1] * 120], Sampling(max_new_tokens=9), ("prompt 2", "120", "max_new_tokens is 9", "128")),
        ([[]], GREEDY, ("prompt 1", "empty")),
        ([[300]], GREEDY, ("300", "vocabulary", "299")),
        ([[-1]], GREEDY, ("-1", "vocabulary")),
    ):
        with pytest.raises(UsageError) as error:
            generate(tiny, prompts, sampling)
        assert all(word in str(error.value) for word in words), error.value
    with pytest.raises(UsageError, match="seeds"):
        generate(tiny, [[1]], GREEDY, seeds=[1, 2])
    assert read_prompts._cache_size() == 0
    assert generate(tiny, [[1] * 120], Sampling(max_new_tokens=8, ignore_eos=True))[0].finish_reason == "length"


@pytest.mark.parametrize(
    "bad",
    [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0},
     {"top_p": 1.1}, {"seed": -1}, {"num_return_sequences": 0}, {"num_return_sequences": 2}],
)  # fmt: skip
def test_parameters_are_refused_by_name(bad):
    with pytest.raises(UsageError, match=next(iter(bad))):
        Sampling(**bad)


def test_no_prompts_are_no_completions(tiny):
    assert generate(tiny, [], GREEDY) == []


def test_bfloat16(tiny, rows):
    half = replace(
        tiny,
        compute=replace(tiny.compute, dtype=jnp.bfloat16),
        params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.params),
    )
    done = generate(half, rows, SAMPLED)
    assert all(np.isfinite(c.logprobs).all() for c in done)


@pytest.mark.parametrize("axes", [{"data": 2}, {"fsdp": 2, "tensor": 2}])
def test_spread_over_devices(tiny, tiny_folder, rows, axes):
    from decode.load import load_model
    from sharding.mesh import make_mesh

    count = int(np.prod(list(axes.values())))
    mesh = make_mesh(axes, jax.devices()[:count])
    spread = load_model(str(tiny_folder), attention="reference", mesh=mesh)
    assert len(spread.params["layers"]["mlp"]["up"]["weight"].sharding.device_set) == count
    for a, b in zip(generate(spread, rows, GREEDY), generate(tiny, rows, GREEDY), strict=True):
        assert a.tokens == b.tokens
