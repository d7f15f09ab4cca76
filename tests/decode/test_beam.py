"""Beam search: a tiny model against the plain reference (reference.py), and what must hold whatever the model."""

from dataclasses import replace
from functools import partial
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from configs.errors import UsageError
from decode.generate import generate
from decode.sampling import Sampling
from model.head import head_of, logits
from model.transformer import forward
from tests.decode import reference
from tests.decode.conftest import EOS

NEW = 10  # new tokens of the tiny model
CLOSE = 1e-4  # a decision of the tiny model that float32 may take otherwise
BEAMS = Sampling(max_new_tokens=NEW, num_beams=4, num_return_sequences=4)


# ---- a tiny model against the plain reference


@pytest.fixture(scope="module")
def after(tiny):
    """What follows any tokens, from full forwards, remembered."""
    memory = {}

    def logits_after(tokens):
        key = tuple(tokens)
        if key not in memory:
            row, segments = np.zeros((1, 32), np.int32), np.zeros((1, 32), np.int32)
            row[0, : len(tokens)], segments[0, : len(tokens)] = tokens, 1
            memory[key] = np.asarray(_forward(tiny.arch, tiny.compute, tiny.params, row, segments)[0, len(tokens) - 1])
        return memory[key]

    return logits_after


@partial(jax.jit, static_argnums=(0, 1))
def _forward(arch, compute, params, tokens, segments):
    hidden = forward(arch, compute, params, tokens, jnp.arange(tokens.shape[1])[None], segments)
    return logits(hidden, head_of(arch, params))


def search(after, prompt, sampling):
    """The reference, with the parameters that generate takes."""
    return reference.beam_search(
        after, prompt, num_beams=sampling.num_beams, max_new_tokens=sampling.max_new_tokens,
        eos_ids=[*([] if sampling.ignore_eos else [EOS]), *sampling.stop_token_ids],
        length_penalty=sampling.length_penalty, early_stopping=sampling.early_stopping,
        num_beam_groups=sampling.num_beam_groups, diversity_penalty=sampling.diversity_penalty,
    )  # fmt: skip


def check(tiny, after, prompts, sampling):
    """generate = reference, prompt by prompt; how many were compared (not those with a close decision), and ended."""
    done, compared, ended = generate(tiny, prompts, sampling), 0, 0
    n = sampling.num_return_sequences
    assert len(done) == n * len(prompts)
    for i, prompt in enumerate(prompts):
        got, expected = done[i * n : (i + 1) * n], search(after, prompt, sampling)
        if expected.margin < CLOSE:
            continue
        assert [c.tokens for c in got] == expected.tokens[:n], (prompt, sampling)
        np.testing.assert_allclose([c.score for c in got], expected.scores[:n], rtol=1e-5, atol=1e-5)
        assert [c.finish_reason == "stop" for c in got] == expected.stopped[:n]
        compared, ended = compared + 1, ended + sum(expected.stopped)
    return compared, ended


def often(after, prompts, count):
    """Tokens that beams meet in the middle: good ends of sequence."""
    seen = [t for p in prompts for new in search(after, p, BEAMS).tokens for t in new[2:7]]
    return tuple(int(t) for t in np.argsort(-np.bincount(seen, minlength=300), kind="stable")[:count])


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_beams_are_the_references(tiny, after, rows, early_stopping):
    compared = ended = 0
    for count in (0, 1, 4):
        stops = often(after, rows, count)
        for penalty in (1.0, 0.6, 2.0, 0.0, -0.5):
            sampling = replace(BEAMS, length_penalty=penalty, early_stopping=early_stopping, stop_token_ids=stops)
            a, b = check(tiny, after, rows, sampling)
            compared, ended = compared + a, ended + b
    assert compared > 0.8 * 15 * len(rows)
    assert 0.1 * 4 * compared < ended < 0.9 * 4 * compared, "some end and some do not"


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_beams_of_any_prompts_and_parameters(tiny, after, data):
    token = st.integers(0, 299)
    sizes = [16, *data.draw(st.lists(st.integers(1, 16), min_size=3, max_size=3))]  # of one bucket
    prompts = [data.draw(st.lists(token, min_size=n, max_size=n)) for n in sizes]
    sampling = replace(
        BEAMS,
        length_penalty=data.draw(st.floats(-1, 2)),
        early_stopping=data.draw(st.sampled_from([False, True, "never"])),
        stop_token_ids=tuple(data.draw(st.lists(token, max_size=6, unique=True))) + often(after, prompts[1:2], 2),
    )
    compared, _ = check(tiny, after, prompts, sampling)
    assume(compared)


