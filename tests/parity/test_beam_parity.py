"""Beam search against transformers: the plain reference and `generate` in float64, the real model in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.errors import RunError
from decode.generate import generate
from decode.load import Model, load_model
from model.compute import Compute
from tests.decode import reference
from tests.decode.conftest import make_tokenizer
from tests.parity.test_decode_parity import make_oracle, ours_of, widen

pytestmark = pytest.mark.parity

PENALTIES, STOPPINGS = (1.0, 0.6, 2.0, 0.0, -1.0), (False, True, "never")


class _WideTorch:
    """The module torch, but its float32 is float64: beam search holds log-probs and scores in float32 for any model."""

    def __init__(self, torch):
        self._torch = torch
        self.float = self.float32 = torch.float64

    def __getattr__(self, name):
        return getattr(self._torch, name)


@pytest.fixture(scope="module")
def oracle():
    """A tiny Llama that computes all of generation in float64, and what follows any tokens, remembered."""
    import torch
    from transformers.generation import utils

    torch.set_num_threads(1)
    model = make_oracle("tied")
    widen(model, ours_of(model, jnp.float32)[0])
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    memory = {}

    def logits(tokens):
        key = tuple(tokens)
        if key not in memory:
            with torch.no_grad():
                memory[key] = model(torch.tensor([tokens])).logits[0, -1].numpy()
        return memory[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "torch", _WideTorch(torch))
        yield model, logits


def ask(model, prompts, *, pad=0, **options):
    """transformers' beams of each prompt of one left-padded batch: [(tokens, score), ...], best first."""
    import torch

    longest = max(map(len, prompts))
    ids, mask = np.full((len(prompts), longest), pad), np.zeros((len(prompts), longest), int)
    for i, row in enumerate(prompts):
        ids[i, longest - len(row) :], mask[i, longest - len(row) :] = row, 1
    beams = options["num_beams"]
    out = model.generate(
        torch.tensor(ids), attention_mask=torch.tensor(mask), do_sample=False, num_return_sequences=beams,
        return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip
    found = []
    for sequence, where, score in zip(out.sequences, out.beam_indices, out.sequences_scores, strict=True):
        length = int((where >= 0).sum())
        found.append((sequence[longest : longest + length].tolist(), float(score)))
    return [found[i : i + beams] for i in range(0, len(found), beams)]


def cases(oracle, count):
    """Random prompts and parameters; ends of sequence are tokens that the beams really meet."""
    _, logits = oracle
    rng = np.random.default_rng(5)
    for number in range(count):
        prompt = rng.integers(0, 128, int(rng.integers(1, 12))).tolist()
        beams, steps = int(rng.choice([2, 3, 4, 8])), int(rng.integers(1, 13))
        free = reference.beam_search(logits, prompt, num_beams=beams, max_new_tokens=steps)
        seen = sorted({token for tokens in free.tokens for token in tokens})
        ids = rng.choice(seen, min(len(seen), (0, 1, 3, 6)[number % 4]), replace=False).tolist()
        yield prompt, {
            "num_beams": beams, "max_new_tokens": steps, "length_penalty": PENALTIES[number % 5],
            "early_stopping": STOPPINGS[number // 5 % 3],
        }, ids  # fmt: skip


def test_the_reference_is_transformers(oracle):
    model, logits = oracle
    ended = running = closed = 0
    for prompt, options, ids in cases(oracle, 160):
        ours = reference.beam_search(logits, prompt, eos_ids=ids, **options)
        theirs = ask(model, [prompt], **options, eos_token_id=ids or None)[0]
        assert ours.margin > 1e-9, "a tie proves nothing"
        assert ours.tokens == [tokens for tokens, _ in theirs], (prompt, options, ids)
        np.testing.assert_allclose(ours.scores, [score for _, score in theirs], rtol=0, atol=1e-9)
        ended += sum(ours.stopped)
        running += len(ours.stopped) - sum(ours.stopped)
        closed += max(map(len, ours.tokens)) < options["max_new_tokens"]
    assert min(ended, running, closed) > 20, (ended, running, closed)


def test_the_reference_with_processors_is_transformers(oracle):
    model, logits = oracle
    for prompt, options, ids in cases(oracle, 40):
        few = min(4, options["max_new_tokens"])

        def process(tokens, scores, prompt=prompt, ids=ids, few=few):
            scores = scores.copy()
            seen = list(set(tokens))
            scores[seen] *= 1.3  # log-probs: all negative
            if len(tokens) - len(prompt) < few:
                scores[ids] = -np.inf
            return scores

        ours = reference.beam_search(logits, prompt, eos_ids=ids, process=process, **options)
        extra = {"repetition_penalty": 1.3, "min_new_tokens": few, "eos_token_id": ids or None}
        theirs = ask(model, [prompt], **options, **extra)[0]
        assert ours.tokens == [tokens for tokens, _ in theirs], (prompt, options, ids)
        np.testing.assert_allclose(ours.scores, [score for _, score in theirs], rtol=0, atol=1e-9)


def test_the_reference_of_a_padded_batch_is_transformers(oracle):
    model, logits = oracle
    rng = np.random.default_rng(6)
    for early_stopping in STOPPINGS:
        prompts = [rng.integers(0, 128, n).tolist() for n in (3, 9, 5, 1)]
        options = {"num_beams": 4, "max_new_tokens": 10, "early_stopping": early_stopping}
        free = [reference.beam_search(logits, prompt, **options) for prompt in prompts]
        ids = [free[0].tokens[0][3], free[1].tokens[0][6]]
        theirs = ask(model, prompts, **options, eos_token_id=ids)
        for prompt, beams in zip(prompts, theirs, strict=True):
            ours = reference.beam_search(logits, prompt, eos_ids=ids, **options)
            assert ours.tokens == [tokens for tokens, _ in beams]
            np.testing.assert_allclose(ours.scores, [score for _, score in beams], rtol=0, atol=1e-9)


def test_generate_in_float64(oracle):
    from decode.sampling import Sampling

    theirs_model, _ = oracle
    rng = np.random.default_rng(7)
    with jax.enable_x64(True):
        arch, params = ours_of(theirs_model, jnp.float64)
        model = Model(arch, Compute(dtype=jnp.float64, attention="reference"), params, make_tokenizer(), ())
        for number in range(6):
            prompts = [rng.integers(0, 128, n).tolist() for n in (3, 9, 5, 1)]
            options = {
                "num_beams": 4, "max_new_tokens": 10, "length_penalty": PENALTIES[number % 5],
                "early_stopping": STOPPINGS[number % 3],
            }  # fmt: skip
            ids = [beams[0][0][4 + number % 3] for beams in ask(theirs_model, prompts[:2], **options)]
            theirs = ask(theirs_model, prompts, **options, eos_token_id=ids)
            ours = generate(model, prompts, Sampling(**options, num_return_sequences=4, stop_token_ids=tuple(ids)))
            expected = [beam for beams in theirs for beam in beams]
            assert [c.tokens for c in ours] == [tokens for tokens, _ in expected], options
            np.testing.assert_allclose([c.score for c in ours], [s for _, s in expected], rtol=0, atol=1e-9)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Our model, and transformers' of the folder that we write."""
    import torch
    from transformers import AutoModelForCausalLM

    from convert.hf import write_folder
    from convert.load import resolve

    try:
        source = resolve("smollm2-135m-instruct")
    except RunError as error:
        pytest.skip(str(error))
    torch.set_num_threads(1)
    model = load_model("smollm2-135m-instruct", dtype="float32")
    folder = tmp_path_factory.mktemp("export") / "smollm2"
    write_folder(
        folder, model.params, model.arch, config=source.config, generation_config=source.generation_config,
        tokenizer=model.tokenizer,
    )  # fmt: skip
    return model, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


TEXTS = ("The Nile is the longest river in Africa, and", "for i in range(10):\n    print(", "“Non, merci”, said she;")


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2, "length_penalty": 2.0, "early_stopping": True},
        {"num_beams": 4},
        {"num_beams": 6, "length_penalty": 0.0, "early_stopping": "never"},
    ],
    ids=str,
)
def test_the_real_model(real, options):
    from decode.sampling import Sampling

    model, theirs_model = real
    prompts = [model.tokenizer.encode(text) for text in TEXTS]
    beams, extra = options["num_beams"], [*model.tokenizer.encode("."), *model.tokenizer.encode(",")]
    ids = [*model.eos_ids, *extra]  # punctuation ends a sequence too: some beams stop, some do not
    options = {**options, "max_new_tokens": 20}
    theirs = ask(theirs_model, prompts, pad=2, **options, eos_token_id=ids)
    ours = generate(model, prompts, Sampling(**options, num_return_sequences=beams, stop_token_ids=tuple(extra)))
    assert {c.finish_reason for c in ours} == {"stop", "length"}
    for i, expected in enumerate(theirs):
        got = ours[i * beams : (i + 1) * beams]
        np.testing.assert_allclose([c.score for c in got], [s for _, s in expected], rtol=0, atol=1e-4)
        if [c.tokens for c in got] != [tokens for tokens, _ in expected]:  # only among equals in score
            scores = np.asarray([s for _, s in expected])
            print(f"differs: {TEXTS[i]!r}, {options}: smallest gap of scores {np.diff(-scores).min()}")
            assert sorted(c.tokens for c in got) == sorted(tokens for tokens, _ in expected)
            assert np.diff(-scores).min() < 2e-4
