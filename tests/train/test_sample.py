"""Samples on disk: what is kept of them, the same whenever and however often they are made, never tokenised anew."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import RunError, UsageError
from configs.load import load
from configs.sample import Sample
from data.examples import Examples, to_example
from decode.generate import Sampling, generate
from sharding.mesh import make_mesh
from tests.train import tiny
from train import sample as module
from train.sample import load_policy, sample
from train.selection import choose_best, choose_pairs, scores_of, sift, summarise

SCORES = st.lists(st.none() | st.sampled_from([-1.0, 0.0, 0.25, 0.5, 2.0]), max_size=6)


@given(SCORES, st.sampled_from([0.0, 0.25, 1.0]), st.sampled_from([None, 0.25]))
def test_pairs(scores, least, threshold):
    known = [score for score in scores if score is not None]
    every = [
        (i, j)
        for i, a in enumerate(scores)
        for j, b in enumerate(scores)
        if a is not None and b is not None and a > b and a - b >= least
        if threshold is None or a >= threshold
    ]
    assert choose_pairs(scores, "all_pairs", least, threshold) == every
    found = choose_pairs(scores, "pairs", least, threshold)
    if not every:
        assert found == []
    else:
        assert found == [(scores.index(max(known)), scores.index(min(known)))]


@given(SCORES, st.none() | st.sampled_from([0.0, 0.25]))
def test_best(scores, least):
    enough = [i for i, s in enumerate(scores) if s is not None and (least is None or s >= least)]
    assert choose_best(scores, "all", least) == enough
    top = max((scores[i] for i in enough), default=None)
    assert choose_best(scores, "best", least) == ([] if top is None else [scores.index(top)])
    several = choose_best(scores, "best", least, 3)
    assert len(several) == min(3, len(enough))
    assert all(scores[i] >= scores[j] for i in several for j in set(enough) - set(several))


def made(tokens, reward, reason="stop", text="", logprob=-1.0):
    rewards = {"brevity": reward}
    return {"text": text, "tokens": tokens, "finish_reason": reason, "rewards": rewards, "logprob": logprob}


ROW = {
    "completions": [
        made([1], 3.0, text="It is 7."),
        made([1, 2, 3], 1.0, "length", "seven"),
        made([1], 3.0, text="It is 7."),
        made([3, 4], None, text="8"),
        made([5, 6], 2.0, text="it is 7", logprob=-4.0),
        made([7, 8], 4.0, text="It is not 7, surely"),
    ]
}


@pytest.mark.parametrize(
    ("knobs", "left", "fell"),
    [
        ({}, [3, 1, None, None, 2, 4], {}),
        ({"finished_only": True}, [3, None, None, None, 2, 4], {"not finished": 1}),
        ({"min_tokens": 2}, [None, 1, None, None, 2, 4], {"length": 1}),
        ({"max_tokens": 2}, [3, None, None, None, 2, 4], {"length": 1}),
        ({"max_perplexity": 2.8}, [3, 1, None, None, None, 4], {"perplexity": 1}),  # e^1 and e^(4 / 2)
        ({"min_perplexity": 2.8}, [None, None, None, None, 2, None], {"perplexity": 3}),
        ({"max_similarity": 0.99}, [3, 1, None, None, None, 4], {"similarity": 1}),  # the same words
        ({"max_similarity": 0.2}, [None, 1, None, None, None, 4], {"similarity": 2}),  # 2 of 7 word pairs with the best
        ({"threshold": 3.0, "min_pass_rate": 0.6}, [3, 1, None, None, 2, 4], {}),
        ({"threshold": 3.0, "min_pass_rate": 0.7}, [None] * 6, {"pass rate": 4}),
        ({"threshold": 3.0, "max_pass_rate": 0.5}, [None] * 6, {"pass rate": 4}),
    ],
)
def test_filters(knobs, left, fell):
    found, faults = sift(ROW, Sample(reward=("brevity",), **knobs))
    assert found == left
    assert faults == {"said before": 1, "not judged": 1, **fell}


def test_estimates_are_means_over_prompts():
    other = {"completions": [made([i], 0.0, text="no") for i in range(6)]}
    told = summarise([ROW, other], Sample(reward=("brevity",), threshold=3.0))
    assert [name for name in told if name.startswith("best@")] == ["best@1", "best@2", "best@4", "best@6"]
    assert told["best@1"] == pytest.approx((13 / 5 + 0) / 2)
    assert told["best@4"] == pytest.approx(((4 * 4 + 3) / 5 + 0) / 2)  # of 5 judged, one is left out
    assert told["best@6"] == 0, "of the one prompt with 6 judged samples"
    assert told["pass@1"] == pytest.approx((3 / 5 + 0) / 2)
    assert told["pass@4"] == 0.5
    assert told["maj@4"] == pytest.approx((3 / 4) / 2), "7 is said by four, and three of them pass"


def test_what_was_said_before_counts_once_and_never_ending_costs():
    row = {"completions": [made([1], 3.0), made([2], 1.0, "length"), made([1], 3.0), made([3], None)]}
    settings = Sample(reward=("brevity",), missing_eos_penalty=0.5, reward_weights=(2.0,))
    assert scores_of(row, settings) == [6.0, 1.5, None, None]
    told = summarise([row, {"completions": [made([1], 1.0), made([2], 1.0)]}], settings)
    assert told["reward"] == pytest.approx((6 + 1.5 + 6 + 2 + 2) / 5)
    assert told["rewards/brevity"] == pytest.approx((3 + 1 + 3 + 1 + 1) / 5)
    assert (told["ties"], told["unjudged"], told["truncated"], told["tokens"]) == (0.5, 1, 1 / 6, 1)
    assert told["reward_best"] == 4


@pytest.fixture
def run_of(tmp_path, sampling_settings):
    """run_of(name, *overrides) -> the Run of a short sampling: calls of 4 prompts, in 4 slots."""
    return lambda name, *more: load("dpo", [f"output={tmp_path / name}", *sampling_settings, *more])


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Short calls, on one device."""
    monkeypatch.setattr(module, "PER_CALL", 2)
    monkeypatch.setattr(module, "make_mesh", lambda *_: make_mesh({}, jax.devices()[:1]))


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_samples_are_the_engines_and_what_is_kept_are_their_tokens(run_of, tmp_path):
    run = run_of("a")
    path = sample(run)
    assert path == tmp_path / "a" / "preferences.jsonl"
    samples, model = rows_of(tmp_path / "a" / "samples.jsonl"), load_policy(run)
    assert len(samples) == 10
    sampling = Sampling(6, temperature=1.0, num_return_sequences=2, suppress_tokens=tuple(range(318, 320)))
    first = [row["prompt_tokens"] for row in samples[:4]]
    together = generate(model, first, sampling, seeds=range(4), batch_size=4)
    assert [one.tokens for one in together] == [one["tokens"] for row in samples[:4] for one in row["completions"]]
    assert [row["seed"] for row in samples] == list(range(10))
    kept = rows_of(path)
    examples = Examples(kept, model.tokenizer, run.data, "pair")
    asked = {tuple(row["prompt_tokens"]): row for row in samples}
    for i, pair in enumerate(kept):
        row = asked[tuple(pair["prompt_tokens"])]
        better, worse = (row["completions"][j] for j in pair["samples"])
        assert (pair["chosen_tokens"], pair["rejected_tokens"]) == (better["tokens"], worse["tokens"])
        assert pair["chosen"] == [{"role": "assistant", "content": better["text"]}]
        assert pair["margin"] == pair["score_chosen"] - pair["score_rejected"] > 0
        assert pair["rewards"] == {"small.py:letters": [pair["score_chosen"], pair["score_rejected"]]}
        assert (pair["seed"], pair["model"], pair["sampling"]["max_new_tokens"]) == (row["seed"], run.model.source, 6)
        for branch, side in ((1, better), (2, worse)):
            learnt = (examples[i]["branches"] == branch) & (examples[i]["weights"] > 0)
            assert examples[i]["targets"][learnt].tolist() == side["tokens"]


