"""The engine: slots are refilled, prompts are read once, and no row sees the others."""

import itertools
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.errors import RunError, UsageError
from decode.generate import Sampling, Stats, generate
from decode.prompts import pad_right
from decode.results import Teller, find_stop
from decode.score import score
from decode.stream import stream
from model.head import head_of, logits
from model.lora import adapter_shapes, attach, init_adapter, target_paths
from model.transformer import declare, forward

LONG = 24
SAMPLED = Sampling(max_new_tokens=LONG, temperature=1.2, top_p=0.95, seed=7, ignore_eos=True)
GREEDY = Sampling(max_new_tokens=LONG, ignore_eos=True)


@partial(jax.jit, static_argnums=(0, 1))
def _full(arch, compute, params, tokens, segments):
    hidden = forward(arch, compute, params, tokens, jnp.arange(tokens.shape[1])[None], segments)
    return jax.nn.log_softmax(logits(hidden, head_of(arch, params)))


def full_logprobs(model, row):
    tokens, segments = pad_right([row], 64)
    return np.asarray(_full(model.arch, model.compute, model.params, tokens, segments)[0, : len(row)])


def same(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert (a.tokens, a.text, a.finish_reason) == (b.tokens, b.text, b.finish_reason)
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-5)


def test_slots_are_refilled_and_busy(tiny, rows):
    """Lengths with a long tail: static batches wait for the longest, slots do not."""
    limits = [3, 2, LONG, 4, 2, 3, 5, 2, 4, LONG, 3, 2, 2, 4, 3, 2, 3, 2, 5, 3, 2, 4, 2, 3]
    prompts = [rows[i % 4] for i in range(len(limits))]
    each = [replace(SAMPLED, max_new_tokens=n, seed=i) for i, n in enumerate(limits)]
    stats = Stats()
    done = generate(tiny, prompts, each, seeds=range(len(limits)), batch_size=4, stats=stats)
    assert [len(c.tokens) for c in done] == limits
    same(done, generate(tiny, prompts, each, seeds=range(len(limits))))
    static = sum(max(limits[i : i + 4]) - 1 for i in range(0, len(limits), 4))
    assert stats.steps < 0.62 * static
    assert stats.live == sum(limits) - len(limits)  # the first token of a row comes with its prompt
    # until the last rows run out
    assert stats.share > 0.6


def test_samples_of_a_prompt_read_it_once(tiny, rows):
    sampling = replace(SAMPLED, num_return_sequences=3, max_new_tokens=6)
    together, refilled = Stats(), Stats()
    expected = generate(tiny, rows, sampling, stats=together)
    assert together.prompts == 4
    same(generate(tiny, rows, sampling, batch_size=5, stats=refilled), expected)
    assert refilled.prompts == 4, "the samples left over find their prompt read"
    alone = generate(tiny, rows, [sampling] * 4, batch_size=1)
    same(alone, expected)


def test_each_row_has_its_own_parameters(tiny, rows):
    each = [
        replace(GREEDY, max_new_tokens=9),
        replace(SAMPLED, max_new_tokens=5, top_k=3, repetition_penalty=1.5),
        replace(SAMPLED, temperature=0.3, logit_bias={5: 4.0, 6: -100.0}, frequency_penalty=0.7),
        replace(SAMPLED, min_p=0.2, bad_words_ids=((9,), (1, 2, 3)), stop_token_ids=(40, 41), logprobs=2),
    ]
    together = generate(tiny, rows, each, seeds=[1, 2, 3, 4])
    for i, one in enumerate(each):
        same([together[i]], generate(tiny, [rows[i]], one, seeds=[i + 1]))
    assert 6 not in together[2].tokens
    assert len(together[3].top_logprobs) == len(together[3].tokens)
    assert all(len(top) == 2 for top in together[3].top_logprobs)
    assert together[0].top_logprobs is None


@pytest.mark.parametrize(
    "each",
    [
        # typical_p may remove the likeliest token: not of a greedy row
        [replace(GREEDY, typical_p=0.2), replace(SAMPLED, typical_p=0.5)],
        # top_h looks at 100 tokens: not of a row that does not use it
        pytest.param(
            [replace(SAMPLED, temperature=6.0, top_p=1.0), replace(SAMPLED, top_h=0.4)], marks=pytest.mark.slow
        ),
        # penalties look at the sign of a logit: of a log-prob in guided rows only
        pytest.param(
            [replace(SAMPLED, repetition_penalty=0.7), replace(SAMPLED, guidance_scale=1.5)], marks=pytest.mark.slow
        ),
    ],
    ids=["greedy", "top_h", "guidance"],
)
def test_what_one_row_uses_does_not_touch_another(tiny, rows, each):
    together = generate(tiny, rows[:2], each, seeds=[1, 2])
    same(together, [generate(tiny, [rows[i]], one, seeds=[i + 1])[0] for i, one in enumerate(each)])


