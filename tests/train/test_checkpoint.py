"""Checkpoints without a model: any mesh, damage found and passed over, full disks, tiers, what is kept."""

import json
import resource
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from configs.checkpoint import Checkpoint
from configs.errors import RunError, UsageError
from convert.shards import open_checkpoint
from sharding.mesh import make_mesh
from train.checkpoint import Checkpoints
from train.state import State

BOTH, WHOLE = P("fsdp", "tensor"), P()


def state_on(mesh, spec=BOTH, fill=0):
    """Every dtype of a state, cut by `spec`, replicated, and a scalar."""
    put = lambda x, s=WHOLE: jax.device_put(x, NamedSharding(mesh, s))  # noqa: E731
    wide = (np.arange(16 * 8) + fill).reshape(16, 8)
    params = {"w": put(wide.astype(np.float32), spec), "half": put(wide.astype(ml_dtypes.bfloat16), spec),
              "codes": put(wide.astype(np.uint8), spec)}  # fmt: skip
    opt = {"mu": put(wide.astype(np.float32) / 3), "four": put(jnp.asarray(wide % 7).astype(jnp.int4)),
           "none": put(np.zeros((0, 3), np.float32))}  # fmt: skip
    return State(put(np.int32(fill)), params, opt)


def like(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.sharding) == (y.dtype, y.sharding)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


MESHES = [({"fsdp": 8}, P("fsdp")), ({"fsdp": 2, "tensor": 4}, P("fsdp", "tensor")),
          ({"data": 2, "tensor": 4}, P(None, "tensor")), ({"tensor": 8}, P())]  # fmt: skip


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"fsdp": 2, "tensor": 4})


def test_from_any_mesh_to_any(tmp_path):
    states = [state_on(make_mesh(shape), spec) for shape, spec in MESHES]
    for i, state in enumerate(states):
        saved = Checkpoints(tmp_path / str(i))
        saved.save(3, state, {"data": [1]})
        saved.close()
        assert saved.failure() is None
        assert (saved.latest(), saved.meta(3)) == (3, {"data": [1]})
        for other in states:
            same(saved.restore(3, like(other)), other)


def test_a_part_is_restored_alone(tmp_path, mesh):
    """The weights, or some of them, onto another mesh; what is not there is refused, and too little by default."""
    saved, there = Checkpoints(tmp_path), state_on(make_mesh({"data": 2, "fsdp": 4}), P("fsdp"))
    saved.save(4, state_on(mesh), {})
    saved.close()
    for part in ({"params": there.params}, {"params": {"half": there.params["half"]}}):
        same(saved.restore(4, like(part), partial=True), part)
        with pytest.raises(RunError, match="does not fit this run"):
            saved.restore(4, like(part))
    with pytest.raises(RunError, match="only in expected: params/nothing"):
        saved.restore(4, like({"params": {"nothing": there.params["half"]}}), partial=True)


def test_read_without_this_code(tmp_path, mesh):
    saved, state = Checkpoints(tmp_path), state_on(mesh)
    saved.save(1, state, {})
    saved.close()
    folder = tmp_path / "checkpoints" / "1"
    found = load_file(folder / "process_0.safetensors")
    w = np.block([[found[f"params/w@{i},{j}"] for j in range(0, 8, 2)] for i in (0, 8)])
    np.testing.assert_array_equal(w, np.asarray(state.params["w"]))
    np.testing.assert_array_equal(found["opt/mu"], np.asarray(state.opt["mu"]))
    assert json.loads((folder / "index.json").read_text())["params/half"] == {"dtype": "bfloat16", "shape": [16, 8]}
    # a part of it, and a part of an array
    part = open_checkpoint(folder)["params/half"].read((slice(3, 12), slice(1, 6)))
    np.testing.assert_array_equal(part, np.asarray(state.params["half"])[3:12, 1:6])


