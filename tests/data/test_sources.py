"""Rows of files: random access, places for messages, kinds of rows."""

import json
import pickle

import pytest

from configs.errors import UsageError
from data.formats import normalise
from data.sources import open_source


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_jsonl_by_number(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "é中"}, "", {"text": "b"}, "  ", {"text": "c\u2028d"})
    records = open_source(path)
    assert len(records) == 3
    assert [records[index]["text"] for index in (2, 0, 1)] == ["c\u2028d", "é中", "b"]
    assert records.where(1) == f"{path}:3"
    assert pickle.loads(pickle.dumps(records))[2]["text"] == "c\u2028d"
    with pytest.raises(IndexError):
        records[3]


def test_files_folders_globs(tmp_path):
    write(tmp_path / "d/b.jsonl", {"text": "2"}, {"text": "3"})
    write(tmp_path / "d/sub/c.json", '[{"text": "4"}]')
    write(tmp_path / "a.json", {"text": "1"})  # JSON lines in disguise
    write(tmp_path / "d/notes.md", "no data")
    records = open_source([str(tmp_path / "a.json"), str(tmp_path / "d")])
    assert [row["text"] for row in records] == ["1", "2", "3", "4"]
    assert records.where(3).endswith("c.json: item 1")
    assert len(open_source(str(tmp_path / "d/*.jsonl"))) == 2


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"messages": [{"role": "user", "content": "a"}]}, {"messages": [{"role": "assistant", "content": None}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    records = open_source(tmp_path / "p.parquet")
    assert records[0] == rows[0]
    assert records[1] == {"messages": [{"role": "assistant"}]}
    assert records.where(1).endswith("p.parquet: row 2")


@pytest.mark.parametrize("line", ['{"text": ', "[1]", '"text"', "{'text': 1}"])
def test_malformed_rows_name_file_and_line(tmp_path, line):
    records = open_source(write(tmp_path / "a.jsonl", {"text": "x"}, line))
    with pytest.raises(ValueError, match=r"a\.jsonl:2: (not valid JSON|a row must be)"):
        records[1]


def test_wrong_utf8(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\n{"text": "\xff"}\n')
    records = open_source(tmp_path / "a.jsonl")
    assert records[0] == {"text": "x"}
    with pytest.raises(ValueError, match=r"a\.jsonl:2: not valid UTF-8"):
        records[1]


def test_wrong_paths(tmp_path):
    write(tmp_path / "train.jsonl", {"text": "x"})
    for given, message in [
        ("trian.jsonl", "did you mean '.*train.jsonl'"),
        ("zzz/train.jsonl", "there is no folder '.*zzz'"),
        ("*.parquet", "no file matches"),
        ("qqqqqq", "holds train.jsonl"),
    ]:
        with pytest.raises(UsageError, match=message):
            open_source(str(tmp_path / given))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"holds no \.jsonl"):
        open_source(tmp_path / "empty")
    with pytest.raises(UsageError, match=r"ending '\.csv', allowed"):
        open_source(write(tmp_path / "a.csv", "x"))
    with pytest.raises(UsageError, match="no rows"):
        open_source(write(tmp_path / "none.jsonl", ""))
    with pytest.raises(UsageError, match="must hold a list"):
        open_source(write(tmp_path / "s.json", "3"))
    with pytest.raises(UsageError, match="not a readable Parquet file"):
        open_source(write(tmp_path / "a.parquet", "PAR1"))


def test_the_first_row_is_checked_at_once(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question": "x", "answer": "y"})
    with pytest.raises(UsageError, match=r"a\.jsonl:1: row with the keys question, answer is of no known kind"):
        open_source(path)
    with pytest.raises(UsageError, match=r"data\.format is messages, but the row has no 'messages'"):
        open_source(write(tmp_path / "b.jsonl", {"text": "x"}), "messages")


def test_alpaca():
    row = {"instruction": "Add", "input": "1 2", "output": "3", "system": "S", "history": [["a", "b"]]}
    assert [(m["role"], m["content"]) for m in normalise(row)["messages"]] == [
        ("system", "S"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "Add\n1 2"),
        ("assistant", "3"),
    ]
    assert normalise({"instruction": "Add", "input": "", "output": "3"})["messages"][0]["content"] == "Add"


def test_sharegpt():
    call = {"name": "add", "arguments": {"a": 1}}
    turns = [("human", "q"), ("function_call", json.dumps(call)), ("observation", "2"), ("gpt", "two")]
    row = {
        "conversations": [{"from": who, "value": text} for who, text in turns],
        "system": "S",
        "tools": json.dumps([{"name": "add"}]),
    }
    form = normalise(row)
    assert [message["role"] for message in form["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    assert form["messages"][2]["tool_calls"] == [{"type": "function", "function": call}]
    assert form["tools"] == [{"type": "function", "function": {"name": "add"}}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "x"}, "'messages' must be a list"),
        ({"text": 1}, "'text' must be a string"),
        ({"prompt": 1, "completion": "x"}, "must be strings or lists"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "from 'alien', allowed: human"),
        ({"conversations": [{"role": "user"}]}, "needs the keys 'from' and 'value'"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "function_call, but not JSON"),
        ({"messages": [], "tools": "{"}, "'tools' is a string but not valid JSON"),
        ({"instruction": "a", "output": "b", "history": ["x"]}, "'history' must be"),
        ({"chosen": [], "rejected_": []}, "no known kind"),
        ({"chosen": [], "rejected": 1}, "'rejected' must be a string or a list"),
    ],
)
def test_malformed_kinds(row, message):
    with pytest.raises(ValueError, match=message):
        normalise(row)


def test_prompt_and_completion_may_be_mixed():
    form = normalise({"prompt": "q", "completion": [{"role": "assistant", "content": "a"}]})
    assert form["prompt"] == [{"role": "user", "content": "q"}]
    assert normalise({"prompt": "q", "completion": "a"}) == {"prompt": "q", "completion": "a"}