def test_logprobs_of_new_tokens_and_of_the_prompt(tiny, rows):
    sampling = replace(SAMPLED, max_new_tokens=6, logprobs=3, prompt_logprobs=True, echo=True)
    for c in generate(tiny, rows, sampling):
        whole = full_logprobs(tiny, c.prompt_tokens + c.tokens)
        n = len(c.prompt_tokens)
        for told, top, at in (
            (c.logprobs, c.top_logprobs, whole[n - 1 : -1]),
            (c.prompt_logprobs, c.prompt_top_logprobs, whole[: n - 1]),
        ):
            chosen = (c.prompt_tokens + c.tokens)[n:] if told is c.logprobs else c.prompt_tokens[1:]
            np.testing.assert_allclose(told, at[np.arange(len(chosen)), chosen], rtol=0, atol=1e-5)
            for one, all_ in zip(top, at, strict=True):
                assert list(one) == np.argsort(-all_, kind="stable")[:3].tolist()
                np.testing.assert_allclose(list(one.values()), np.sort(all_)[::-1][:3], rtol=0, atol=1e-5)
        assert c.text == tiny.tokenizer.decode(c.prompt_tokens) + tiny.tokenizer.decode(c.tokens, skip_special=True)
        assert c.seconds > 0


def test_best_of_are_the_best_by_mean_logprob(tiny, rows):
    stop = tuple(range(0, 60))  # rows of different lengths
    sampling = replace(SAMPLED, max_new_tokens=8, num_return_sequences=5, stop_token_ids=stop)
    every = generate(tiny, rows, sampling)
    best = generate(tiny, rows, replace(sampling, num_return_sequences=2, best_of=5))
    for i in range(4):
        ranked = sorted(every[5 * i : 5 * i + 5], key=lambda c: -np.mean(c.logprobs))
        same(best[2 * i : 2 * i + 2], ranked[:2])


def test_stop_strings_are_found_across_tokens_and_trimmed(tiny):
    say = lambda text: tiny.tokenizer.encode(text)  # noqa: E731
    script = say("one two\nthree END four")

    def spell(logits, context):
        """A model that says the script, whatever it is asked."""
        at = context.length - context.prompt_length
        wanted = jnp.asarray(script)[jnp.clip(at, 0, len(script) - 1)]
        return jnp.where(jnp.arange(logits.shape[1])[None] == wanted[:, None], 0.0, -jnp.inf)

    prompts, base = [[65], [66, 67]], Sampling(max_new_tokens=20, processors=(spell,))
    for stop, text, tokens in (
        ("END", "one two\nthree ", len(say("one two\nthree END"))),
        (("three", "tw"), "one ", len(say("one tw"))),
        (("\nth", "e t"), "on", len(say("one t"))),
        ("never", "one two\nthree END fo", 20),
    ):
        pieces = {0: "", 1: ""}

        def hear(prompt, sample, piece, pieces=pieces):
            pieces[prompt] += piece

        for done in (
            generate(tiny, prompts, replace(base, stop=stop)),
            generate(tiny, prompts, replace(base, stop=stop), batch_size=1),
            generate(tiny, prompts, replace(base, stop=stop), hear=hear),
        ):
            for c in done:
                assert (c.text, len(c.tokens), len(c.logprobs)) == (text, tokens, tokens)
                assert c.finish_reason == ("length" if stop == "never" else "stop")
        assert pieces == {0: text, 1: text}


def test_text_is_told_whole_characters_at_a_time(tiny):
    tokens = tiny.tokenizer.encode("naïve 🎉 text <st")
    teller, said = Teller(tiny.tokenizer, ("<stop>",)), []
    for n in range(1, len(tokens) + 1):
        said.append(teller.more(tokens[:n]))
    assert "".join(said) == "naïve 🎉 text "  # "<st" may become the stop string
    assert "🎉" in said
    assert teller.rest("naïve 🎉 text <st") == "<st"
    assert find_stop(tiny.tokenizer, tokens, ("🎉 t", "xt")).text == "naïve "
    assert find_stop(tiny.tokenizer, tokens, ("nothing",)) is None


