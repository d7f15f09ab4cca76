"""What a MODEL may be, what a wrong one says, run folders, and the memory that loading takes."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from configs.errors import UsageError
from convert.adapter import write_adapter
from convert.hf import write_folder
from convert.load import load_params, load_tokenizer, resolve
from convert.run import restore_params
from convert.shards import write_checkpoint
from model.lora import attach, merge
from model.tree import flatten

MEMORY = """
import sys, threading, time
import jax, jax.numpy as jnp, gguf.quants, model.transformer
from convert.load import load_params, resolve

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

source = resolve(sys.argv[1])
jnp.zeros(3).block_until_ready()
peak, done, baseline = 0, threading.Event(), anonymous()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
params = load_params(source, dtype=sys.argv[2])
jax.block_until_ready(params)
done.set()
thread.join()
sizes = [x.nbytes for x in jax.tree.leaves(params)]
print(peak - baseline, sum(sizes), max(sizes))
"""


def test_wrong_models_say_what_is_nearest_and_what_is_allowed(tiny, tmp_path, monkeypatch):
    folder, _ = tiny()
    monkeypatch.chdir(tmp_path)
    cases = {
        "tinny": "nearest: tiny",
        str(folder.parent / "tiney"): "nearest: .*tiny",
        "smollm2-135m-instrukt": "nearest: smollm2-135m-instruct",
        "./nothing/at/all": "run folder.*hub id",
    }
    for given, says in cases.items():
        with pytest.raises(UsageError, match=f"MODEL '{given}' does not exist.*{says}"):
            resolve(given)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"without a config\.json"):
        resolve("empty")
    (tmp_path / "empty" / "m.gguf").touch()
    with pytest.raises(UsageError, match=r"give one of them, such as empty/m\.gguf"):
        resolve("empty")
    with pytest.raises(UsageError, match="give its folder"):
        resolve(folder / "model.safetensors")
    (tmp_path / "w.bin").touch()
    with pytest.raises(UsageError, match="pickle"):
        resolve("w.bin")


def test_configs_that_are_wrong(tiny):
    folder, _ = tiny()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gptx"}))
    with pytest.raises(UsageError, match=r"tiny/config\.json: model_type 'gptx' is not supported"):
        resolve(folder)
    (folder / "config.json").write_text('{"a": 1,\n "b"}')
    with pytest.raises(UsageError, match=r"config\.json:2: not valid JSON"):
        resolve(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(UsageError, match="object is expected"):
        resolve(folder)


@pytest.fixture
def run(tiny, tmp_path):
    """save(state, tune) -> a run folder whose checkpoint 7 holds `state`, started from the tiny model."""
    base, _ = tiny()
    folder = tmp_path / "run"

    def save(state, tune=None, step=7):
        folder.mkdir(exist_ok=True)
        config = {"model": {"source": str(base)}, "tune": tune or {"method": "full"}}
        (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
        write_checkpoint(folder / "checkpoints" / str(step), state)
        return folder

    return resolve(base), save


def test_a_run_gives_its_newest_params(run):
    base, save = run
    state = {f"params/{path}": value + 1 for path, value in flatten(load_params(base)).items()}
    save({key: value * 0 for key, value in state.items()}, step=5)
    folder = save(state | {"opt/mu": jnp.zeros(3), "step": jnp.int32(7)})
    (folder / "checkpoints" / "9.tmp-1").mkdir(parents=True)  # killed while saving
    source = resolve(folder)
    assert (source.kind, source.arch) == ("run", base.arch)
    assert restore_params(folder).keys() == flatten(load_params(base)).keys()
    for path, value in flatten(load_params(source, dtype="bfloat16")).items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(state[f"params/{path}"].astype(jnp.bfloat16)))


def test_a_run_that_trained_some_weights_takes_the_rest_from_its_base(run):
    base, save = run
    plain = flatten(load_params(base))
    folder = save({"params/norm/scale": plain["norm/scale"] * 3})
    found = flatten(load_params(resolve(folder)))
    for path, value in plain.items():
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(value * (3 if path == "norm/scale" else 1)))


def test_a_lora_run_comes_attached(run):
    base, save = run
    rng = np.random.default_rng(0)
    a = jnp.asarray(rng.standard_normal((3, 24, 4)), jnp.float32)
    b = jnp.asarray(rng.standard_normal((3, 4, 6, 8)), jnp.float32)
    path = "layers/attn/q/weight"
    tune = {"method": "lora", "r": 4, "lora_alpha": 8.0, "use_rslora": False}
    folder = save({f"params/{path}/a": a, f"params/{path}/b": b}, tune)
    found = flatten(merge(load_params(resolve(folder))))
    expected = flatten(merge(attach(load_params(base), {path: (a, b)}, 2.0)))
    for path, value in expected.items():
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(value))


def test_weights_trained_on_top_of_an_adapter_already_hold_it(run, tmp_path):
    base, save = run
    path = "layers/attn/q/weight"
    a, b = np.ones((3, 24, 2), np.float32), np.ones((3, 2, 6, 8), np.float32)
    write_adapter(tmp_path / "adapter", {path: (a, b)}, base.arch, base=str(base.path), lora_alpha=2)
    trained = flatten(load_params(base))[path] * 5
    folder = save({f"params/{path}": trained})
    (folder / "config.yaml").write_text(json.dumps({"model": {"source": str(tmp_path / "adapter")}}))
    found = flatten(load_params(resolve(folder)))
    np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(trained))
    assert found.keys() == flatten(load_params(base)).keys()


def test_an_export_is_preferred_and_an_empty_run_says_so(run, tmp_path):
    base, save = run
    params = load_params(base)
    folder = save({"params/norm/scale": params["norm"]["scale"] * 0})
    write_folder(folder / "export", params, base.arch)
    assert resolve(folder).path == folder / "export"
    empty = tmp_path / "fresh"
    (empty / "checkpoints").mkdir(parents=True)
    (empty / "config.yaml").write_text("model: {source: x}")
    with pytest.raises(UsageError, match="has saved nothing yet"):
        resolve(empty)
    (folder / "export" / "config.json").unlink()
    (folder / "config.yaml").write_text("model: {}")
    with pytest.raises(UsageError, match=r"config\.yaml: model\.source is missing"):
        resolve(folder)


def test_a_checkpoint_of_another_model(run):
    _, save = run
    folder = save({"params/norm/scale": jnp.zeros(25), "params/other": jnp.zeros(2)})
    with pytest.raises(UsageError, match=r"does not fit the model .*norm/scale \[25\] instead of \[24\]"):
        load_params(resolve(folder))


def test_a_converted_gguf_is_the_same_model(smollm2, tmp_path):
    params, tokenizer = load_params(smollm2), load_tokenizer(smollm2)
    write_folder(tmp_path / "out", params, smollm2.arch, config=smollm2.config, tokenizer=tokenizer,
                 generation_config=smollm2.generation_config, max_shard_bytes=200_000_000)  # fmt: skip
    again = resolve(tmp_path / "out")
    assert (again.arch, again.generation_config) == (smollm2.arch, smollm2.generation_config)
    for path, value in flatten(load_params(again)).items():
        left, right = np.asarray(value), np.asarray(flatten(params)[path])
        np.testing.assert_array_equal(left, right, err_msg=path)
    other = load_tokenizer(again)
    for text in ("a  2 b   33", "Hello <|im_end|> world", "你好"):
        assert other.encode(text) == tokenizer.encode(text)
    assert (other.chat_template, other.eos_ids, other.pad_id) == (tokenizer.chat_template, (2,), 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_loading(smollm2, dtype):
    """Peak anonymous memory over the baseline: the model and at most twice its largest leaf."""
    if not Path("/proc/self/status").exists():
        pytest.skip("RssAnon is Linux's")
    command = [sys.executable, "-c", MEMORY, str(smollm2.path), dtype]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    peak, model, largest = map(int, out.stdout.split()[-3:])
    assert peak <= model + 2 * largest, f"{peak / 1e6:.0f} MB for {model / 1e6:.0f} + 2 x {largest / 1e6:.0f}"


def test_a_device_reads_its_own_slices_alone(tiny):
    """Pages of the mapped file in memory after one of eight devices, split along the ffn, has read its part."""
    folder, tensors = tiny(intermediate_size=8192, hidden_size=256, num_hidden_layers=2)
    path, seen = folder / "model.safetensors", []
    if not Path("/proc/self/smaps").exists():
        pytest.skip("smaps is Linux's")

    def resident():
        mine = Path("/proc/self/smaps").read_text().split(str(path))[1:]
        return sum(int(part.split("Rss:")[1].split()[0]) * 1024 for part in mine)

    def placer(name, shape, dtype, read):
        if name == "layers/mlp/up/weight":
            before, cut = resident(), slice(2048, 3072)
            part = read((slice(None), slice(None), cut))
            expected = [tensors[f"model.layers.{i}.mlp.up_proj.weight"][cut].T for i in range(2)]
            np.testing.assert_array_equal(part, np.stack(expected))
            seen.append((resident() - before, part.nbytes, 8 * part.nbytes))

    load_params(resolve(folder), placer)
    ((touched, needed, whole),) = seen
    assert needed <= touched <= whole / 2  # the kernel maps up to 2 MiB at once where 4 KiB are asked for
