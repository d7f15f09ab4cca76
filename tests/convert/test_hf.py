"""Hugging Face folders in and out: bit-exact round trips, shards, and nothing half-written."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs.errors import RunError, UsageError
from convert.hf import write_folder
from convert.load import load_params, resolve
from model.lora import attach
from model.transformer import nest
from model.tree import flatten

UNTIED = {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}


def read_all(folder):
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def same(x, y):
    return x.keys() == y.keys() and all(
        x[k].dtype == y[k].dtype and x[k].shape == y[k].shape and x[k].tobytes() == y[k].tobytes() for k in x
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("config", [{}, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("limit", [5_000_000_000, 9_000], ids=["one", "sharded"])
def test_round_trip_is_bit_exact(tiny, tmp_path, dtype, config, limit):
    folder, tensors = tiny(dtype=dtype, **config)
    source = resolve(folder)
    params = load_params(source)
    out = tmp_path / "out"
    write_folder(out, params, source.arch, config=source.config, max_shard_bytes=limit)
    assert same(read_all(out), tensors)
    index = out / "model.safetensors.index.json"
    assert index.exists() == (limit < 5_000_000_000)
    if index.exists():
        total = json.loads(index.read_text())["metadata"]["total_size"]
        assert total == sum(t.nbytes for t in tensors.values())
        assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    again = resolve(out)
    assert again.arch == source.arch
    assert same(*({k: np.asarray(v) for k, v in flatten(p).items()} for p in (params, load_params(again))))
    written = json.loads((out / "config.json").read_text())
    assert written == {**source.config, "dtype": dtype}


def test_leaves_lie_on_the_first_device_or_where_the_placer_says(tiny, tmp_path):
    from jax.sharding import NamedSharding, PartitionSpec

    from sharding.place import placer

    source = resolve(tiny(dtype="bfloat16")[0])
    plain = flatten(load_params(source, dtype="float32"))
    n = min(jax.device_count(), 4)
    mesh = jax.make_mesh((n,), ("x",), devices=jax.devices()[:n], axis_types=(jax.sharding.AxisType.Auto,))

    def last_axis(shape):
        return PartitionSpec(*[None] * (len(shape) - 1), "x") if shape[-1] % n == 0 else PartitionSpec()

    specs = {path: last_axis(value.shape) for path, value in plain.items()}
    spread = flatten(load_params(source, placer(lambda path, shape: NamedSharding(mesh, specs[path])), "float32"))
    for path, value in plain.items():
        assert value.sharding.device_set == {jax.local_devices()[0]}
        assert spread[path].sharding.spec == specs[path]
        np.testing.assert_array_equal(np.asarray(value), np.asarray(spread[path]))
    write_folder(tmp_path / "one", nest(plain), source.arch)
    write_folder(tmp_path / "many", nest(spread), source.arch)
    assert same(read_all(tmp_path / "one"), read_all(tmp_path / "many"))


def test_dtype_of_the_export(tiny, tmp_path):
    folder, tensors = tiny()
    source = resolve(folder)
    write_folder(tmp_path / "out", load_params(source), source.arch, dtype="bfloat16")
    found = read_all(tmp_path / "out")
    assert same(found, {k: v.astype("bfloat16") for k, v in tensors.items()})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert resolve(tmp_path / "out").arch == source.arch  # written without the source's config.json


def test_sharded_folders_that_do_not_add_up(tiny):
    folder, tensors = tiny()
    half = list(tensors)[: len(tensors) // 2]
    (folder / "model.safetensors").unlink()
    parts = {"1.safetensors": {k: tensors[k] for k in half}}
    parts["2.safetensors"] = {k: v for k, v in tensors.items() if k not in half}
    for name, part in parts.items():
        save_file(part, folder / name)
    index = folder / "model.safetensors.index.json"
    places = {k: name for name, part in parts.items() for k in part}

    def load(weight_map):
        index.write_text(json.dumps({"weight_map": weight_map}))
        return load_params(resolve(folder))

    load(places)
    with pytest.raises(UsageError, match=r"not in the file.*model\.norm\.weight"):
        load({**places, "model.norm.weight": "1.safetensors"} if "model.norm.weight" not in half else
             {**places, "model.norm.weight": "2.safetensors"})  # fmt: skip
    with pytest.raises(UsageError, match=r"does not list there: model\.norm\.weight"):
        load({k: v for k, v in places.items() if k != "model.norm.weight"})
    with pytest.raises(UsageError, match="outside its folder"):
        load({**places, "model.norm.weight": "../1.safetensors"})
    with pytest.raises(UsageError, match="weight_map"):
        load({})
    (folder / "2.safetensors").unlink()
    with pytest.raises(UsageError, match=r"1 of 2 files are missing: 2\.safetensors"):
        load(places)
    index.write_text("{\n  broken")
    with pytest.raises(UsageError, match=r"index\.json:2: not valid JSON"):
        load_params(resolve(folder))


def test_pickles_are_refused(tiny):
    folder, _ = tiny()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"pickle \(pytorch_model\.bin\)"):
        load_params(resolve(folder))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UsageError, match=r"neither model\.safetensors nor"):
        load_params(resolve(folder))


class Broken:
    """A tokenizer whose disk is full."""

    def save(self, folder):
        (folder / "tokenizer.json").write_text("{")
        raise OSError(28, "No space left on device")


def test_failure_leaves_the_destination_untouched(tiny, tmp_path):
    source = resolve(tiny()[0])
    params = load_params(source)
    before = set(tmp_path.iterdir())
    with pytest.raises(RunError, match="No space left"):
        write_folder(tmp_path / "out", params, source.arch, tokenizer=Broken())
    assert set(tmp_path.iterdir()) == before
    write_folder(tmp_path / "out", params, source.arch)
    mark = (tmp_path / "out" / "model.safetensors").stat()
    with pytest.raises(RunError):
        write_folder(tmp_path / "out", params, source.arch, tokenizer=Broken(), overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").stat() == mark
    assert set(tmp_path.iterdir()) == {*before, tmp_path / "out"}


def test_overwriting(tiny, tmp_path):
    source = resolve(tiny()[0])
    params, out = load_params(source), tmp_path / "a" / "out"
    write_folder(out, params, source.arch)
    (out / "stale").touch()
    with pytest.raises(UsageError, match="not empty"):
        write_folder(out, params, source.arch)
    write_folder(out, params, source.arch, overwrite=True)
    assert not (out / "stale").exists()
    shutil.rmtree(out)
    out.mkdir()
    write_folder(out, params, source.arch)  # an empty folder is as good as none
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "diary.txt").touch()
    with pytest.raises(UsageError, match="no model folder"):
        write_folder(notes, params, source.arch, overwrite=True)
    with pytest.raises(UsageError, match="is a file"):
        write_folder(notes / "diary.txt", params, source.arch, overwrite=True)


def test_params_that_do_not_fit(tiny, tmp_path):
    source = resolve(tiny()[0])
    params = load_params(source)
    a, b = np.zeros((3, 24, 2), np.float32), np.zeros((3, 2, 6, 8), np.float32)
    with pytest.raises(ValueError, match="adapters must be merged"):
        write_folder(tmp_path / "out", attach(params, {"layers/attn/q/weight": (a, b)}, 1.0), source.arch)
    assert not (tmp_path / "out").exists()


def test_config_follows_the_architecture(tiny, tmp_path):
    folder, _ = tiny(auto_map={"AutoModel": "code.Model"}, torch_dtype="float16", bos_token_id=1)
    source = resolve(folder)
    write_folder(tmp_path / "out", load_params(source), source.arch, config=source.config, generation_config={"a": 1})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in config
    assert "torch_dtype" not in config
    assert config["bos_token_id"] == 1
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"a": 1}
    write_folder(
        tmp_path / "longer", load_params(source), source.arch, config={**source.config, "max_position_embeddings": 8}
    )
    assert resolve(tmp_path / "longer").arch == source.arch
