"""Checkpoints in orbax's layout: the same run, resumed in its own format, read as a model; what else it lacks."""

import json
import shutil

import numpy as np
import pytest

from configs.errors import UsageError
from convert.run import restore_params
from convert.shards import complete_steps
from train.loop import train


def rows(folder):
    names = ("step", "loss", "grad_norm", "tokens")
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in names} for row in found]


@pytest.mark.slow
def test_a_run_goes_on_in_the_format_that_it_has_begun_with(make_run):
    common = ("train.steps=6", "checkpoint.every=2", "export.enabled=false", "mesh.fsdp=2", "mesh.data=2",
              "mesh.tensor=2", "train.batch_size=8")  # fmt: skip
    ours = train(make_run(*common, output="ours"))
    theirs = train(make_run(*common, "checkpoint.format=orbax", output="theirs"))
    assert rows(ours) == rows(theirs)
    assert not complete_steps(theirs / "checkpoints")
    expected = restore_params(ours)
    shutil.rmtree(theirs / "checkpoints" / "6")
    train(make_run(*common, output="theirs"))  # as a run of before the format was a choice
    assert rows(ours) == rows(theirs)
    assert not complete_steps(theirs / "checkpoints")
    found = restore_params(theirs)
    assert found.keys() == expected.keys()
    for path, x in found.items():
        np.testing.assert_array_equal(x, expected[path])


def test_what_orbax_checkpoints_have_not_is_refused(make_run):
    with pytest.raises(UsageError, match=r"checkpoint.format is orbax and checkpoint.local is /disk: that is for"):
        make_run("checkpoint.format=orbax", "checkpoint.local=/disk")
