"""Tokenizers made from text: what goes in comes back, twice the same, and as transformers reads them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as fuzz
from hypothesis import strategies as st

from configs.errors import UsageError
from data.chat import encode_chat, end_of_turn
from data.sources import open_source
from data.tokenizer import load_tokenizer
from data.train_tokenizer import CHATML, FIM, KINDS, Training, texts_of, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SPECIAL = ("<|im_start|>", "<|im_end|>", *FIM)
ENGLISH = "The quick brown fox, aged 2,048 days, doesn't jump over naïve dogs. “Really?” she said.\n"
CHINESE = "你好，世界！我是一个助手，能够帮助你写代码。今天天气很好，我们去公园散步吧。\n"
CODE = (ROOT / "data" / "pack.py").read_text(encoding="utf-8")
TEXTS = {"english": ENGLISH, "chinese": CHINESE, "code": CODE, "odd": "  a \t\tb\r\n\n\u00a0🙂 e\u0301 \u2028 x\ty  "}


def write(folder: Path) -> str:
    rows = [ENGLISH, CHINESE, CODE, CODE.upper(), (ROOT / "data" / "chat.py").read_text(encoding="utf-8")] * 2
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{kind: folder of a tokenizer}."""
    folder = tmp_path_factory.mktemp("tokenizers")
    rows = write(folder)
    for kind in KINDS:
        train_tokenizer([rows], folder / kind, Training(kind, 700, SPECIAL, CHATML))
    return {kind: folder / kind for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_back_and_transformers_agrees(made, kind):
    from transformers import AutoTokenizer

    ours = load_tokenizer(made[kind])
    theirs = AutoTokenizer.from_pretrained(made[kind], local_files_only=True)
    assert ours.vocab_size == len(theirs) == 700
    for text in [*TEXTS.values(), f"a<|im_start|>user\nb <|fim_middle|> {ours.named['eos_token']} c"]:
        ids = ours.encode(text, special=True)
        assert ids == theirs(text)["input_ids"] == ours.encode_with_offsets(text)[0]
        assert ours.decode(ids) == text == theirs.decode(ids)
    assert len(ours.encode(CODE)) < len(CODE.encode()) / 2
    assert (ours.eos_ids, ours.bos_id, ours.pad_id) == (
        (theirs.eos_token_id,),
        theirs.bos_token_id,
        theirs.pad_token_id,
    )
    assert None not in (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id)
    for token in SPECIAL:
        assert ours.encode(token) == [ours.special_tokens[token]] == [theirs.convert_tokens_to_ids(token)]
        assert ours.decode(ours.encode(token), skip_special=True) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_comes_back(made, kind):
    ours = load_tokenizer(made[kind])

    # sentencepiece writes a space as U+2581, so that this one character comes back as a space
    @fuzz(max_examples=40, deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581\0")))
    def check(text):
        assert ours.decode(ours.encode(text)) == text

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_the_chat_template_works(made, kind):
    ours = load_tokenizer(made[kind])
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "你好"}]
    assert ours.render(messages[:1], add_generation_prompt=True) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert end_of_turn(ours) == "<|im_end|>"
    example = encode_chat(ours, messages, ("assistant",))
    trained = [int(t) for t, w in zip(example["tokens"], example["weights"], strict=True) if w]
    assert ours.decode(trained).startswith("你好<|im_end|>")


@pytest.mark.parametrize("digits", [True, False])
def test_digits(made, tmp_path, digits):
    rows = tmp_path / "n.txt"
    rows.write_text("the year 1999 and 1999 and 1999, 123456 apples " * 50)
    ours, _ = train_tokenizer([str(rows)], tmp_path / "t", Training("byte_bpe", 265, digits=digits))
    assert (len(ours.encode("199")) == 3) == digits


