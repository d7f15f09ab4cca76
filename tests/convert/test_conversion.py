"""`purestep convert`: what streams from file to file, what is merged, and that a failure leaves nothing behind."""

import json
import os
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import ml_dtypes  # noqa: F401  (numpy learns the name bfloat16)
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from configs.errors import RunError, UsageError
from convert import conversion, tensors
from convert.adapter import write_adapter
from convert.conversion import convert, convert_adapter
from convert.load import load_params, resolve
from convert.shards import write_checkpoint
from convert.tables import Leaf
from model.lora import merge
from model.tree import flatten
from train import cli
from train.convert_commands import read_size

ROOT = Path(cli.__file__).resolve().parent.parent
TARGET = "layers/attn/q/weight"


def read_all(folder):
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def same(x, y):
    return x.keys() == y.keys() and all(
        x[k].dtype == y[k].dtype and x[k].shape == y[k].shape and x[k].tobytes() == y[k].tobytes() for k in x
    )


@pytest.mark.parametrize("kernel", [True, False], ids=["in the kernel", "through the process"])
@pytest.mark.parametrize("limit", [5_000_000_000, 9_000], ids=["one", "sharded"])
def test_a_folder_is_copied_bit_for_bit(tiny, tmp_path, monkeypatch, kernel, limit):
    if not kernel:
        monkeypatch.setattr(tensors, "copy_bytes", lambda *args: False)
    folder, given = tiny(dtype="bfloat16", tie_word_embeddings=False)
    (folder / "LICENSE").write_text("terms")
    made = convert(resolve(folder), tmp_path / "out", max_shard_bytes=limit, verify=True)
    assert same(read_all(tmp_path / "out"), given)
    assert (made.tensors, made.dtypes, made.verified) == (len(given), ("bfloat16",), True)
    assert made.files == len(list((tmp_path / "out").glob("*.safetensors"))) == (1 if limit > 1e9 else made.files)
    assert (tmp_path / "out" / "LICENSE").read_text() == "terms"
    assert resolve(tmp_path / "out").arch == resolve(folder).arch


def test_another_dtype(tiny, tmp_path):
    folder, given = tiny()
    source = resolve(folder)
    for dtype in ("bfloat16", "float16", "float64"):
        convert(source, tmp_path / dtype, dtype=dtype, verify=True)
        assert same(read_all(tmp_path / dtype), {k: v.astype(dtype) for k, v in given.items()})
        assert json.loads((tmp_path / dtype / "config.json").read_text())["dtype"] == dtype
    wide = tiny("wide", add={"model.norm.weight": np.full(24, 7e4, np.float32)})[0]
    with pytest.raises(RunError, match=r"model\.norm\.weight: 24 values, the largest 70000, are beyond float16"):
        convert(resolve(wide), tmp_path / "lost", dtype="float16")
    assert not (tmp_path / "lost").exists()
    with pytest.raises(UsageError, match="dtype 'int8' is unknown; allowed: float32"):
        convert(source, tmp_path / "lost", dtype="int8")


def test_a_written_out_tied_head_and_old_buffers_are_left_out(tiny, tmp_path):
    _, given = tiny("plain")
    extra = {"lm_head.weight": given["model.embed_tokens.weight"], "model.rotary_emb.inv_freq": np.ones(4, np.float32)}
    convert(resolve(tiny(add=extra)[0]), tmp_path / "out", verify=True)
    assert same(read_all(tmp_path / "out"), given)


@pytest.fixture
def adapted(tiny, tmp_path):
    """An adapter folder on a tiny base."""
    base, _ = tiny()
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 24, 2), (3, 2, 6, 8)))
    write_adapter(tmp_path / "adapter", {TARGET: (a, b)}, resolve(base).arch, base=str(base), lora_alpha=3)
    return tmp_path / "adapter"


def test_an_adapter_is_merged(adapted, tmp_path):
    source = resolve(adapted)
    made = convert(source, tmp_path / "out", verify=True)
    expected = flatten(merge(load_params(source)))
    found = flatten(load_params(resolve(tmp_path / "out")))
    assert made.tensors == len(read_all(tmp_path / "out"))
    for path, value in expected.items():
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(value), err_msg=path)


def test_an_adapter_stays_one(adapted, tmp_path):
    convert_adapter(resolve(adapted), tmp_path / "out", verify=True)
    assert same(read_all(tmp_path / "out"), read_all(adapted))
    assert resolve(tmp_path / "out").base.path == resolve(adapted).base.path
    convert_adapter(resolve(adapted), tmp_path / "half", dtype="bfloat16", verify=True)
    assert {v.dtype.name for v in read_all(tmp_path / "half").values()} == {"bfloat16"}
    with pytest.raises(UsageError, match=r"has no adapters \(it is a Hugging Face folder\)"):
        convert_adapter(resolve(adapted).base, tmp_path / "none")