@pytest.mark.parametrize(("beams", "steps"), [(2, NEW), (7, NEW), (3, 1)])
def test_other_numbers_of_beams_and_steps(tiny, after, rows, beams, steps):
    sampling = replace(BEAMS, num_beams=beams, num_return_sequences=beams, max_new_tokens=steps)
    assert check(tiny, after, rows, sampling)[0] >= 3
    assert check(tiny, after, rows, replace(sampling, stop_token_ids=often(after, rows, 3)))[0] >= 3


@pytest.mark.parametrize(("beams", "groups"), [(4, 2), (6, 3), (4, 4)])
def test_diverse_beams_are_the_references(tiny, after, rows, beams, groups):
    plain = replace(BEAMS, num_beams=beams, num_return_sequences=beams, num_beam_groups=groups)
    compared = 0
    for penalty in (0.3, 1.0, 5.0):
        for stops in ((), often(after, rows, 2)):
            sampling = replace(plain, diversity_penalty=penalty, stop_token_ids=stops)
            compared += check(tiny, after, rows, sampling)[0]
    assert compared > 0.7 * 6 * len(rows)
    firsts = [{tokens[0] for tokens in search(after, rows[0], replace(plain, diversity_penalty=p)).tokens}
              for p in (1e-6, 100.0)]  # fmt: skip
    assert len(firsts[1]) >= groups > len(firsts[0]) - beams // groups + 1, "the penalty matters"


# ---- what must hold whatever the model


