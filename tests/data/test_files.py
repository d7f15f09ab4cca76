"""Files of every kind that sources may be: what they give, and what broken ones are told."""

import gzip
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.cache import cache_folder
from configs.errors import RunError, UsageError
from data import corpora, files
from data.array_record import decode_record, encode_tokens, import_array_record
from data.examples import Examples
from data.sources import open_source

ROWS = [{"text": f"row {i} é中\n\u2028"} for i in range(7)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def lines(rows=ROWS) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zst(raw: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(raw)


def write_parquet(path, rows, group=2):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return path


def write_records(path, records):
    writer = import_array_record().ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path


def write_arrow(path, rows, kind="stream"):
    import pyarrow

    table = pyarrow.Table.from_pylist(rows)
    with getattr(pyarrow.ipc, f"new_{kind}")(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return path


WRITERS = {
    "a.jsonl": lambda path: path.write_bytes(lines()),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines(), mtime=0)),
    "a.ndjson.zst": lambda path: path.write_bytes(zst(lines(ROWS[:3])) + zst(lines(ROWS[3:]))),  # two frames
    "a.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "a.parquet": lambda path: write_parquet(path, ROWS),
    "a.arrow": lambda path: write_arrow(path, ROWS),
    "b.arrow": lambda path: write_arrow(path, ROWS, "file"),
    "a.array_record": lambda path: write_records(path, [json.dumps(row).encode() for row in ROWS]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_all_kinds_give_the_same_rows_in_any_order_thread_and_process(tmp_path, name):
    WRITERS[name](tmp_path / name)
    records = open_source(tmp_path / name)
    assert len(records) == 7
    assert [records[i] for i in (6, 0, 3, 1, 2, 5, 4)] == [ROWS[i] for i in (6, 0, 3, 1, 2, 5, 4)]
    assert records.where(4).startswith(str(tmp_path / name))
    assert records.files[0].marked == (tmp_path / name,)
    other = pickle.loads(pickle.dumps(records))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(other.__getitem__, [i % 7 for i in range(70)])) == ROWS * 10


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", lines(), "not a readable .gz archive"),
        ("a.jsonl.gz", gzip.compress(lines() * 99, mtime=0)[:-20], "not a readable .gz archive.*cut off"),
        ("a.jsonl.gz", gzip.compress(lines(), mtime=0)[:-5] + b"\0\0\0\0\0", "not a readable .gz archive"),
        ("a.txt.zst", b"hello hello", "not a readable .zst archive"),
        ("a.txt.zst", zst(lines() * 99)[:-20], "not a readable .zst archive.*ends within a frame"),
        ("a.parquet", b"PAR1" * 9, "not a readable Parquet file"),
        ("a.arrow", b"ARROW1" * 9, "not a readable Arrow file"),
        ("a.arrow", b"\1\2\3\4" * 9, "not a readable Arrow file"),
        ("a.array_record", b"hello" * 99, "not a readable ArrayRecord file"),
        ("a.array_record", b"", "not a readable ArrayRecord file"),
        ("a.json", b'[{"text": "\xff"}]', "not valid UTF-8"),
        ("a.csv.gz", gzip.compress(b"x", mtime=0), "ending '.gz', allowed: .jsonl"),
        ("a.jsonl.gz", gzip.compress(b"\n", mtime=0), "no rows in .*a.jsonl.gz"),
        ("a.json.gz", gzip.compress(b"3", mtime=0), r"a\.json\.gz: a .json data file must hold a list"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as error:
        open_source(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert not list(cache_folder().rglob("tmp*"))


def test_a_row_in_an_archive_is_named_by_the_archive(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n{"text"\n', mtime=0))
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz:2: not valid JSON"):
        open_source(tmp_path / "a.jsonl.gz")[1]


def test_archives_are_unpacked_once_and_again_when_they_change(tmp_path, capsys):
    path = tmp_path / "a.jsonl.gz"
    for rows, said in ((ROWS, True), (ROWS, False), (ROWS[:2], True)):
        if said:
            path.write_bytes(gzip.compress(lines(rows), mtime=0))
        assert len(open_source(path)) == len(rows)
        assert ("unpacking" in capsys.readouterr().err) == said
    (tmp_path / "cache").rename(tmp_path / "old")
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(RunError, match=r"a\.jsonl\.gz cannot be unpacked to"):
        open_source(path)


def test_a_parquet_file_is_held_by_the_group(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "GROUPS_BYTES", 1)
    monkeypatch.setattr(files, "GROUPS", files.Groups())
    records = open_source(write_parquet(tmp_path / "a.parquet", ROWS))
    assert [row["text"] for row in records] == [row["text"] for row in ROWS]
    assert [key[2] for key in files.GROUPS._tables] == [3]


def test_a_damaged_row_group_stops_the_run(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"text": str(i) * 50} for i in range(8)])
    raw = bytearray(path.read_bytes())
    raw[4:120] = b"\xff" * 116
    path.write_bytes(raw)
    records = open_source(path, None)
    with pytest.raises(UsageError, match="not a readable Parquet file: row group 0"):
        records[0]
    assert records[7]["text"] == "7" * 50


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), max_size=50), st.sampled_from([2**16, 2**32]))
def test_token_records_come_back(ids, below):
    ids = [index % below for index in ids]
    record = encode_tokens(ids)
    assert decode_record(record)["tokens"].astype(np.uint32).tolist() == ids
    assert len(record) == 5 + len(ids) * (4 if max(ids, default=0) >= 2**16 else 2)


def test_wrong_records(tmp_path, tokenizer_with, settings):
    with pytest.raises(ValueError, match="between 0 and"):
        encode_tokens([-1])
    good = encode_tokens([5, 6, 7])
    path = write_records(tmp_path / "a.array_record", [good, good[:-1], b"no json", b"[1]", encode_tokens([5, 99999])])
    records = open_source(path)
    for index, message in ((1, "not whole token ids"), (2, "not valid JSON"), (3, "must be a JSON object")):
        with pytest.raises(ValueError, match=rf"row {index + 1}: .*{message}"):
            records[index]
    examples = Examples(records, tokenizer_with("chatml"), settings(on_bad_row="skip"))
    assert [example is not None for example in (examples[i] for i in range(5))] == [True, False, False, False, False]
    assert examples[0]["tokens"].tolist() == [5, 6, 7]
    assert examples[0]["weights"].tolist() == [1, 1, 1]
    with pytest.raises(UsageError, match="token id 99999 is outside"):
        Examples(records, tokenizer_with("chatml"), settings())[4]
    raw = bytearray(path.read_bytes())
    at = raw.index(good)
    raw[at : at + 8] = b"\xff" * 8
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"row 1: the record cannot be read"):
        open_source(path)[0]


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int64", "float32", "bool"])
def test_numpy_ids_are_checked_as_lists_are(tokenizer_with, settings, dtype):
    examples = Examples([{"tokens": np.asarray([1, 2, 3]).astype(dtype)}], tokenizer_with("chatml"), settings())
    if dtype in ("float32", "bool"):
        with pytest.raises(UsageError, match="must be one row of integers"):
            examples[0]
    else:
        assert examples[0]["tokens"].tolist() == [1, 2, 3]
        assert examples[0]["tokens"].dtype == np.int32