def save_run(folder, base, state, **tune):
    folder.mkdir()
    (folder / "config.yaml").write_text(json.dumps({"model": {"source": str(base)}, "tune": tune}))
    write_checkpoint(folder / "checkpoints" / "3", state)
    return folder


def test_runs(tiny, tmp_path):
    base, _ = tiny()
    trained = {f"params/{path}": value * 2 for path, value in flatten(load_params(resolve(base))).items()}
    convert(resolve(save_run(tmp_path / "full", base, trained, method="full")), tmp_path / "out", verify=True)
    assert same(read_all(tmp_path / "out"), {k: v * 2 for k, v in read_all(base).items()})
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 24, 4), (3, 4, 6, 8)))
    state = {f"params/{TARGET}/a": a, f"params/{TARGET}/b": b}
    run = save_run(tmp_path / "lora", base, state, method="lora", r=4, lora_alpha=8.0, use_rslora=True)
    convert_adapter(resolve(run), tmp_path / "adapter", verify=True)
    for path, dtype in (("merged", None), ("merged16", "bfloat16")):
        convert(resolve(run), tmp_path / path, dtype=dtype, verify=True)
    expected = flatten(merge(load_params(resolve(run))))
    for found in (load_params(resolve(tmp_path / "merged")), merge(load_params(resolve(tmp_path / "adapter")))):
        for path, value in flatten(found).items():
            np.testing.assert_array_equal(np.asarray(value), np.asarray(expected[path]), err_msg=path)


def leftovers(folder):
    return sorted(p.name for p in folder.iterdir() if ".partial" in p.name or ".old" in p.name)


def test_where_it_may_not_write(tiny, tmp_path, adapted):
    folder = tmp_path / "tiny"
    source = resolve(folder)
    cases = {
        folder: "is what is read",
        folder / "out": "lies inside",
        folder / ".." / "tiny": "is what is read",
        tmp_path: "holds .*tiny, which is read",
        folder / "config.json": "lies inside",
    }
    for there, says in cases.items():
        with pytest.raises(UsageError, match=says):
            convert(source, there, overwrite=True)
    with pytest.raises(UsageError, match="is what is read"):
        convert(resolve(adapted), folder, overwrite=True)  # the base
    link = tmp_path / "link"
    link.symlink_to(folder)
    with pytest.raises(UsageError, match="is what is read"):
        convert(source, link, overwrite=True)
    convert(source, tmp_path / "out")
    with pytest.raises(UsageError, match="not empty"):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "out", overwrite=True)
    assert not leftovers(tmp_path)


def break_tensor(folder, given, **changes):
    save_file({k: v for k, v in {**given, **changes}.items() if v is not None}, folder / "model.safetensors")


