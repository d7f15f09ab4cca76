"""`purestep tokenizer train` and `purestep data build` from the outside; what a resumed run notices."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from configs.errors import UsageError
from configs.schema import Data
from data.examples import Examples
from data.loader import Loader
from data.sources import open_source
from data.tokenizer import load_tokenizer
from train import cli
from train.marks import data_marks, differences


@pytest.fixture
def purestep(monkeypatch, capsys, tmp_path):
    """purestep(arguments...) -> exit code, standard output, standard error."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["purestep", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def texts(tmp_path):
    folder, code = tmp_path / "texts", Path(cli.__file__).read_text(encoding="utf-8")
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.py").write_text(f"# {i} 你好\n{code[i * 500 : i * 500 + 500]}")
    return folder


def test_from_text_to_shards(purestep, texts, tmp_path):
    make = "tokenizer", "train", texts, "--output", "tok", "--vocab-size", 300, "--chat-template", "chatml", "--fim"
    assert purestep(*make)[:2] == (0, "tok: byte_bpe, 300 tokens\n")
    assert purestep(*make)[:2] == (0, "tok: byte_bpe, 300 tokens, made before from the same\n")
    assert {"<|im_end|>", "<|fim_suffix|>"} < load_tokenizer("tok").special_tokens.keys()
    code, out, _ = purestep("data", "build", texts, "--tokenizer", "tok", "--output", "shards", "--shards", 2)
    assert code == 0
    assert "shards: 6 documents, " in out
    assert json.loads((tmp_path / "shards/manifest.json").read_text())["tokenizer"]["name"] == "tok"
    assert len(open_source("shards")) == 6
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("objective: {type: sft}\nmodel: {source: tok}\ndata: {train: nothing}\noutput: out\n")
    code, out, said = purestep(
        "data", "build", recipe, f"data.train={texts}", "data.add_eos=false", "--output", "other"
    )
    assert (code, said) == (0, "")
    assert json.loads((tmp_path / "other/manifest.json").read_text())["settings"]["add_eos"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("data", "build", "texts", "--output", "o"), "--tokenizer is missing"),
        (("data", "build", "texts", "--output", "o", "--tokenizer", "nope"), "MODEL 'nope' does not exist"),
        (("data", "build", "texts", "--output", "o", "--on-bad-row", "x"), "allowed are error, skip"),
        (("tokenizer", "train", "nope", "--output", "o", "--vocab-size", 300), "data file 'nope' does not exist"),
        (("tokenizer", "train", "texts", "--output", "o", "--vocab-size", 3), "--vocab-size 3 is too small"),
        (("tokenizer", "train", "texts", "--output", "o", "--vocab-size", 300, "--chat-template", "x"), "nor a file"),
    ],
)
def test_bad_usage(purestep, texts, arguments, message):
    code, _, said = purestep(*arguments)
    assert code == 2
    assert message in said


def test_a_change_of_any_file_is_noticed(purestep, texts, tmp_path):
    purestep("tokenizer", "train", texts, "--output", "tok", "--vocab-size", 300)
    tokenizer, data = load_tokenizer("tok"), Data(train=("-",), prefetch=0)
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "one text"}\n'))

    def marks():
        return data_marks(Loader(Examples(open_source([texts, packed]), tokenizer, data), data, 1))

    before = marks()
    assert marks() == before
    (texts / "5.py").write_text((texts / "5.py").read_text().replace("你", "我"))
    (line,) = [line for line in differences(before, marks()) if "first" not in line]
    assert line.startswith("0 texts: 6 files, crc ")
    before = marks()
    packed.write_bytes(gzip.compress(b'{"text": "two text"}\n'))
    assert any(line.startswith("1 rows.jsonl.gz: ") for line in differences(before, marks()))


def test_shards_of_another_tokenizer(purestep, texts):
    for name, size in (("one", 300), ("two", 310)):
        purestep("tokenizer", "train", texts, "--output", name, "--vocab-size", size)
    purestep("data", "build", texts, "--tokenizer", "one", "--output", "shards")
    data = Data(train=("-",))
    assert Examples(open_source("shards"), load_tokenizer("one"), data)[0] is not None
    with pytest.raises(UsageError, match="was tokenised with 'one'"):
        Examples(open_source("shards"), load_tokenizer("two"), data)