def test_texts(tmp_path, tokenizer_with, settings):
    contents = {
        "b/code.py": "x = '中'\r\n",
        "a.md": "\ufeff# head",
        "empty.txt": "",
        "z.txt": b"ab\xff",
        "no.bin": b"\0",
        ".git/c.txt": "x",
    }
    for name, content in contents.items():
        path = tmp_path / "d" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    records = open_source(tmp_path / "d")
    assert [records[i]["text"] for i in range(3)] == ["# head", "x = '中'\r\n", ""]
    assert len(records) == 4
    assert len(records.files) == 1
    assert records.where(1) == str(tmp_path / "d/b/code.py")
    with pytest.raises(ValueError, match=r"z\.txt: not text in UTF-8: .*\(byte 2\)"):
        records[3]
    examples = Examples(records, tokenizer_with("chatml"), settings(on_bad_row="skip"))
    assert [examples[i] is None for i in range(4)] == [False, False, True, True]
    assert examples.dropped() == {"too_short": 1, "bad_row": 1}
    with pytest.raises(UsageError, match=r"z\.txt.*on_bad_row=skip"):
        Examples(records, tokenizer_with("chatml"), settings())[3]
    assert len(open_source(str(tmp_path / "d/**/*.py"))) == 1
    (tmp_path / "d/rows.jsonl").write_bytes(lines())
    assert len(open_source(tmp_path / "d")) == 7  # the texts describe the data
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(b"packed", mtime=0))
    (both,) = open_source(tmp_path / "t.txt.gz")
    assert both == {"text": "packed"}


