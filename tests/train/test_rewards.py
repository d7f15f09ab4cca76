"""Rewards: how they are found, what they are given, and what they may not give back."""

import datetime
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from configs.errors import RunError, UsageError
from configs.load import load
from configs.sample import Sample
from data.prompts import Prompt
from decode.results import Completion
from train.rewards import Reward, Rewards, judge_completions, load_rewards, read_grade, total, weights_of
from train.workers import Hung, Pool, Worker

CHAT = Prompt("rows.jsonl:1", [{"role": "user", "content": "one"}], [1], {"want": 5, "messages": []})
TEXT = Prompt("rows.jsonl:2", "two", [2], {"other": "x"})


def made_of(texts):
    return [[Completion([*map(ord, text)], text, [], 0.0, "stop", []) for text in several] for several in texts]


def judged(reward, prompts=(CHAT, TEXT), texts=(("a", "bb"), ("ccc", "dddd")), **options):
    return judge_completions(Rewards({"mine": Reward(reward)}, **options), prompts, made_of(texts))


def test_a_reward_sees_prompts_completions_and_columns():
    seen = {}

    def reward(prompts, completions, want, **columns):
        seen.update(prompts=prompts, completions=completions, want=want, **columns)
        return [None, 1, np.float32(2), True]

    assert judged(reward).scores == [[{"mine": None}, {"mine": 1.0}], [{"mine": 2.0}, {"mine": 1.0}]]
    assert seen["prompts"] == [CHAT.value, CHAT.value, "two", "two"]
    say = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    assert seen["completions"] == [say("a"), say("bb"), "ccc", "dddd"]
    assert seen["completion_ids"] == [[97], [98, 98], [99, 99, 99], [100, 100, 100, 100]]
    assert seen["finish_reason"] == ["stop"] * 4
    assert seen["want"] == [5, 5, None, None]
    assert seen["other"] == [None, None, "x", "x"]


def test_groups_of_unlike_size_and_what_was_judged_before():
    seen = []

    def second(rewards, **_):
        seen.append(dict(rewards))
        return [1.0, 1.0, 1.0]

    rewards = Rewards({"first": Reward(lambda **_: [3, None, 4]), "second": Reward(second)})
    found = judge_completions(rewards, (CHAT, TEXT), made_of((("a",), ("b", "c"))))
    assert [[one["first"] for one in several] for several in found.scores] == [[3.0], [None, 4.0]]
    assert seen == [{"first": [3.0, None, 4.0]}]
    assert found.failed == {}


def raises(**_):
    raise ZeroDivisionError("by zero")


WRONG = [
    (lambda **_: [1.0], 4, "reward 'mine', row rows.jsonl:1, .* it gave 1 scores for 4 completions"),
    (lambda **_: [1, 1, math.nan, 1], 1, "reward 'mine', row rows.jsonl:2, completion 1: the score is nan"),
    (lambda **_: [1, math.inf, 1, 1], 1, "row rows.jsonl:1, completion 2: the score is inf"),
    (lambda **_: [1, 1, 1, "good"], 1, "row rows.jsonl:2, completion 2: the score is 'good'"),
    (lambda **_: 3, 4, "it raised TypeError"),
    (
        raises,
        4,
        "row rows.jsonl:1, completion 1 to row rows.jsonl:2, completion 2: it raised ZeroDivisionError: by zero",
    ),
]


@pytest.mark.parametrize(("reward", "count", "words"), WRONG)
def test_what_a_reward_may_not_do(reward, count, words):
    with pytest.raises(RunError, match=words):
        judged(reward)


@pytest.mark.parametrize(("reward", "count", "words"), WRONG)
def test_or_it_is_counted_and_told_once(reward, count, words, capsys):
    rewards = Rewards({"mine": Reward(reward), "other": Reward(lambda **_: [1, 2, 3, 4])}, on_error="skip")
    for _ in range(2):
        found = judge_completions(rewards, (CHAT, TEXT), made_of((("a", "bb"), ("ccc", "dddd"))))
        flat = [one for several in found.scores for one in several]
        assert [one["other"] for one in flat] == [1, 2, 3, 4]
        assert sum(one["mine"] is None for one in flat) == count
        assert found.failed == {"mine": count}
    assert rewards.failed == {"mine": 2 * count}
    said = capsys.readouterr().err
    assert re.search(words, said)
    assert len(said.splitlines()) == 1


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
    assert rewards.each["mine.py:two"].call(prompts=[], completions=["a"]) == [2]
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
        (
            "brevty",
            r"'brevty' is no function .* built-in ones \(brevity, .*; did you mean 'brevity'\?\) and no reward MODEL: ",
        ),
    ],
)
def test_unknown_rewards_are_refused(name, words):
    with pytest.raises(UsageError, match=words):
        load_rewards(Sample(reward=(name,)))


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
    ).each.values()
    texts = (("{prompt}", "b"), ("c", "d"))
    assert [[s["mine"] for s in row] for row in judged(reward.call, texts=texts).scores] == [[4.0, None], [3.0, 2.0]]
    assert asked[0] == [{"role": "user", "content": "one -> {prompt} {x}"}]
    assert asked[3] == [{"role": "user", "content": "two -> d {x}"}]