def test_pieces_of_many_rows_add_up(tiny, rows):
    heard = {}

    def hear(prompt, sample, piece):
        heard.setdefault((prompt, sample), []).append(piece)

    done = generate(tiny, rows, replace(SAMPLED, num_return_sequences=2), hear=hear, batch_size=3)
    for n, c in enumerate(done):
        assert "".join(heard.get((n // 2, n % 2), [])) == c.text


def test_the_time_is_up(tiny, rows, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr("decode.engine.time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    sampling = replace(GREEDY, max_new_tokens=100)
    done = generate(tiny, rows, sampling, batch_size=2, timeout=12.0)  # a look at the clock takes a second here
    assert {c.finish_reason for c in done} == {"timeout"}
    begun = [c for c in done if c.tokens]
    assert len(begun) == 2
    assert all(8 < len(c.tokens) < 100 and len(c.logprobs) == len(c.tokens) for c in begun)
    assert all(c.seconds > 12 for c in done)


@pytest.mark.slow
def test_layers_apart_are_the_same_model(tiny, rows):
    """unroll: another program, the same tokens, in every way of decoding."""
    apart, short = replace(tiny, unroll=True), replace(GREEDY, max_new_tokens=8)
    for sampling, how in (
        (replace(SAMPLED, max_new_tokens=8, num_return_sequences=2), {}),
        (short, {"batch_size": 2, "cache_dtype": "int8"}),
        (replace(short, num_beams=3, num_return_sequences=3), {}),
        (replace(short, penalty_alpha=0.6, top_k=4), {}),
        (replace(short, prompt_lookup_num_tokens=3), {}),
        (replace(short, guidance_scale=1.5), {}),
        (short, {"draft": tiny}),
    ):
        same(generate(apart, rows, sampling, **how), generate(tiny, rows, sampling, **how))
    declared = declare(tiny.arch)
    shapes = adapter_shapes(declared, target_paths(list(declared), "all-linear"), 2)
    adapter = jax.tree.map(
        lambda x: 0.2 * jax.random.normal(jax.random.key(0), x.shape), init_adapter(shapes, jax.random.key(1))
    )
    adapted = replace(tiny, params=attach(tiny.params, adapter, 2.0))
    assert generate(adapted, rows, short)[0].tokens != generate(tiny, rows, short)[0].tokens
    same(generate(replace(adapted, unroll=True), rows, short), generate(adapted, rows, short))
    pieces = list(stream(apart, rows[0], short))
    assert "".join(pieces) == generate(tiny, rows[:1], short)[0].text


def test_guidance_is_the_formula(tiny, rows):
    scale, new = 1.7, 6
    sampling = Sampling(max_new_tokens=new, guidance_scale=scale, ignore_eos=True)
    for negative in (None, [9, 8, 7]):
        for done in (
            generate(tiny, rows, replace(sampling, negative_prompt=negative)),
            generate(tiny, rows, replace(sampling, negative_prompt=negative), batch_size=3),
        ):
            for row, c in zip(rows, done, strict=True):
                made: list[int] = []
                for _ in range(new):
                    led = full_logprobs(tiny, row + made)[-1]
                    away = full_logprobs(tiny, (negative or row[-1:]) + made)[-1]
                    made.append(int((scale * (led - away) + away).argmax()))
                assert c.tokens == made
                raw = full_logprobs(tiny, row + made)[len(row) - 1 : -1]
                np.testing.assert_allclose(c.logprobs, raw[np.arange(new), made], rtol=0, atol=1e-5)
    plain = generate(tiny, rows, replace(sampling, guidance_scale=1.0))
    assert any(a.tokens != b.tokens for a, b in zip(plain, done, strict=True))


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.06), ("int8", 0.06)])
def test_a_smaller_cache_is_nearly_as_good(tiny, rows, dtype, bound):
    """Forced to say the same tokens, the log-probs differ by this much; scripts and exactness are told apart here."""
    row = rows[1]
    exact = generate(tiny, [row], GREEDY)[0]
    script = jnp.asarray(row + exact.tokens)

    def follow(logits, context):
        wanted = script[jnp.minimum(context.length, len(script) - 1)]
        return jnp.where(jnp.arange(logits.shape[1])[None] == wanted[:, None], 0.0, -jnp.inf)

    small = generate(tiny, [row], replace(GREEDY, processors=(follow,)), cache_dtype=dtype)[0]
    assert small.tokens == exact.tokens
    gap = np.abs(np.subtract(exact.logprobs, small.logprobs)).max()
    assert 0 < gap < bound
    beams = Sampling(max_new_tokens=6, num_beams=3)
    assert len(generate(tiny, rows, beams, cache_dtype=dtype)) == 4


def test_logits_that_are_not_finite_name_row_and_step(tiny, rows):
    def third(logits, context):
        hit = (context.length - context.prompt_length == 2) & (context.prompt_length == 13)
        return jnp.where(hit[:, None], jnp.nan, logits)

    with pytest.raises(RunError, match=r"prompt 2.*new token 3"):
        generate(tiny, rows, replace(GREEDY, processors=(third,)))
    with pytest.raises(RunError, match=r"prompt 2.*new token 3"):
        generate(tiny, rows, Sampling(max_new_tokens=8, num_beams=2, processors=(third,)))
    with pytest.raises(RunError, match="not finite"):
        generate(tiny, rows, replace(GREEDY, suppress_tokens=tuple(range(300))))


def test_what_must_be_alike_and_what_does_not_exist_is_refused(tiny, rows):
    one, other = (lambda logits, context: logits), (lambda logits, context: logits)
    cases = (
        ([replace(GREEDY, processors=(one,)), replace(GREEDY, processors=(other,))], "processors"),
        ([replace(GREEDY), replace(GREEDY), replace(GREEDY)], "3 samplings for 2 prompts"),
        (replace(GREEDY, logit_bias={300: 1.0}), "logit_bias: token id 300"),
        (replace(GREEDY, bad_words_ids=((1, 999),)), "bad_words_ids: token id 999"),
        (replace(GREEDY, stop_token_ids=(300,)), "stop_token_ids: token id 300"),
        (replace(GREEDY, max_new_tokens=None, max_length=5), "prompt 1 has 5 tokens and max_length is 5"),
        (Sampling(num_beams=2, stop="x"), "stop"),
        ([Sampling(num_beams=2), Sampling(num_beams=3)], "num_beams"),
        ([Sampling(top_k=2, penalty_alpha=0.5), Sampling(top_k=3, penalty_alpha=0.5)], "top_k"),
    )
    for sampling, words in cases:
        with pytest.raises(UsageError, match=words):
            generate(tiny, rows[:2], sampling)
    with pytest.raises(UsageError, match="cache_dtype"):
        generate(tiny, rows, GREEDY, cache_dtype="int4")
    with pytest.raises(UsageError, match="text as it comes"):
        generate(tiny, rows, Sampling(num_beams=2), hear=print)


def test_max_length_counts_the_prompt(tiny, rows):
    done = generate(tiny, rows, Sampling(max_length=20, ignore_eos=True))
    assert [len(c.prompt_tokens) + len(c.tokens) for c in done] == [20] * 4


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"data": 2}, {"tensor": 2}, {"data": 2, "tensor": 2}])
def test_spread_over_devices_every_way_of_decoding(tiny, tiny_folder, rows, axes):
    from decode.load import load_model
    from sharding.mesh import make_mesh

    mesh = make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))])
    spread = load_model(str(tiny_folder), attention="reference", mesh=mesh)
    for sampling, size in (
        (replace(SAMPLED, max_new_tokens=8, num_return_sequences=2), None),
        (replace(SAMPLED, max_new_tokens=8, top_k=20, repetition_penalty=1.2), 2),
        (Sampling(max_new_tokens=8, num_beams=4, num_return_sequences=2), None),
    ):
        same(generate(spread, rows, sampling, batch_size=size), generate(tiny, rows, sampling, batch_size=size))


def test_scores_tell_the_likeliest_too(tiny, rows):
    for scored in score(tiny, rows, top=4):
        whole = full_logprobs(tiny, scored.tokens)[:-1]
        assert len(scored.top_logprobs) == len(scored.logprobs)
        for top, at in zip(scored.top_logprobs, whole, strict=True):
            assert list(top) == np.argsort(-at, kind="stable")[:4].tolist()
            np.testing.assert_allclose(list(top.values()), np.sort(at)[::-1][:4], rtol=0, atol=1e-5)