def test_interrupted_and_run_again_is_the_same_file(run_of, tmp_path, monkeypatch):
    sample(run_of("whole"))
    calls = []

    def dies(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*arguments, **options)

    monkeypatch.setattr(module, "generate", dies)
    with pytest.raises(KeyboardInterrupt):
        sample(run_of("cut"))
    part = tmp_path / "cut" / "samples.part"
    assert len(rows_of(part)) == 4
    assert not (tmp_path / "cut" / "preferences.jsonl").exists()
    with part.open("a") as file:
        file.write(json.dumps(rows_of(part)[0]) + '\n{"half')  # killed while it wrote
    sample(run_of("cut"))
    assert len(calls) == 4
    assert not part.exists()
    for name in ("samples.jsonl", "preferences.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    filters = ("max_similarity=0.9", "max_perplexity=1e9", "min_tokens=1", "max_tokens=6", "threshold=0")
    more = [f"sample.{one}" for one in filters]
    sample(run_of("cut", "sample.keep=all_pairs", "sample.min_margin=0.1", *more))  # chosen anew, not sampled
    assert len(calls) == 4
    for more in ("sample.temperature=0.5", "sample.seed=1", "sample.reward=brevity"):
        with pytest.raises(UsageError, match=rf"samples made otherwise.*\n  {more.partition('=')[0]}: .* -> "):
            sample(run_of("cut", more))
    with pytest.raises(UsageError, match="weights: "):
        sample(run_of("cut", f"model.source={tiny.make_model(tmp_path / 'other', seed=1)}"))


@pytest.mark.parametrize("keep", ["best", "all"])
def test_kept_completions_are_rows_to_fine_tune_on(run_of, tmp_path, keep):
    run = run_of("b", f"sample.keep={keep}", "sample.threshold=0.2")
    path = sample(run)
    assert path.name == "completions.jsonl"
    samples, tokenizer = rows_of(tmp_path / "b" / "samples.jsonl"), load_policy(run).tokenizer
    enough = [[s for s in scores_of(row, run.sample) if s is not None and s >= 0.2] for row in samples]
    kept = rows_of(path)
    assert len(kept) == sum(len(some) if keep == "all" else min(1, len(some)) for some in enough) > 0
    for row in kept:
        example = to_example(row, tokenizer, run.data)
        assert example is not None
        (source,) = (one for one in samples if one["seed"] == row["seed"])
        said = source["completions"][row["samples"][0]]["tokens"]
        assert example["tokens"].tolist() == source["prompt_tokens"] + said
        np.testing.assert_array_equal(example["weights"], [0] * len(source["prompt_tokens"]) + [1] * len(said))
        assert row["score"] >= 0.2


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("sample.num_generations=1",), "a pair needs two completions"),
        (("sample.temperature=0",), "greedy completions of a prompt are all the same"),
        (("sample.reward_weights=[1,2]",), "2 numbers for 1 of"),
        (("sample.keep_n=2",), "keep_n is for keep=best"),
        (("sample.max_pass_rate=0.5",), "from which score a completion passes"),
        (("sample.min_tokens=5", "sample.max_tokens=4"), "min_tokens is 5 and sample.max_tokens is 4"),
        (("sample.judge_prompt=hello {prompt}",), "has no {completion}"),
        (("sample.judge_pattern='['",), "no regular expression"),
        (("sample.reward=[]",), "nothing says which completion is better"),
        (("sample.reward=nowhere:f",), "cannot be imported"),
        (("sample.max_new_tokens=60",), r"prompts.jsonl:1 has \d+ tokens and max_new_tokens is 60"),
        (("data.train=nothing.jsonl",), "nothing.jsonl"),
    ],
)
def test_refused_before_anything_is_written(run_of, tmp_path, more, words):
    with pytest.raises(UsageError, match=words):
        sample(run_of("bad", *more))
    assert not (tmp_path / "bad").exists()


def test_nothing_kept_says_why(run_of, tmp_path):
    with pytest.raises(RunError, match=r"nothing is kept of 10 prompts; 20 completions fell: \d+ to no pair"):
        sample(run_of("none", "sample.min_margin=9"))
    assert not (tmp_path / "none" / "preferences.jsonl").exists()
    assert (tmp_path / "none" / "samples.jsonl").exists(), "no completion is lost"


@pytest.mark.slow
def test_a_mesh_samples_the_same(run_of, tmp_path, monkeypatch):
    sample(run_of("one"))
    monkeypatch.setattr(module, "make_mesh", make_mesh)
    sample(run_of("many", "mesh.fsdp=2", "mesh.tensor=2", "mesh.data=2"))
    one, many = (
        [[made["tokens"] for made in row["completions"]] for row in rows_of(tmp_path / name / "samples.jsonl")]
        for name in ("one", "many")
    )
    assert one == many
