"""Rewards: how they are found, what they are given, and what they may not give back."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest

from configs.errors import RunError, UsageError
from configs.load import load
from configs.sample import Sample
from data.prompts import Prompt
from train.rewards import brevity, judge_completions, load_rewards, read_grade, total, weights_of

CHAT = Prompt("rows.jsonl:1", [{"role": "user", "content": "one"}], [1], {"want": 5, "messages": []})
TEXT = Prompt("rows.jsonl:2", "two", [2], {"other": "x"})


def judged(reward, prompts=(CHAT, TEXT), texts=(("a", "bb"), ("ccc", "dddd"))):
    return judge_completions({"mine": reward}, prompts, texts)


def test_a_reward_sees_prompts_completions_and_columns():
    seen = {}

    def reward(prompts, completions, want, **columns):
        seen.update(prompts=prompts, completions=completions, want=want, **columns)
        return [None, 1, np.float32(2), True]

    assert judged(reward) == [[{"mine": None}, {"mine": 1.0}], [{"mine": 2.0}, {"mine": 1.0}]]
    assert seen["prompts"] == [CHAT.value, CHAT.value, "two", "two"]
    say = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    assert seen["completions"] == [say("a"), say("bb"), "ccc", "dddd"]
    assert seen["want"] == [5, 5, None, None]
    assert seen["other"] == [None, None, "x", "x"]


def raises(**_):
    raise ZeroDivisionError("by zero")


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (lambda **_: [1.0], "reward 'mine', rows rows.jsonl:1 to rows.jsonl:2: it gave 1 scores for 4 completions"),
        (lambda **_: [1, 1, math.nan, 1], "reward 'mine', row rows.jsonl:2, completion 1: the score is nan"),
        (lambda **_: [1, math.inf, 1, 1], "row rows.jsonl:1, completion 2: the score is inf"),
        (lambda **_: [1, 1, 1, "good"], "row rows.jsonl:2, completion 2: the score is 'good'"),
        (lambda **_: 3, "it raised TypeError"),
        (raises, "rows rows.jsonl:1 to rows.jsonl:2: it raised ZeroDivisionError: by zero"),
    ],
)
def test_what_a_reward_may_not_do(reward, words):
    with pytest.raises(RunError, match=words):
        judged(reward)


def test_the_total_is_weighted_and_leaves_out_what_is_not_judged():
    weights = {"a": 2.0, "b": 0.5}
    assert total({"a": 1.0, "b": 4.0}, weights) == 4.0
    assert total({"a": None, "b": 4.0}, weights) == 2.0
    assert total({"a": None, "b": None}, weights) is None


def test_names_and_weights():
    sample = Sample(reward=("brevity", "/far/away/mine.py:score"), judge="m", reward_weights=(1.0, 2.0, 3.0))
    assert weights_of(sample) == {"brevity": 1.0, "mine.py:score": 2.0, "judge": 3.0}
    with pytest.raises(UsageError, match=r"sample.reward is empty and sample\.judge is not set"):
        weights_of(Sample())
    with pytest.raises(UsageError, match=r"two of the name 'x\.py:f'"):
        weights_of(Sample(reward=("a/x.py:f", "b/x.py:f")))


def test_code_beside_the_recipe_is_found_wherever_one_stands(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from beside import TWO\ndef two(completions, **_): return [TWO] * len(completions)"
    )
    (tmp_path / "beside.py").write_text("TWO = 2")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("base: sft\nmodel: {source: m}\ndata: {train: x}\nsample: {reward: ['mine:two', 'math:sqrt']}\n")
    sample = load(recipe).sample
    assert sample.reward == (f"{tmp_path}/mine.py:two", "math:sqrt")
    rewards = load_rewards(sample.model_copy(update={"reward": sample.reward[:1]}))
    assert rewards["mine.py:two"](prompts=[], completions=["a"]) == [2]
    monkeypatch.chdir(tmp_path)
    from_command_line = load("sft", ["model.source=m", "data.train=x", "sample.reward=mine.py:two"]).sample
    assert from_command_line.reward == sample.reward[:1]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere:f", "sample.reward 'nowhere:f': nowhere cannot be imported: ModuleNotFoundError"),
        ("nowhere.py:f", r"nowhere.py cannot be imported: FileNotFoundError"),
        ("math:nothing", "math has no function 'nothing'; it has .*'sqrt'"),
        ("math:pi", "math has no function 'pi'"),
        ("brevty", r"'brevty' is no function .* built-in ones \(brevity\) and no reward MODEL: "),
    ],
)
def test_unknown_rewards_are_refused(name, words):
    with pytest.raises(UsageError, match=words):
        load_rewards(Sample(reward=(name,)))


def test_brevity():
    texts = ["", "Yes.", "word " * 19 + "end.", "word " * 39 + "end.", "word " * 39 + "end", "no end"]
    assert brevity(texts, texts) == [0.0, 1.0, 1.0, 0.5, 0.25, 0.5]


@pytest.mark.parametrize(
    ("reply", "pattern", "grade"),
    [
        ("7", r"\d+", 7.0),
        ("I give it 8.5 of 10.", r"\d+(?:\.\d+)?", 8.5),
        ("Score: [[3]] of 10", r"\[\[(\d+)\]\]", 3.0),
        ("good", r"\d+", None),
        ("grade: x", r"grade: (\w)", None),
        ("yes", r"yes|no: (\d)", None),
    ],
)
def test_grades(reply, pattern, grade):
    assert read_grade(reply, re.compile(pattern)) == grade


def test_the_judge_is_asked_and_its_reply_is_read(monkeypatch):
    asked = []

    def generate(model, prompts, sampling, **_):
        asked.extend(prompts)
        assert (sampling.temperature, sampling.max_new_tokens) == (0, 4)
        return [SimpleNamespace(text=text) for text in ("4", "none", "3", "2")]

    tokenizer = SimpleNamespace(render=lambda messages: "")
    monkeypatch.setattr("decode.generate.generate", generate)
    monkeypatch.setattr("decode.load.load_model", lambda name: SimpleNamespace(tokenizer=tokenizer))
    (reward,) = load_rewards(
        Sample(judge="m", judge_prompt="{prompt} -> {completion} {x}", judge_max_new_tokens=4)
    ).values()
    texts = (("{prompt}", "b"), ("c", "d"))
    assert [[s["mine"] for s in row] for row in judged(reward, texts=texts)] == [[4.0, None], [3.0, 2.0]]
    assert asked[0] == [{"role": "user", "content": "one -> {prompt} {x}"}]
    assert asked[3] == [{"role": "user", "content": "two -> d {x}"}]
