"""Killed at any moment and run again = never killed: bitwise, all but the time fields. In processes of their own."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.train import tiny
from train.checkpoint import Checkpoints
from train.metrics import is_time

STEPS, EVERY = 60, 5
LIMIT = 120  # seconds that a process may take on a busy machine


def arguments(folder, model, data, *more):
    """The command line of a run that saves every few steps."""
    return ["sft", *tiny.overrides(folder, model, data, f"train.steps={STEPS}", f"checkpoint.every={EVERY}", *more)]


def lines(folder):
    """How many lines of metrics the run has written so far."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_until(happened, process):
    """Poll quickly; fails when the process ends or the time is up before it happens."""
    end = time.monotonic() + LIMIT
    while not happened():
        if process.poll() is not None or time.monotonic() > end:
            pytest.fail(f"exit {process.poll()}: {process.communicate()[1][-2000:]}")
        time.sleep(0.001)


def finish(process):
    """Its standard error, after it has ended well."""
    _, error = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, error[-3000:]
    return error


def timeless(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not is_time(k)} for row in rows]


def same_runs(folder, expected):
    """Parameters, optimizer state, data position, metrics, export: bit for bit."""
    assert timeless(folder) == timeless(expected)
    found, wanted = ({}, {})
    for where, into in ((folder, found), (expected, wanted)):
        checkpoints = Checkpoints(where)
        assert checkpoints.latest() == STEPS
        into.update(checkpoints.arrays(STEPS), meta={**checkpoints.meta(STEPS), "config": None})
    assert found.pop("meta") == wanted.pop("meta")
    assert found.keys() == wanted.keys()
    for path, x in wanted.items():
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(x), err_msg=path)
    assert any(path.startswith("opt/0/nu/") for path in found)
    ours, theirs = (load_file(f / "export" / "model.safetensors") for f in (folder, expected))
    for name, x in theirs.items():
        np.testing.assert_array_equal(ours[name], x, err_msg=name)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_model, chats, compiled):
    """The same run, left alone."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    finish(tiny.launch(compiled, arguments(folder, tiny_model, chats)))
    return folder


def kill_when(start, command, folder, happened):
    process = start(*command)
    wait_until(lambda: happened(folder), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert lines(folder) < STEPS, "it was too late to kill it"


def begins_to_save(folder):
    """A checkpoint is being written: under another name, which is then changed."""
    return lines(folder) > 2 * EVERY and any("tmp" in p.name for p in (folder / "checkpoints").iterdir() if p.is_dir())


def test_killed_and_run_again(start, tmp_path, tiny_model, chats, uninterrupted):
    """Once while it saves, once at some step; then to the end."""
    folder = tmp_path / "run"
    command = arguments(folder, tiny_model, chats)
    kill_when(start, command, folder, begins_to_save)
    kill_when(start, command, folder, lambda f: lines(f) >= 33)
    finish(start(*command))
    same_runs(folder, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_at_random_moments(seed, start, tmp_path, tiny_model, chats, uninterrupted):
    folder, dice = tmp_path / "run", random.Random(seed)
    command = arguments(folder, tiny_model, chats)
    for _ in range(3):
        done = lines(folder)
        if done > STEPS - 8:
            break
        at, later = dice.randrange(done, min(done + 25, STEPS - 4)), dice.random() / 50
        process = start(*command)
        wait_until(lambda at=at: lines(folder) > at, process)
        time.sleep(later)
        process.kill()
        process.communicate()
    finish(start(*command))
    same_runs(folder, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_while_saving(seed, start, tmp_path, tiny_model, chats, uninterrupted):
    folder, dice = tmp_path / "run", random.Random(seed)
    command = arguments(folder, tiny_model, chats)
    process = start(*command)
    wait_until(lambda: begins_to_save(folder), process)
    time.sleep(dice.random() / 20)
    process.kill()
    process.communicate()
    finish(start(*command))
    same_runs(folder, uninterrupted)


def test_sigterm_saves_and_the_same_command_goes_on(start, tmp_path, tiny_model, chats, uninterrupted):
    folder = tmp_path / "run"
    command = arguments(folder, tiny_model, chats)
    process = start(*command)
    wait_until(lambda: lines(folder) >= 12, process)
    process.terminate()
    error = finish(process)
    done = lines(folder)
    assert f"SIGTERM: saved step {done}; the same command goes on from there" in " ".join(error.split())
    assert (folder / "checkpoints" / str(done)).is_dir()
    assert 12 <= done < STEPS
    assert not (folder / "export").exists()
    finish(start(*command))
    same_runs(folder, uninterrupted)


@pytest.mark.slow
def test_sigterm_without_checkpoints_says_that_nothing_is_saved(start, tmp_path, tiny_model, chats):
    folder = tmp_path / "run"
    process = start(*arguments(folder, tiny_model, chats, "checkpoint.enabled=false"))
    wait_until(lambda: lines(folder) >= 12, process)
    process.terminate()
    assert "SIGTERM: nothing is saved" in finish(process)
    assert not (folder / "checkpoints").exists()


@pytest.mark.slow
def test_killed_after_training_and_before_the_export(start, tmp_path, tiny_model, chats, uninterrupted):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    shutil.rmtree(folder / "export")
    (folder / ".export.partial-1").mkdir()
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(str(uninterrupted), str(folder)))
    finish(start(*arguments(folder, tiny_model, chats)))
    same_runs(folder, uninterrupted)
    assert Path(folder / "export").is_dir()
