"""Signals, hung steps, failed saves: what is told, and how it ends."""

import json
import os
import subprocess
import sys
import time

import pytest

from configs.errors import RunError, UsageError
from configs.load import load
from tests.train import tiny
from train import checkpoint
from train.faults import StopSignal
from train.loop import Loop, train


@pytest.fixture(autouse=True)
def _one_device():
    with tiny.one_device():
        yield


HUNG = """
import time
from train.faults import Watch
with Watch(0.3) as watch:
    watch.beat(6)
    time.sleep(0.1)
    watch.beat(7)
    def waits_for_a_host(): time.sleep(60)
    waits_for_a_host()
"""


def test_a_hung_step_ends_with_stacks():
    done = subprocess.run(
        [sys.executable, "-c", HUNG], cwd=tiny.ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "process 0: step 8 has not ended for 0 s (train.hang_timeout=0.3)" in done.stderr
    assert "in waits_for_a_host" in done.stderr


def test_processes_that_do_not_come_together_say_so():
    """jax alone would abort with a stack of its own."""
    names = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:9", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    code = "from sharding.processes import connect; connect(100, 1)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT, env={**os.environ, **names}, capture_output=True,
                          text=True, timeout=60, check=False)  # fmt: skip
    assert done.returncode == 1
    assert "process 1 of 2: they did not come together at 127.0.0.1:9 within train.join_timeout=1 s: is" in done.stderr


def slow_write(monkeypatch, seconds, step=4):
    real = checkpoint.Checkpoints._commit

    def commit(self, part, folder, *more):
        time.sleep(seconds if folder.name == str(step) else 0)
        real(self, part, folder, *more)

    monkeypatch.setattr(checkpoint.Checkpoints, "_commit", commit)


def full(monkeypatch, step=8):
    real = checkpoint.files.write_part

    def write(path, shards):
        if path.parent.name.startswith(f"{step}."):
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        return real(path, shards)

    monkeypatch.setattr(checkpoint.files, "write_part", write)


def test_a_late_save_at_sigterm_is_told(make_run, monkeypatch, capsys):
    """And waited for all the same."""
    from contextlib import contextmanager

    class AtFour(StopSignal):
        def __call__(self, step):
            if step == 4:
                self.arrived.append(time.monotonic())
            return step == 4

    @contextmanager
    def stop():
        yield AtFour()

    monkeypatch.setattr("train.loop.stop_signal", stop)
    slow_write(monkeypatch, 0.5)
    folder = train(make_run("checkpoint.deadline=0.1"))
    said = " ".join(capsys.readouterr().err.split())
    assert "SIGTERM: step 4 is not saved within checkpoint.deadline=0.1 s; still being written" in said
    assert "SIGTERM: saved step 4; the same command goes on from there" in said
    assert (folder / "checkpoints" / "4" / "manifest.json").is_file()


def test_a_full_disk_and_training(make_run, monkeypatch, capsys):
    """One save fails: training goes on, or stops; the same command goes on from the one before."""
    with monkeypatch.context() as patch:
        full(patch)
        folder = train(make_run())
    said = capsys.readouterr().err
    assert "the save of step 8 failed: No space left on device; earlier checkpoints are as they were; training" in said
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["12", "4"]
    full(monkeypatch)
    look = Loop._look_at_saves  # at once: on a busy machine step 12 may have been saved before the failure is known
    monkeypatch.setattr(Loop, "_look_at_saves", lambda self: (self.checkpoints.wait(), look(self)))
    with pytest.raises(RunError, match=r"the save of step 8 .*on_error=stop"):
        train(make_run("checkpoint.on_error=stop", output="stops"))
    stops = folder.with_name("stops")
    assert [p.name for p in (stops / "checkpoints").iterdir()] == ["4"]
    monkeypatch.undo()
    train(make_run("checkpoint.on_error=stop", output="stops"))
    assert sorted(p.name for p in (stops / "checkpoints").iterdir()) == ["12", "8"]


def test_the_best_is_saved_when_it_is_reached(make_run, chats):
    more = (f"data.eval={chats}", "train.eval_every=3", "train.eval_batches=1", "checkpoint.every=100")
    folder = train(make_run(*more, "checkpoint.keep_best=eval_loss", "checkpoint.keep=1"))
    names = sorted(int(p.name) for p in (folder / "checkpoints").iterdir())
    assert names[-1] == 12
    best = checkpoint.Checkpoints(folder, load(str(folder), []).checkpoint).best()
    rows = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if "eval_loss" in line]
    losses = {}
    for line in rows:
        row = json.loads(line)
        losses[row["step"]] = row["eval_loss"]
    assert best == min(losses.items(), key=lambda item: item[1])
    with pytest.raises(UsageError, match=r"checkpoint\.keep_best=f1: evaluations tell eval_loss"):
        train(make_run(*more, "checkpoint.keep_best=f1", output="other"))
    with pytest.raises(UsageError, match=r"keep_best is eval_loss and train\.eval_every is 0"):
        make_run("checkpoint.keep_best=eval_loss")
