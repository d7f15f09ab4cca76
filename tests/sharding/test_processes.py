"""Two processes of two devices, or four of one, are one machine of four: same losses, one checkpoint, one end."""

import json
import shutil
import socket
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.train import tiny
from train.checkpoint import Checkpoints
from train.metrics import is_time

LIMIT = 180


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def settings(folder, model, data, *more):
    return ["sft", *tiny.overrides(folder, model, data, "mesh.data=2", "mesh.fsdp=2", *more)]


def begin_many(start, arguments, count=2, **options):
    """Processes with four devices together that find each other."""
    names = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(count), **options}
    return [start(*arguments, devices=4 // count, **names, JAX_PROCESS_ID=str(i)) for i in range(count)]


@pytest.fixture
def start_many(start):
    """start_many(*arguments, count=2, **options) -> processes, ended with the test."""
    return lambda *arguments, count=2, **options: begin_many(start, arguments, count, **options)


def finish(processes):
    said = [process.communicate(timeout=LIMIT)[1] for process in processes]
    for process, error in zip(processes, said, strict=True):
        assert process.returncode == 0, error[-3000:]
    return said


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def alike(folder, expected):
    """Losses and exported weights agree to rounding."""
    found, wanted = rows(folder), rows(expected)
    assert [row["step"] for row in found] == list(range(1, 13))
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["tokens"] == theirs["tokens"]
    mine, theirs = (load_file(f / "export" / "model.safetensors") for f in (folder, expected))
    for name, x in theirs.items():
        assert np.linalg.norm(mine[name] - x) < 1e-3 * np.linalg.norm(x), name


def back_to(folder, step, whole):
    """A copy of a finished run as it stood after `step`."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "export")
    for path in (folder / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(str(whole), str(folder)))


def until_step(step, folder, processes):
    end, path = time.monotonic() + LIMIT, folder / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < step:
        assert time.monotonic() < end
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_model, chats, compiled):
    """A run of two processes, and what they said."""
    folder = tmp_path_factory.mktemp("two") / "run"
    start = lambda *arguments, **options: tiny.launch(compiled, arguments, **options)  # noqa: E731
    return folder, finish(begin_many(start, settings(folder, tiny_model, chats)))


@pytest.mark.slow
def test_processes_train_as_one(start, start_many, tmp_path, uninterrupted, tiny_model, chats):
    (two, said), one = uninterrupted, tmp_path / "one"
    assert "step 12/12" in said[0]
    assert "step " not in said[1], "only one process reports"
    assert sorted(p.name for p in (two / "checkpoints" / "12").glob("*.safetensors")) == [
        "process_0.safetensors", "process_1.safetensors"
    ]  # fmt: skip
    finish([start(*settings(one, tiny_model, chats), devices=4)])
    alike(two, one)
    # its checkpoint goes on in four processes, and in one with one device: the data in the same order
    for count in (4, 1):
        back_to(back := tmp_path / f"back{count}", 8, two)
        if count == 1:
            finish([start(*settings(back, tiny_model, chats, "mesh.data=1", "mesh.fsdp=1"), devices=1)])
        else:
            finish(start_many(*settings(back, tiny_model, chats), count=count))
        alike(back, one)


@pytest.mark.slow
def test_killed_beside_another(start_many, tmp_path, uninterrupted, tiny_model, chats):
    """The other one ends soon, with a reason; the same command goes on bitwise, also from the disks of the hosts."""
    (whole, _), folder = uninterrupted, tmp_path / "run"
    local = ("checkpoint.every=6", f"checkpoint.local={tmp_path / 'disk'}", "checkpoint.local_every=1")
    more = [*local, "train.hang_timeout=20"]
    processes = start_many(*settings(folder, tiny_model, chats, *more))
    until_step(3, folder, processes)
    processes[1].kill()
    began = time.monotonic()
    error = processes[0].communicate(timeout=LIMIT)[1]
    assert time.monotonic() - began < 60
    assert processes[0].returncode == 1
    # gloo tells of it, or waits for what never comes
    assert "process 0 of 2 has lost another one" in error or "(train.hang_timeout=20); the usual cause" in error
    finish(start_many(*settings(folder, tiny_model, chats, *more)))
    assert [{k: v for k, v in row.items() if not is_time(k)} for row in rows(folder)] == [
        {k: v for k, v in row.items() if not is_time(k)} for row in rows(whole)
    ]
    ours, theirs = (Checkpoints(f).arrays(12) for f in (folder, whole))
    for path, x in theirs.items():
        np.testing.assert_array_equal(ours[path], x, err_msg=path)


@pytest.mark.slow
def test_what_one_process_reads_is_no_number(start_many, tmp_path, uninterrupted, tiny_model, chats):
    """Both stop at that step and say whose rows it was; the same command goes on from before, bitwise."""
    (whole, _), folder = uninterrupted, tmp_path / "run"
    processes = start_many(*settings(folder, tiny_model, chats), module="tests.sharding.poisoned")
    for process in processes:
        said = " ".join(process.communicate(timeout=LIMIT)[1].split())
        assert process.returncode == 1
        assert "step 6: loss is nan (1 rows of process 1 have such 'weights'); the last checkpoint is from" in said
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["4"]
    finish(start_many(*settings(folder, tiny_model, chats)))
    ours, theirs = (Checkpoints(f).arrays(12) for f in (folder, whole))
    for path, x in theirs.items():
        np.testing.assert_array_equal(ours[path], x, err_msg=path)


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_at_one_step(start, start_many, tmp_path, tiny_model, chats):
    folder, more = tmp_path / "run", ("train.steps=400", "checkpoint.every=1000")
    processes = start_many(*settings(folder, tiny_model, chats, *more))
    until_step(5, folder, processes)
    processes[1].terminate()
    said = finish(processes)
    done = rows(folder)[-1]["step"]
    assert 5 <= done < 400
    assert f"SIGTERM: saved step {done}" in " ".join(said[0].split())
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [str(done)]


def test_too_few_rows_for_the_processes(monkeypatch):
    """What is refused before anything is loaded, without starting two processes."""
    from configs.errors import UsageError
    from configs.schema import Run
    from sharding.mesh import make_mesh
    from sharding.rules import DEFAULT
    from train.setup import check_batch

    run = Run.model_validate({"model": {"source": "m"}, "data": {"train": ["rows.jsonl"]}, "train": {"batch_size": 8}})
    check_batch(run, make_mesh({"data": 8}), DEFAULT)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    check_batch(run, make_mesh({"data": 8}), DEFAULT)
    with pytest.raises(UsageError, match="batch is split over 1 devices, but 2 processes each read their own rows"):
        check_batch(run, make_mesh({"tensor": 8}), DEFAULT)