def test_one_beam_is_greedy(tiny, after, rows):
    greedy = generate(tiny, rows, Sampling(max_new_tokens=NEW))
    for i, row in enumerate(rows):
        loop = reference.decode_loop(reference.greedy(after), row, max_new_tokens=NEW, stop_ids=[EOS])
        assert (greedy[i].tokens, greedy[i].finish_reason) == loop
        one = reference.beam_search(after, row, num_beams=1, max_new_tokens=NEW, eos_ids=[EOS], early_stopping=True)
        assert one.tokens == [greedy[i].tokens]
        assert one.sums[0] == pytest.approx(greedy[i].score, abs=1e-4)
    # four groups of one beam each that hardly disturb each other
    sampling = replace(BEAMS, num_beam_groups=4, diversity_penalty=1e-6, early_stopping=True)
    for i, done in enumerate(generate(tiny, rows, sampling)):
        assert done.tokens == greedy[i // 4].tokens
        np.testing.assert_allclose(done.logprobs, greedy[i // 4].logprobs, rtol=0, atol=1e-5)


def test_fewer_results_are_the_first_ones(tiny, rows):
    every = generate(tiny, rows, BEAMS)
    for n in (1, 3):
        some = generate(tiny, rows, replace(BEAMS, num_return_sequences=n))
        assert [c.tokens for c in some] == [c.tokens for i, c in enumerate(every) if i % 4 < n]


def test_scores_are_the_sums_over_the_lengths_and_fall(tiny, after, rows):
    stops, lengths = often(after, rows, 3), set()
    for penalty in (1.0, 0.0, 2.0, -1.0):
        done = generate(tiny, rows, replace(BEAMS, length_penalty=penalty, stop_token_ids=stops))
        lengths |= {len(c.tokens) for c in done}
        for c in done:
            assert len(c.logprobs) == len(c.tokens)
            assert c.score == pytest.approx(sum(c.logprobs) / len(c.tokens) ** penalty, rel=1e-5, abs=1e-5)
            chosen = [reference.log_softmax(after(c.prompt_tokens + c.tokens[:j]))[t] for j, t in enumerate(c.tokens)]
            np.testing.assert_allclose(c.logprobs, chosen, rtol=0, atol=1e-5)
        for i in range(0, len(done), 4):
            scores = [c.score for c in done[i : i + 4]]
            assert scores == sorted(scores, reverse=True)
            assert len({tuple(c.tokens) for c in done[i : i + 4]}) == 4, "no beam twice"
    assert len(lengths) > 1


def test_a_prompt_does_not_depend_on_its_batch(tiny, after, rows):
    sampling = replace(BEAMS, stop_token_ids=often(after, rows, 3))
    together = generate(tiny, rows, sampling)
    for other in (
        generate(tiny, rows, sampling, batch_size=1),
        generate(tiny, rows[::-1], sampling),
        generate(tiny, rows[1:2] * 4, sampling),
    ):
        by_prompt = {tuple(rows[i]): together[4 * i : 4 * i + 4] for i in range(4)}
        for i in range(0, len(other), 4):
            for a, b in zip(other[i : i + 4], by_prompt[tuple(other[i].prompt_tokens)], strict=True):
                assert (a.tokens, a.finish_reason, a.text) == (b.tokens, b.finish_reason, b.text)
                assert a.score == pytest.approx(b.score, abs=1e-5)


def test_padding_on_the_left_is_taken_away(tiny, rows):
    ids, mask = np.full((len(rows), 16), 9), np.zeros((len(rows), 16), int)
    for i, row in enumerate(rows):
        ids[i, 16 - len(row) :], mask[i, 16 - len(row) :] = row, 1
    padded = generate(tiny, ids, BEAMS, attention_mask=mask)
    assert [c.tokens for c in padded] == [c.tokens for c in generate(tiny, rows, BEAMS)]


@pytest.fixture
def compiles():
    """A list that grows with every compile."""
    seen = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def test_one_compile_per_bucket(tiny, rows, compiles):
    generate(tiny, rows, BEAMS)
    generate(tiny, rows, replace(BEAMS, max_new_tokens=NEW - 1))
    compiles.clear()
    for lengths in ((3, 16, 1, 2), (9, 12, 10, 9), (16, 16, 16, 16)):
        for n, penalty, stops in ((8, 0.5, (5,)), (NEW, 1.7, (1, 2, 3)), (5, -1.0, ())):
            sampling = replace(BEAMS, max_new_tokens=n, length_penalty=penalty, stop_token_ids=stops)
            generate(tiny, [[1] * length for length in lengths], sampling)
    assert compiles == []


def test_nearly_cold_beam_samples_are_beam_search(tiny, after, rows):
    """transformers divides the log-probs by the temperature, and the scores stay divided."""
    cold = 1e-3
    done = generate(tiny, rows, replace(BEAMS, temperature=cold))
    compared = 0
    for i, row in enumerate(rows):
        found = search(after, row, BEAMS)
        if found.margin < 0.02:  # 20 units of Gumbel noise
            continue
        compared += 1
        got = done[4 * i : 4 * i + 4]
        assert [c.tokens for c in got] == found.tokens
        np.testing.assert_allclose([c.score * cold for c in got], found.scores, rtol=0, atol=1e-4)
        for c, total in zip(got, found.sums, strict=True):
            assert sum(c.logprobs) == pytest.approx(total, abs=1e-4)  # raw
    assert compared


def test_beam_samples_are_drawn_without_replacement(tiny, after):
    """Two beams draw four of five tokens, and keep the two likeliest of those."""
    n, row = 1000, [1, 2, 3]
    sampling = Sampling(
        max_new_tokens=1, num_beams=2, num_return_sequences=2, temperature=2.0, top_k=5, ignore_eos=True, seed=3
    )
    done = generate(tiny, [row] * n, sampling)
    scores = np.asarray(after(row), np.float64) / 2
    best = np.argsort(-scores)[:5]
    p = np.exp(scores[best] - scores[best].max())
    p /= p.sum()
    expected = np.zeros((5, 5))
    for drawn in permutations(range(5), 4):
        chance, left = 1.0, 1.0
        for i in drawn:
            chance, left = chance * p[i] / left, left - p[i]
        expected[tuple(sorted(drawn)[:2])] += n * chance
    counts, rank = np.zeros((5, 5)), {int(token): i for i, token in enumerate(best)}
    for first, second in zip(done[::2], done[1::2], strict=True):
        counts[rank[first.tokens[0]], rank[second.tokens[0]]] += 1
    assert counts[expected == 0].sum() == 0
    seen = expected > 0
    chi = ((counts - expected)[seen] ** 2 / expected[seen]).sum()
    assert chi < 13.9, (counts[seen], expected[seen])  # 2 degrees of freedom: one seed in a thousand


def test_beam_samples_keep_their_seeds(tiny, rows):
    warm = replace(BEAMS, temperature=1.0, seed=5)
    first, again, other = (generate(tiny, rows, replace(warm, seed=s)) for s in (5, 5, 6))
    assert [c.tokens for c in first] == [c.tokens for c in again] != [c.tokens for c in other]
    given = generate(tiny, rows, warm, seeds=[5, 6, 7, 8])
    assert [c.tokens for c in given] == [c.tokens for c in first]
    turned = generate(tiny, rows[::-1], warm, seeds=[8, 7, 6, 5])
    assert [c.tokens for c in turned[-4:]] == [c.tokens for c in first[:4]]


def test_stop_strings_end_a_row(tiny, after, rows):
    free = generate(tiny, rows, Sampling(max_new_tokens=NEW))
    pairs = {tiny.tokenizer.decode(c.tokens[i : i + n]) for c in free for i in range(1, NEW - 2) for n in (1, 2)}
    strings = tuple(sorted(s for s in pairs if s and "\ufffd" not in s))[:3]  # half a character is no text yet
    assert strings
    done, stopped = generate(tiny, rows, Sampling(max_new_tokens=NEW, stop=strings)), 0
    for row, c in zip(rows, done, strict=True):
        loop = reference.decode_loop(
            reference.greedy(after), row, max_new_tokens=NEW, stop_ids=[EOS], stop=strings, decode=tiny.tokenizer.decode
        )
        assert (c.tokens, c.finish_reason) == loop
        stopped += len(c.tokens) < NEW
    assert stopped


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_rows_end_where_a_plain_loop_ends_them(tiny, after, data):
    """Prompts, limits, stop tokens, stop strings and slots of any kind; often what the model would say itself."""
    draw, token = data.draw, st.integers(0, 255)
    count = draw(st.integers(1, 6))
    prompts = [draw(st.lists(token, min_size=1, max_size=16)) for _ in range(count)]
    said = [c.tokens for c in generate(tiny, prompts, Sampling(max_new_tokens=NEW, ignore_eos=True))]
    likely = [t for tokens in said for t in tokens]
    pieces = {tiny.tokenizer.decode(tokens[i : i + 2]) for tokens in said for i in range(NEW - 1)}
    pieces = sorted(piece for piece in pieces if piece and "\ufffd" not in piece) or ["never said"]
    each = [
        Sampling(
            max_new_tokens=draw(st.integers(1, NEW)),
            ignore_eos=draw(st.booleans()),
            stop_token_ids=tuple(draw(st.lists(st.sampled_from(likely) | token, max_size=2))),
            stop=tuple(draw(st.lists(st.sampled_from(pieces), max_size=2))),
        )
        for _ in prompts
    ]
    done = generate(tiny, prompts, each, batch_size=draw(st.sampled_from([None, 1, 2, 4])))
    for prompt, one, c in zip(prompts, each, done, strict=True):
        ends = [*([] if one.ignore_eos else [EOS]), *one.stop_token_ids]
        assert (c.tokens, c.finish_reason) == reference.decode_loop(
            reference.greedy(after), prompt, max_new_tokens=one.max_new_tokens, stop_ids=ends, stop=one.stop,
            decode=tiny.tokenizer.decode,
        )  # fmt: skip


def test_at_one_shape_a_second_time_is_bitwise_the_same(tiny, rows):
    sampling = Sampling(max_new_tokens=NEW, temperature=1.1, top_p=0.9, logprobs=3, num_return_sequences=2)
    first, second = (generate(tiny, rows, sampling) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert (a.tokens, a.logprobs, a.top_logprobs) == (b.tokens, b.logprobs, b.top_logprobs)


@pytest.mark.parametrize(
    "bad",
    [{"num_beams": 0}, {"num_return_sequences": 5, "num_beams": 4}, {"early_stopping": "always", "num_beams": 2},
     {"length_penalty": float("nan"), "num_beams": 2}, {"num_beam_groups": 3, "num_beams": 4},
     {"num_beam_groups": 0, "num_beams": 4}, {"diversity_penalty": -1.0, "num_beams": 4, "num_beam_groups": 2}],
)  # fmt: skip
def test_parameters_are_refused_by_name(bad):
    with pytest.raises(UsageError, match=next(iter(bad))):
        Sampling(**bad)
