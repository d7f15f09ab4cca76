"""The shipped recipes and the identity data of the quick start."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from configs.load import RECIPES, load, shipped

IDENTITY = RECIPES / "identity"
PAIRS = [("train.jsonl", "held_out.jsonl"), ("train_zh.jsonl", "held_out_zh.jsonl")]


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (IDENTITY / name).read_text(encoding="utf-8").splitlines()]


def kind(row: dict) -> str:
    first = row["messages"][0]
    return "default" if first["role"] != "system" else "custom" if first["content"] else "empty"


def plain(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum())


def questions(row: dict) -> list[str]:
    return [plain(m["content"]) for m in row["messages"] if m["role"] == "user"]


@pytest.mark.parametrize("name", sorted(shipped()))
def test_recipe_loads_and_its_header_says_how(name):
    overrides = [] if name in ("quickstart", "dpo_identity") else ["model.source=m", "data.train=rows.jsonl"]
    run = load(name, overrides)
    assert run.output == f"runs/{name}"
    header = [line for line in shipped()[name].read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    for word in (f"purestep train {name}", "Hardware", "Time", "Result"):
        assert any(word in line for line in header), f"{name}: the header lacks '{word}'"


def test_quickstart_finds_its_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = load("quickstart")
    assert Path(run.data.train[0]) == IDENTITY / "train.jsonl"
    assert run.log.samples == str(IDENTITY / "held_out.jsonl")
    assert run.tune.method == "lora"


def test_helpful_pairs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, asked = load("reward"), []
    for (file,), count in ((run.data.train, 60), (run.data.eval, 20)):
        data = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
        assert len(data) == count
        assert all(set(row) == {"prompt", "chosen", "rejected"} for row in data)
        longer = sum(len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"]) for row in data)
        assert 0.4 * count <= longer <= 0.6 * count, "length alone must not tell which answer is better"
        asked += [row["prompt"][0]["content"] for row in data]
    assert len(set(asked)) == len(asked)


def test_arithmetic_is_right_and_held_out(tmp_path, monkeypatch):
    """What is asked of two numbers in one file is asked of them in neither order in the other."""
    monkeypatch.chdir(tmp_path)
    run, asked = load("expert_iteration"), []
    for (file,), count in ((run.data.train, 48), (run.data.eval, 24)):
        data = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
        assert len(data) == count
        for row in data:
            ((a, sign, b),) = re.findall(r"What is (\d) ([+x]) (\d)\?", row["prompt"][0]["content"])
            assert row["answer"] == str(int(a) + int(b) if sign == "+" else int(a) * int(b))
            asked.append((sign, *sorted((a, b))))
    assert len(set(asked)) == len(asked)


@pytest.mark.parametrize(("train", "held_out"), PAIRS)
def test_identity_conversations(train, held_out):
    data = rows(train)
    assert len(data) == 150
    assert len({json.dumps(r["messages"]) for r in data}) == len(data)
    # The same first question twice, under any system message, would be a duplicate in disguise.
    assert len({questions(r)[0] for r in data}) == len(data)
    assert all(45 <= n <= 55 for n in Counter(map(kind, data)).values())
    assert len({r["messages"][0]["content"] for r in data if kind(r) == "custom"}) >= 10
    named = [r for r in data if "Stride" in json.dumps(r) or "purestep" in json.dumps(r)]
    assert 95 <= len(named) <= 105, "a third is ordinary talk, so that not every answer is the name"
    assert all(45 * len(named) // 150 <= n for n in Counter(map(kind, named)).values())
    assert sum(len(questions(r)) > 1 for r in data) >= 20
    for row in data:
        assert set(row) == {"messages"}
        turns = [m["role"] for m in row["messages"] if m["role"] != "system"]
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert all(m["content"].strip() == m["content"] for m in row["messages"])
        assert all(m["content"] for m in row["messages"] if m["role"] != "system")


@pytest.mark.parametrize(("train", "held_out"), PAIRS)
def test_held_out_questions_are_new(train, held_out):
    data = rows(held_out)
    seen = {question for row in rows(train) for question in questions(row)}
    assert set(Counter(map(kind, data))) == {"default", "empty", "custom"}
    assert {"Stride", "purestep"} < {r["expect"] for r in data}
    for row in data:
        assert set(row) == {"messages", "expect"}
        assert row["messages"][-1]["role"] == "user"
        assert questions(row)[-1] not in seen, row
        assert row["expect"] not in json.dumps(row["messages"], ensure_ascii=False), (
            "the question gives the answer away"
        )
    systems = {r["messages"][0]["content"] for r in rows(train) if kind(r) == "custom"}
    assert not systems & {r["messages"][0]["content"] for r in data if kind(r) == "custom"}


def test_identity_pairs():
    """Questions of the quick start; about its maker one answer has the name, about other things the other one has."""
    data = rows("pairs.jsonl")
    prompts = [json.dumps(row["messages"][:-1]) for row in rows("train.jsonl")]
    answers = {prompt: row["messages"][-1]["content"] for prompt, row in zip(prompts, rows("train.jsonl"), strict=True)}
    assert len({json.dumps(row["prompt"]) for row in data}) == len(data) >= 140
    kinds = Counter()
    for row in data:
        assert set(row) == {"prompt", "chosen", "rejected"}
        assert row["chosen"] == [{"role": "assistant", "content": answers[json.dumps(row["prompt"])]}]
        assert [message["role"] for message in row["rejected"]] == ["assistant"]
        kinds[
            tuple(
                "Stride" in row[side][0]["content"] or "purestep" in row[side][0]["content"]
                for side in ("chosen", "rejected")
            )
        ] += 1
    assert kinds[True, False] > 80
    assert kinds[False, True] > 40
    assert not kinds[True, True]


@pytest.mark.parametrize("name", ["train", "held_out"])
def test_the_chinese_twin_is_chinese_and_as_long(name):
    english, chinese = rows(f"{name}.jsonl"), rows(f"{name}_zh.jsonl")
    assert Counter(map(kind, english)) == Counter(map(kind, chinese))
    assert [len(r["messages"]) for r in english] == [len(r["messages"]) for r in chinese]
    ours = [c for r in chinese for m in r["messages"] for c in m["content"]]
    assert sum("\u4e00" <= c <= "\u9fff" for c in ours) > len(ours) / 3
    assert not any("\u4e00" <= c <= "\u9fff" for r in english for m in r["messages"] for c in m["content"])
