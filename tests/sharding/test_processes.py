"""Two processes with two devices each are one machine of four: same losses, one checkpoint, one stop."""

import json
import shutil
import socket
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.train import tiny

LIMIT = 180


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def settings(folder, model, data, *more):
    return ["sft", *tiny.overrides(folder, model, data, "mesh.data=2", "mesh.fsdp=2", *more)]


@pytest.fixture
def start_two(start):
    """start_two(*arguments) -> two processes, each with two devices, that find each other."""

    def begin(*arguments):
        names = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
        return [start(*arguments, devices=2, **names, JAX_PROCESS_ID=str(i)) for i in range(2)]

    return begin


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


@pytest.mark.slow
def test_two_processes_train_as_one(start, start_two, tmp_path, tiny_model, chats):
    two, one = tmp_path / "two", tmp_path / "one"
    said = finish(start_two(*settings(two, tiny_model, chats)))
    assert "step 12/12" in said[0]
    assert "step " not in said[1], "only one process reports"
    finish([start(*settings(one, tiny_model, chats), devices=4)])
    alike(two, one)
    # its checkpoint goes on in one process, and on one device
    back = tmp_path / "back"
    shutil.copytree(two, back)
    shutil.rmtree(back / "checkpoints" / "12")
    config = back / "config.yaml"
    config.write_text(config.read_text().replace(str(two), str(back)))
    finish([start(*settings(back, tiny_model, chats, "mesh.data=1", "mesh.fsdp=1"), devices=1)])
    alike(back, one)


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_at_one_step(start, start_two, tmp_path, tiny_model, chats):
    folder, more = tmp_path / "run", ("train.steps=400", "checkpoint.every=1000")
    processes = start_two(*settings(folder, tiny_model, chats, *more))
    end = time.monotonic() + LIMIT
    path = folder / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < 5:
        assert time.monotonic() < end
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.01)
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