def test_datasets_saved_to_disk(tmp_path):
    for split in ("train", "test"):
        folder = tmp_path / "set" / split
        folder.mkdir(parents=True)
        write_arrow(folder / "data-1.arrow", ROWS[4:])
        write_arrow(folder / "data-0.arrow", ROWS[:4])
        write_arrow(folder / "cache-1.arrow", ROWS)
        state = {"_data_files": [{"filename": "data-0.arrow"}, {"filename": "data-1.arrow"}]}
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "dataset_info.json").write_text("{}")
    assert list(open_source(tmp_path / "set/train")) == ROWS
    (tmp_path / "set/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UsageError, match=r"several splits, choose one: .*set/test, .*set/train"):
        open_source(tmp_path / "set")
    (tmp_path / "set/train/state.json").unlink()  # the layout of the library's cache
    assert len(open_source(tmp_path / "set/train")) == 7
    (tmp_path / "set/test/data-0.arrow").unlink()
    with pytest.raises(UsageError, match=r"data-0\.arrow, which state\.json names, does not exist"):
        open_source(tmp_path / "set/test")
    (tmp_path / "set/test/state.json").write_text("{}")
    with pytest.raises(UsageError, match="is not what save_to_disk"):
        open_source(tmp_path / "set/test")


def test_the_standard_library_is_a_corpus(tmp_path, monkeypatch):
    for name in ("b/x.py", "a.py", "site-packages/p.py", "lib2to3/q.py", *(f"m{i}.py" for i in range(200))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "latin.py").write_bytes(b"\xe9")
    monkeypatch.setattr(corpora.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    whole, train, held = ([row["text"] for row in open_source(f"python_stdlib{part}")] for part in PARTS)
    assert len(whole) == 202
    assert whole[:2] == ["a.py", "b/x.py"]
    assert sorted(train + held) == whole
    assert 2 <= len(held) <= 20
    with pytest.raises(UsageError, match=r"allowed are python_stdlib, python_stdlib\?part=train"):
        open_source("python_stdlib?part=test")


PARTS = ("", "?part=train", "?part=eval")


def test_data_sets_of_the_hub(tmp_path, monkeypatch):
    asked = {}

    def download(repo, **options):
        asked.update(options, repo=repo)
        (tmp_path / "data").mkdir(exist_ok=True)
        write_parquet(tmp_path / "data/train-0.parquet", ROWS)
        (tmp_path / "README.md").write_text("card")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert list(open_source("hf://datasets/org/name@v1")) == ROWS
    assert (asked["repo"], asked["revision"], asked["repo_type"]) == ("org/name", "v1", "dataset")
    assert "*.parquet" in asked["allow_patterns"]
    assert "*.bin" not in asked["allow_patterns"]
    assert list(open_source("hf://datasets/org/name/data/train-*.parquet")) == ROWS
    assert asked["allow_patterns"] == ["data/train-*.parquet"]
    assert asked["revision"] is None
    assert list(open_source("hf://datasets/org/name/data")) == ROWS
    with pytest.raises(UsageError, match="no file matches"):
        open_source("hf://datasets/org/name/data/test-*.parquet")
    with pytest.raises(UsageError, match="must be hf://datasets/ORG/NAME"):
        open_source("hf://datasets/org")


def test_the_hub_is_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RunError, match=r"'hf://datasets/org/name' is not in the hub cache .* HF_HUB_OFFLINE is set"):
        open_source("hf://datasets/org/name")


def test_random_files_never_give_more_than_a_sentence(tmp_path):
    names = ["a.jsonl", "a.json", "a.parquet", "a.arrow", "a.array_record", "a.jsonl.gz", "a.jsonl.zst", "a.txt"]

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.sampled_from(names), st.binary(max_size=200))
    def check(name, content):
        (tmp_path / name).write_bytes(content)
        said = name
        try:
            open_source(tmp_path / name, None)[0]
        except ValueError as error:
            said = str(error)
        assert name in said

    check()
