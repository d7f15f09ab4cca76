"""JSON lines in and out."""

import json

import pytest

from configs.errors import RunError, UsageError
from decode.jsonl import GENERATE_KEYS, SCORE_KEYS, read_rows, token_rows, write_rows


def write(path, *lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def test_rows_and_their_places(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"prompt": "a\u2028b", "id": 7}', "", '{"tokens": [1]}')
    assert read_rows(path, GENERATE_KEYS) == [(f"{path}:1", "prompt", "a\u2028b"), (f"{path}:3", "tokens", [1])]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ("not valid JSON",)),
        ("[1]", ("not an object",)),
        ('{"text": "a"}', ("text", "prompt, messages, tokens")),
        ('{"prompt": "a", "tokens": [1]}', ("exactly one",)),
        ('{"prompt": 3}', ("'prompt' must be text, not int",)),
        ('{"prompt": ""}', ("'prompt' is empty",)),
        ('{"tokens": [1, "a"]}', ("'tokens' must be a list of token ids",)),
        ('{"tokens": [true]}', ("'tokens' must be a list of token ids",)),
        ('{"tokens": [300]}', ("token id 300",)),
        ('{"tokens": []}', ("'tokens' is empty",)),
        ('{"messages": []}', ("'messages' must be",)),
        ('{"messages": [{"content": "a"}]}', ("'messages' must be",)),
        ('{"messages": [{"role": "user", "content": "%s"}]}' % ("a" * 200), ("context",)),
    ],
)
def test_a_bad_row_names_file_and_line(tiny, tmp_path, line, words):
    path = write(tmp_path / "a.jsonl", '{"prompt": "fine"}', line)
    with pytest.raises(UsageError) as error:
        token_rows(read_rows(path, GENERATE_KEYS), tiny.tokenizer, tiny.arch.vocab_size, tiny.arch.max_position, 8)
    assert str(error.value).startswith(f"{path}:2: ")
    assert all(word in str(error.value) for word in words), error.value


def test_empty_missing_and_undecodable_files_are_refused(tmp_path):
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    for path in (write(tmp_path / "a.jsonl", ""), str(tmp_path / "none.jsonl"), str(tmp_path / "b.jsonl")):
        with pytest.raises(UsageError, match=path):
            read_rows(path, SCORE_KEYS)


def test_nothing_is_half_written(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("old")

    def rows():
        yield {"text": "你好"}
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="No space"):
        write_rows(str(path), rows())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_rows(str(path), [{"text": "你好"}])
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [{"text": "你好"}]