def test_what_a_step_does_to_its_memory_is_not_saved(tmp_path, mesh):
    """The next step may take the memory of the state as soon as save() returns."""
    saved, state = Checkpoints(tmp_path), state_on(mesh)
    wanted = jax.tree.map(np.array, state)
    change = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    saved.save(1, state, {})
    jax.block_until_ready(change(state))
    saved.close()
    for path, x in saved.arrays(1).items():
        if path.startswith("params/"):
            np.testing.assert_array_equal(x, wanted.params[path.removeprefix("params/")])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flipped": (lambda f: flip(f / "process_0.safetensors"), "process_0.safetensors has changed: its crc32 is"),
    "cut": (lambda f: (f / "process_0.safetensors").write_bytes(b"x"), "has 1 bytes, the manifest says"),
    "gone": (lambda f: (f / "meta.json").unlink(), "meta.json is missing"),
    "empty manifest": (lambda f: (f / "manifest.json").write_bytes(b""), "manifest.json: "),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(kind, tmp_path, mesh, capsys):
    saved, state = Checkpoints(tmp_path), state_on(mesh)
    for step in (4, 8):
        saved.save(step, state, {})
    saved.close()
    spoil, words = DAMAGE[kind]
    spoil(tmp_path / "checkpoints" / "8")
    again = Checkpoints(tmp_path)
    assert again.latest() == 4
    error = capsys.readouterr().err
    assert "checkpoint 8 is damaged and left out: " in error
    assert words in error
    again.save(8, state, {})  # the run comes by again
    again.close()
    assert again.latest() == 8
    for step in (4, 8):
        spoil(tmp_path / "checkpoints" / str(step))
    with pytest.raises(RunError, match=r"every checkpoint in .* is damaged"):
        Checkpoints(tmp_path).latest()


def test_a_full_disk_costs_one_save(tmp_path, mesh):
    """The system refuses to write on: what was there stays, the half-written folder goes."""
    saved, state = Checkpoints(tmp_path), state_on(mesh)
    saved.save(4, state, {})
    saved.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        saved.save(8, state, {})
        saved.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.failure() == "the save of step 8 failed: File too large; earlier checkpoints are as they were"
    assert saved.failure() is None
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]
    saved.save(12, state, {})
    saved.close()
    assert saved.latest() == 12


def test_the_newest_and_the_best_are_kept(tmp_path, mesh):
    saved, state = Checkpoints(tmp_path, Checkpoint(keep=2, keep_best="eval_loss")), state_on(mesh)
    for step, loss in enumerate((5.0, 2.0, 3.0, float("nan"), 4.0), 1):
        saved.save(step, state, {}, {"eval_loss": loss})
    saved.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "4", "5"]
    assert saved.best() == (2, 2.0)


def test_tiers(tmp_path, mesh):
    """The newest good one of all: the local disk's, the run's, a copy elsewhere."""
    url = f"memory://{tmp_path.name}"
    knobs = Checkpoint(local=str(tmp_path / "disk"), remote=url)
    run, states = tmp_path / "run", {step: state_on(mesh, fill=step) for step in (4, 5, 6, 8)}
    saved = Checkpoints(run, knobs)
    for step, state in states.items():
        saved.wait()
        saved.save(step, state, {"at": step}, shared=step in (4, 8))
    saved.close()
    assert saved.failure() is None
    local = next((tmp_path / "disk").glob("run-*/process_0"))
    assert sorted(p.name for p in local.iterdir()) == ["6", "8"]

    def newest(mesh_of=mesh, knobs=knobs):
        again = Checkpoints(run, knobs)
        step = again.latest(like=state_on(mesh_of))
        same(again.restore(step, like(state_on(mesh_of))), state_on(mesh_of, fill=step))
        return step, again.meta(step)["at"], again._where(step).parent

    assert newest() == (8, 8, local)
    flip(local / "8" / "process_0.safetensors")
    assert newest() == (8, 8, run / "checkpoints")
    flip(run / "checkpoints" / "8" / "process_0.safetensors")
    assert newest() == (8, 8, run / "checkpoints"), "brought back"
    flip(run / "checkpoints" / "8" / "process_0.safetensors")
    assert newest(knobs=Checkpoint(local=knobs.local)) == (6, 6, local)
    assert newest(make_mesh({"tensor": 8}), Checkpoint(local=knobs.local)) == (6, 6, local)  # one process holds all
    shutil.rmtree(run)
    flip(local / "6" / "process_0.safetensors")
    with pytest.raises(RunError, match=r"every checkpoint in .*disk is damaged; remove the folder"):
        newest(knobs=Checkpoint(local=knobs.local))
    shutil.rmtree(tmp_path / "disk")
    assert newest() == (8, 8, run / "checkpoints"), "a new machine: brought back"
    with pytest.raises(UsageError, match=r"checkpoint\.remote=nothing://x: "):
        Checkpoints(run, Checkpoint(remote="nothing://x"))