MINE = """
import os, re, sys, time
CALLS = []

def scaled(completions, want, scale: float = 1.0, *, names: list[str] = ()):
    print("said to people")
    CALLS.append(1)
    return [scale * want[i] * len(names) + len(CALLS) for i in range(len(completions))]

def hangs(completions, **columns):
    if completions[0] == "hang":
        re.match(r"(a+)+$", "a" * 60 + "b")  # keeps the interpreter's lock
    return [1.0] * len(completions)

def dies(**columns): os._exit(7)
def leaves(**columns): sys.exit(1)
def gives(completions, **columns): return [lambda: 1 for _ in completions]
def told(completions, when, values, **columns):
    import numpy as np
    assert when[0] == "2026-01-02" and values[0] == [1.5, 2.5]
    return np.asarray(values, np.float32).sum(1)
def needs(completions, reference, **columns): return [1.0] * len(completions)
def fixed(completions, *, want: int = 7, **columns):
    return [want + len(columns.get("other") or []) for _ in completions]
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    path = tmp_path_factory.mktemp("mine") / "mine.py"
    path.write_text(MINE)
    return lambda name, **options: Sample(
        reward=(f"{path}:{name}",), reward_options={f"mine.py:{name}": options} if options else {}, reward_timeout=1.0
    )


def scores_of(rewards, prompts=(TEXT,), texts=(("a", "b"),)):
    found = judge_completions(rewards, prompts, made_of(texts))
    return [next(iter(one.values())) for several in found.scores for one in several]


def test_a_function_of_the_users_own_keeps_its_state_and_its_options(mine, capfd):
    row = Prompt("r:1", "one", [1], {"want": 5, "extra": 1})
    rewards = load_rewards(mine("scaled", scale=2.0, names=["a", "b"]), [row])
    assert scores_of(rewards, [row]) == [21.0, 21.0]
    assert scores_of(rewards, [row]) == [22.0, 22.0]
    assert "said to people" in capfd.readouterr().err
    here = load_rewards(mine("scaled").model_copy(update={"reward_timeout": None}), [row])
    assert scores_of(here, [row]) == [1.0, 1.0]


def test_columns_and_scores_of_other_types_are_handed_over(mine):
    """As Parquet files and NumPy have them."""
    row = Prompt("r:1", "one", [1], {"when": datetime.date(2026, 1, 2), "values": np.asarray([1.5, 2.5])})
    assert scores_of(load_rewards(mine("told"), [row]), [row]) == [4.0, 4.0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scal": 1.0}, r"reward_options\.mine\.py:scaled has 'scal', its options: scale, names; did you mean 'scale'"),
        ({"completions": 1.0}, "has 'completions', its options"),
        ({"scale": "big"}, r"scaled\.scale is 'big': Input should be a valid number"),
        ({"names": [1]}, r"scaled\.names is \[1\]: Input should be a valid string"),
    ],
)
def test_options_are_those_of_the_signature(mine, options, words):
    with pytest.raises(UsageError, match=words):
        load_rewards(mine("scaled", **options))


def test_an_option_of_keyword_only_is_no_column(mine):
    row = Prompt("r:1", "one", [1], {"want": 5, "other": "x"})
    assert scores_of(load_rewards(mine("fixed"), [row]), [row]) == [9.0, 9.0]
    assert scores_of(load_rewards(mine("fixed", want=1), [row]), [row]) == [3.0, 3.0]


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        ({"reward_options": {"formt": {}}}, "reward_options has 'formt', sample.reward has: format; did you mean"),
        (
            {"reward_options": {"format": {"tags": "think"}}},
            r"format\.tags is 'think': 'str' instances are not allowed",
        ),
        ({"reward_options": {"format": {"tags": []}}}, r"format\.tags is \[\]"),
        ({"reward": ("length",)}, "'length' needs the column .or option. 'most', which no row has"),
        (
            {"reward": ("exact",)},
            "'exact' needs the column .* 'answer' or 'solution', which no row has; they have want, messages",
        ),
        ({"reward": ("regex",), "reward_options": {"regex": {"pattern": "("}}}, "is no regular expression"),
        (
            {"reward": ("cosine_length",), "reward_options": {"cosine_length": {"max_len": 9}}},
            "needs the reward 'math'",
        ),
        ({"reward": ("code",), "reward_options": {"code": {"sandbox": "some"}}}, "sandbox is 'some'.*'namespaces' or"),
        ({"reward": ("numeric",), "reward_options": {"numeric": {"tolerance": -1.0}}}, "greater than or equal to 0"),
    ],
)
def test_what_cannot_judge_is_refused_before_sampling(sample, words):
    with pytest.raises(UsageError, match=words):
        load_rewards(Sample(**{"reward": ("format",), **sample}), [CHAT, TEXT])


def test_rows_without_a_reference(mine):
    rows = [Prompt("r:1", "q", [1], {"reference": 1}), Prompt("r:2", "q", [1], {})]
    assert scores_of(load_rewards(mine("needs"), rows), rows, (("a",), ("b",))) == [1.0, 1.0]
    strict = mine("needs").model_copy(update={"on_missing_column": "error"})
    with pytest.raises(UsageError, match=r"r:2: .*needs the column .or option. 'reference', which 1 of 2 rows lack"):
        load_rewards(strict, rows)
    with pytest.raises(UsageError, match=r"needs the column .or option. 'reference', which no row has"):
        load_rewards(mine("needs"), rows[1:])
    rows = [Prompt("r:1", "q", [1], {"answer": "7"}), Prompt("r:2", "q", [1], {})]
    assert scores_of(load_rewards(Sample(reward=("numeric",)), rows), rows, (("7",), ("7",))) == [1.0, None]


def test_a_call_that_hangs_is_stopped_and_the_next_one_is_answered(mine):
    rewards = load_rewards(mine("hangs"), [TEXT])
    start = time.monotonic()
    with pytest.raises(
        RunError, match=r"'mine\.py:hangs'.*no scores in sample\.reward_timeout seconds and was stopped"
    ):
        scores_of(rewards, texts=(("hang", "b"),))
    assert 1 <= time.monotonic() - start < 5
    assert scores_of(rewards) == [1.0, 1.0]
    rewards.on_error = "skip"
    assert scores_of(rewards, texts=(("hang", "b"),)) == [None, None]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dies", r"its process ended \(exit code 7\)"),
        ("leaves", "it raised SystemExit: 1"),
        ("gives", "what it gave cannot be handed over: "),
    ],
)
def test_a_function_that_ends_its_process(mine, name, words):
    rewards = load_rewards(mine(name), [TEXT])
    for _ in range(2):
        with pytest.raises(RunError, match=words):
            scores_of(rewards)


def test_rows_are_shared_out_and_one_that_hangs_scores_nothing(capsys):
    options = {"regex": {"pattern": "(a+)+$", "timeout": 0.2}}
    rewards = load_rewards(Sample(reward=("regex",), reward_options=options, reward_workers=2), [TEXT])
    texts = (("aaa", "a" * 60 + "b", "b", "xa", "b"),)
    start = time.monotonic()
    assert scores_of(rewards, texts=texts) == [1, 0, 0, 1, 0]
    assert time.monotonic() - start < 8
    assert (rewards.late, rewards.failed) == ({"regex": 1}, {})
    assert "reward 'regex', row rows.jsonl:2, completion 2: it took longer" in capsys.readouterr().err


def test_a_pool_keeps_the_order_and_names_the_row():
    pool = Pool(2)
    found = pool.map("math:sqrt", "math:sqrt", (4.0,), [(float(n * n),) for n in range(5)] + [(-1.0,)], 5.0)
    assert found[:5] == [0, 1, 2, 3, 4]
    assert str(found[5]) == "it raised ValueError: math domain error"
    (late,) = pool.map("time:sleep", "math:sqrt", (4.0,), [(60,)], 0.2)
    assert isinstance(late, Hung)
    rows = [Prompt("r:1", "q", [1], {"tests": "assert True"}), Prompt("r:2", "q", [1], {"tests": [1]})]
    rewards = load_rewards(Sample(reward=("code",), reward_options={"code": {"sandbox": "none"}}), rows)
    with pytest.raises(RunError, match=r"reward 'code', row r:2, completion 1: it raised ValueError: tests are"):
        scores_of(rewards, rows, (("x = 1",), ("x = 1",)))


def test_a_worker_does_not_outlive_who_asks():
    """Killed in the middle of a call that keeps the interpreter's lock: the kernel tells the worker."""
    code = f"""
import sys; sys.path[:] = {sys.path!r}
from train.workers import Worker
worker = Worker()
print(worker.call("os:getpid"), flush=True)
worker.call("re:match", "(a+)+$", "a" * 60 + "b")
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as outer:
        assert outer.stdout is not None
        pid = int(outer.stdout.readline())
        time.sleep(0.2)
        os.kill(pid, 0)
        outer.kill()
    end = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_an_interrupted_worker_is_stopped():
    worker = Worker()
    pid = worker.call("os:getpid")
    with pytest.raises(Hung):
        worker.call("time:sleep", 60, seconds=0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert worker.call("os:getpid") != pid
