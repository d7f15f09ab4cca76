"""Tokenised once into shards: the same documents in the same order, whatever stops it, and nothing changed unseen."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as fuzz
from hypothesis import strategies as st

from configs.errors import RunError, UsageError
from data import build as module
from data.build import Job, Settings, build
from data.chat import encode_completion, encode_document
from data.examples import Examples
from data.manifest import fingerprint
from data.sources import open_source
from data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"document {i} é中 " * (i % 5) for i in range(23)]  # each fifth is empty


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


@pytest.fixture
def tokenizer(tokenizer_with):
    return tokenizer_with("chatml")


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


@pytest.mark.parametrize("add_eos", [True, False])
def test_training_sees_the_same_examples(rows, tmp_path, tokenizer, settings, add_eos):
    made = build([rows], tokenizer, "t", tmp_path / "out", Settings(add_eos, shards=4))
    data = settings(add_eos=add_eos)
    raw, built = (Examples(open_source(path), tokenizer, data) for path in (rows, tmp_path / "out"))
    kept = [example for example in (raw[i] for i in range(len(raw))) if example is not None]
    assert len(built) == len(kept) == made["documents"]
    for i, example in enumerate(kept):
        assert np.array_equal(built[i]["tokens"], example["tokens"])
        assert np.array_equal(built[i]["weights"][1:], example["weights"][1:])
    assert (made["empty"], made["rows"], made["malformed"]) == (5, 23, 0)
    assert made["tokens"] == sum(len(example["tokens"]) for example in kept)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *(f"shard-0000{i}-of-00004.array_record" for i in range(4)),
        *("manifest.json", "tokenizer", ".lock"),
    }


def test_order_and_bytes_whatever_the_workers(rows, tmp_path, tokenizer):
    told = []
    for workers in (1, 2):
        build(
            [rows],
            tokenizer,
            "t",
            tmp_path / f"{workers}",
            Settings(shards=3),
            workers,
            advance=lambda *a: told.append(a),
        )
    assert shards(tmp_path / "1") == shards(tmp_path / "2")
    assert sum(count for count, _ in told) == 2 * 23
    one = build([rows], tokenizer, "t", tmp_path / "0", Settings(shards=99))
    assert len(one["shards"]) == 23
    order = [[list(row["tokens"]) for row in open_source(tmp_path / name)] for name in "01"]
    assert order[0] == order[1]


@pytest.mark.parametrize("family", ["chatml", "llama3", "plain"])
def test_a_document_is_a_completion_without_a_prompt(tokenizer_with, family):
    tokenizer = tokenizer_with(None, family)

    @fuzz(max_examples=40, deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"])), st.booleans())
    def check(text, add_eos):
        expected = encode_completion(tokenizer, "", text, add_eos)["tokens"].tolist()
        assert encode_document(tokenizer, text, add_eos) == expected

    check()


def test_an_interrupted_build_goes_on(rows, tmp_path, tokenizer, monkeypatch):
    out, write = tmp_path / "out", Job.write
    build([rows], tokenizer, "t", tmp_path / "whole", Settings(shards=4))

    def fail(self, name, begin, end):
        if name.startswith("shard-00002"):
            (out / f".{name}").write_bytes(b"half")
            raise KeyboardInterrupt
        write(self, name, begin, end)

    monkeypatch.setattr(Job, "write", fail)
    with pytest.raises(KeyboardInterrupt):
        build([rows], tokenizer, "t", out, Settings(shards=4), command="purestep data build x")
    for source in (out, out / "shard-00000-of-00004.array_record"):
        with pytest.raises(UsageError, match="unfinished build: run again: purestep data build x"):
            open_source(source)
    with pytest.raises(UsageError, match="holds an unfinished build with other settings"):
        build([rows], tokenizer, "t", out, Settings(shards=5))
    kept = (out / "shard-00000-of-00004.array_record").stat().st_mtime_ns
    monkeypatch.setattr(Job, "write", write)
    build([rows], tokenizer, "t", out, Settings(shards=4))
    assert (out / "shard-00000-of-00004.array_record").stat().st_mtime_ns == kept
    assert shards(out) == shards(tmp_path / "whole")
    assert not list(out.glob(".shard*"))
    monkeypatch.setattr(Job, "write", lambda *_: pytest.fail("built again"))
    build([rows], tokenizer, "t", out, Settings(shards=4))
    Path(rows).write_text('{"text": "other"}\n')
    with pytest.raises(UsageError, match="holds a build with other settings, sources, rows"):
        build([rows], tokenizer, "t", out, Settings(shards=4))


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path, tokenizer):
    """The command in a process of its own, with worker processes, killed and started again."""
    path, out = tmp_path / "rows.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps({"text": "word 中 " * 400}) + "\n" for _ in range(300)))
    tokenizer.save(tmp_path / "tokenizer")
    command = [sys.executable, "-m", "train.cli", "data", "build", str(path), "--output", str(out)]
    command += ["--tokenizer", str(tmp_path / "tokenizer"), "--workers", "2", "--shards", "6"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not list(out.glob("shard-*.array_record")) and time.monotonic() < until:
        time.sleep(0.005)
    os.killpg(running.pid, signal.SIGKILL)  # its own session: the command and its workers
    running.wait()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "300 documents" in done.stdout
    build([str(path)], tokenizer, "t", tmp_path / "whole", Settings(shards=6))
    assert shards(out) == shards(tmp_path / "whole")


def test_changed_shards_and_other_tokenizers_are_noticed(rows, tmp_path, tokenizer, tokenizer_with, settings):
    out = tmp_path / "out"
    build([rows], tokenizer, "mine", out, Settings(shards=3))
    with pytest.raises(UsageError, match=r"was tokenised with 'mine' \(hash .*Build the data again"):
        Examples(open_source(out), tokenizer_with("gemma"), settings())
    one, other = (out / f"shard-0000{i}-of-00003.array_record" for i in (0, 1))
    whole = one.read_bytes()
    shutil.copyfile(other, one)
    with pytest.raises(UsageError, match=r"shard-00000-of-00003\.array_record has \d+ (bytes|documents), manifest"):
        open_source(out)
    one.write_bytes(whole[:-1])
    with pytest.raises(UsageError, match=r"shard-00000-of-00003\.array_record (has|is not a readable)"):
        open_source(one)
    one.unlink()
    with pytest.raises(UsageError, match=r"shard-00000-of-00003\.array_record is missing, which manifest\.json names"):
        open_source(out)
    (out / "manifest.json").write_text("{")
    with pytest.raises(UsageError, match=r"manifest\.json is not valid JSON"):
        open_source(out)


def test_fingerprints(tokenizer, tokenizer_with, tmp_path):
    tokenizer.save(tmp_path)
    assert fingerprint(load_tokenizer(tmp_path)) == fingerprint(tokenizer)
    assert fingerprint(tokenizer.with_chat_template("{{ messages }}")) == fingerprint(tokenizer)
    assert len({fingerprint(tokenizer_with(None, name)) for name in ("chatml", "llama3", "gemma", "plain")}) == 4


def test_bad_rows(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "a"}\n{"text": \n{"text": 3}\n{"tokens": [5, 99999]}\n{"tokens": [5, 6]}\n'
    )
    (tmp_path / "b.txt").write_bytes(b"x\xff")
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.txt")]
    with pytest.raises(UsageError, match=r"a\.jsonl:2: not valid JSON.*--on-bad-row skip"):
        build(files, tokenizer, "t", tmp_path / "out", Settings(shards=1))
    made = build(files, tokenizer, "t", tmp_path / "skip", Settings(on_bad_row="skip", shards=2))
    assert (made["documents"], made["malformed"]) == (2, 4)
    assert open_source(tmp_path / "skip")[1]["tokens"].tolist() == [5, 6]
    with pytest.raises(UsageError, match="no document is left of 1 rows"):
        build(files[1:], tokenizer, "t", tmp_path / "none", Settings(on_bad_row="skip"))


def test_refusals(rows, tmp_path, tokenizer, tokenizer_with, monkeypatch):
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    with pytest.raises(UsageError, match=r"chat\.jsonl:1: `data build` takes rows of text .* has messages"):
        build([str(tmp_path / "chat.jsonl")], tokenizer, "t", tmp_path / "out", Settings())
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes").write_text("x")
    with pytest.raises(UsageError, match=r"full' is not empty \(notes\)"):
        build([rows], tokenizer, "t", tmp_path / "full", Settings())
    with module._locked(tmp_path / "full"), pytest.raises(RunError, match="another process builds"):
        build([rows], tokenizer, "t", tmp_path / "full", Settings())
    monkeypatch.setattr(tokenizer, "eos_ids", ())
    with pytest.raises(UsageError, match=r"no end-of-sequence token .* --no-add-eos"):
        build([rows], tokenizer, "t", tmp_path / "out", Settings())


def test_random_documents_come_back(tmp_path, tokenizer, settings):
    number = iter(range(1000))

    @fuzz(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=9),
        st.integers(1, 5),
    )
    def check(texts, count):
        folder = tmp_path / str(next(number))
        folder.mkdir()
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ["x", *texts]))
        build([str(folder / "a.jsonl")], tokenizer, "t", folder / "out", Settings(shards=count))
        found = [row["tokens"].tolist() for row in open_source(folder / "out")]
        assert found == [encode_document(tokenizer, text) for text in ["x", *texts] if text]

    check()