def test_equal_text_makes_equal_files_in_another_process(made, tmp_path):
    rows = write(tmp_path)
    for kind in ("byte_bpe", "bpe"):  # unigram takes its time
        out = tmp_path / kind
        command = [sys.executable, "-m", "train.cli", "tokenizer", "train", rows, "--output", str(out), "--kind", kind]
        command += ["--vocab-size", "700", "--chat-template", "chatml", "--fim"]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
        assert done.returncode == 0, done.stderr
        names = sorted(path.name for path in out.iterdir())
        assert names == sorted(path.name for path in made[kind].iterdir())
        assert [(out / name).read_bytes() for name in names] == [(made[kind] / name).read_bytes() for name in names]
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_is_there_is_reused_or_refused(tmp_path):
    rows, training = write(tmp_path), Training("byte_bpe", 300)
    out = tmp_path / "out"
    out.mkdir()
    assert train_tokenizer([rows], out, training)[1] is False
    before = (out / "tokenizer.json").stat().st_mtime_ns
    assert train_tokenizer([rows], out, training)[1] is True
    assert (out / "tokenizer.json").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match=r"made otherwise \(different: vocab_size\)"):
        train_tokenizer([rows], out, Training("byte_bpe", 301))
    with pytest.raises(UsageError, match="different: bytes, sha256"):
        train_tokenizer([rows, rows], out, training)
    (out / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match=r"different: tokenizer\.json"):
        train_tokenizer([rows], out, training)
    (out / "training.json").unlink()
    with pytest.raises(UsageError, match="is not empty and no tokenizer"):
        train_tokenizer([rows], out, training)


def test_vocabularies_that_do_not_fit(tmp_path):
    rows = tmp_path / "a.txt"
    rows.write_text("only a few words, only a few\n" * 3)
    for kind in KINDS:
        with pytest.raises(UsageError, match="is too small: 256 bytes and"):
            Training(kind, 259)
        with pytest.raises(UsageError, match=r"too large for this text, which gives|does not fit this text: Vocab"):
            train_tokenizer([str(rows)], tmp_path / kind, Training(kind, 9000))
        assert not (tmp_path / kind).exists()
    many = tmp_path / "many.txt"
    many.write_text("".join(map(chr, range(0x4E00, 0x4F00))))
    with pytest.raises(UsageError, match="does not fit this text: Vocabulary size is smaller than required_chars"):
        train_tokenizer([str(many)], tmp_path / "out", Training("bpe", 300))
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".txt"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "wordpiece"}, "allowed are byte_bpe, bpe, unigram"),
        ({"special_tokens": ("<x>", "<x>")}, "'<x>' is empty or there twice"),
        ({"special_tokens": ("<|pad|>",)}, "'<|pad|>' is empty or there twice"),
        ({"special_tokens": (" ",)}, "' ' is empty or there twice"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UsageError) as error:
        Training(**{"kind": "byte_bpe", "vocab_size": 500, **options})
    assert message in str(error.value)


def test_texts_of_rows(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"prompt": "c", "completion": "d", "body": "e"},
        {"text": ""},
        {"text": "fé"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = open_source(path, None)
    assert list(texts_of(records, Training("bpe", 300))) == ["a", "b", "c", "d", "fé"]
    assert list(texts_of(records, Training("bpe", 300, limit_bytes=6))) == ["a", "b", "c", "d", "f"]
    with pytest.raises(UsageError, match=r"a\.jsonl:1: the row has no text in --column 'body'"):
        list(texts_of(records, Training("bpe", 300, column="body")))
    path.write_text('{"tokens": [1]}\n')
    with pytest.raises(UsageError, match="the row holds token ids, not text"):
        list(texts_of(open_source(path, None), Training("bpe", 300)))
    (tmp_path / "b.txt").write_bytes(b"a\xff")
    with pytest.raises(UsageError, match=r"b\.txt: not text in UTF-8"):
        train_tokenizer([str(tmp_path / "b.txt")], tmp_path / "out", Training("bpe", 300))
    (tmp_path / "b.txt").write_bytes(b"")
    with pytest.raises(UsageError, match=r"no text in .*b\.txt"):
        train_tokenizer([str(tmp_path / "b.txt")], tmp_path / "out", Training("bpe", 300))