def test_bad_weights_touch_nothing(tiny, tmp_path):
    folder, given = tiny()
    norm, path = "model.norm.weight", folder / "model.safetensors"
    whole = path.read_bytes()

    def damage(data):
        return lambda: path.write_bytes(data)

    cases = [
        (lambda: break_tensor(folder, given, **{norm: np.ones(23, np.float32)}), rf"{norm} \[23\] instead of \[24\]"),
        (lambda: break_tensor(folder, given, **{norm: None}), rf"1 missing: {norm}"),
        (
            lambda: break_tensor(folder, given, odd=np.ones(2, np.float32)),
            "1 that this architecture has no place for: odd",
        ),
        (lambda: break_tensor(folder, given, **{norm: np.ones(24, np.int8)}), rf"{norm} is I8, not a float"),
        (damage(whole[:-5]), "truncated"),
        (damage(whole + b"12345"), "corrupt"),
        (damage(whole[:3]), "not a safetensors file"),
        (damage(b"\xff" * 8 + whole[8:]), "not a safetensors file, or truncated"),
        (damage(whole[:8] + b"x" + whole[9:]), "corrupt safetensors header"),
    ]
    for harm, says in cases:
        harm()
        with pytest.raises(UsageError, match=says):
            convert(resolve(folder), tmp_path / "out", verify=True)
        assert {p.name for p in tmp_path.iterdir()} == {"tiny"}
    path.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    for key, value, says in (
        ("model_type", "gptx", "model_type 'gptx' is not supported"),
        ("pretraining_tp", 2, "pretraining_tp = 2 is not supported"),
        ("rope_scaling", {"rope_type": "magic", "factor": 2.0}, "RoPE scaling 'magic' is not supported"),
        ("quantization_config", {"bits": 4}, "quantization_config"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(UsageError, match=says):
            convert(resolve(folder), tmp_path / "out")


def test_a_full_disk(tiny, tmp_path, monkeypatch):
    source = resolve(tiny()[0])
    before = set(tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for _ in ("in the kernel", "through the process"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the signal is ignored by Python: write fails
        try:
            with pytest.raises(RunError, match="cannot be written: File too large"):
                convert(source, tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert set(tmp_path.iterdir()) == before
        monkeypatch.setattr(tensors, "copy_bytes", lambda *args: False)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(RunError, match=r"GB are to be written, the disk has 0\.00 GB free"):
        convert(source, tmp_path / "out")
    assert set(tmp_path.iterdir()) == before


def test_verify_sees_one_wrong_bit(tiny, tmp_path, monkeypatch):
    source, write = resolve(tiny()[0]), conversion.write_shards

    def flip(folder, *args):
        write(folder, *args)
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "model.safetensors").write_bytes(data)

    monkeypatch.setattr(conversion, "write_shards", flip)
    with pytest.raises(RunError, match=r"verify: model\.\S+ was not written as meant"):
        convert(source, tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()


def test_each_device_reads_its_part(tiny, monkeypatch):
    """What is fetched for all devices together is the model once, and no transposed copy is made of more."""
    from jax.sharding import NamedSharding, PartitionSpec

    from sharding.place import placer

    source, fetched, read = resolve(tiny()[0]), Counter(), Leaf.read
    devices = jax.devices()[:4]
    mesh = jax.make_mesh((len(devices),), ("x",), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))

    def count(leaf, index, dtype):
        part = read(leaf, index, dtype)
        fetched[leaf.row.ours] += part.nbytes
        first = leaf.tensors[0].read()
        assert np.shares_memory(first, leaf.row.to_ours(first, leaf.arch)), leaf.row.ours
        return part

    monkeypatch.setattr(Leaf, "read", count)

    def split(path, shape):
        axes = ["x" if n % len(devices) == 0 and at else None for at, n in enumerate(shape)]
        if "x" in axes:
            axes = [axis if at == axes.index("x") else None for at, axis in enumerate(axes)]
        return NamedSharding(mesh, PartitionSpec(*axes))

    params = flatten(load_params(source, placer(split)))
    for path, value in params.items():
        assert fetched[path] == value.nbytes, path
    assert sum(not v.sharding.is_fully_replicated for v in params.values()) > 6


MEMORY = """
import sys
from train import cli
from tests.bench.memory import Peak
import convert.conversion
with Peak() as peak:
    sys.argv = ["purestep", "convert", *sys.argv[1:]]
    cli.app(standalone_mode=False)
print(peak.grown, "jax" in sys.modules, "transformers" in sys.modules)
"""


@pytest.mark.parametrize("dtype", [[], ["--dtype", "float32"]], ids=["same", "cast"])
def test_the_command_streams_and_needs_no_jax(tiny, tmp_path, dtype):
    """Peak anonymous memory above what the imports take: at most twice the largest stacked tensor."""
    if not Path("/proc/self/status").exists():
        pytest.skip("RssAnon is Linux's")
    sizes = {"hidden_size": 256, "intermediate_size": 4096, "num_hidden_layers": 6, "vocab_size": 2048}
    folder, given = tiny(dtype="bfloat16", **sizes)
    command = [sys.executable, "-c", MEMORY, str(folder), str(tmp_path / "out"), "--verify", *dtype]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    summary, last = done.stdout.splitlines()[-2:]
    assert f"{len(given)} tensors, {dtype[-1] if dtype else 'bfloat16'}, " in summary
    assert "every tensor bit for bit as meant" in summary
    grown, *imported = last.split()
    assert imported == ["False", "False"]
    largest = 256 * 4096 * 6 * (4 if dtype else 2)
    assert int(grown) <= 2 * largest, f"{int(grown) / 1e6:.1f} MB, twice the largest are {2 * largest / 1e6:.1f}"


def test_the_commands_words(tiny, tmp_path, adapted):
    run = CliRunner().invoke
    done = run(cli.app, ["convert", str(adapted), str(tmp_path / "out"), "--adapter", "--dtype", "bfloat16"])
    assert done.exit_code == 0, done.output
    assert "6 tensors, bfloat16" in done.output
    for words, says in {
        ("x.gguf", "--adapter"): "--adapter writes a PEFT folder",
        ("x", "--max-shard-size", "5 apples"): "5 apples",
        ("x", "--dtype", "q8_0"): "dtype 'q8_0' is unknown",
    }.items():
        assert says in str(run(cli.app, ["convert", str(adapted), *words]).exception)
    assert [read_size(text) for text in ("5GB", "500 MiB", "1000", "1.5kb")] == [5 * 10**9, 500 * 2**20, 1000, 1500]
