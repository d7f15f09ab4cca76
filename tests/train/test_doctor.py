"""`purestep doctor`: what it measures here, and what it says of what is wrong."""

import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from sharding import flags
from train import doctor
from train.cli import app


def test_eight_devices(tmp_path, monkeypatch):
    monkeypatch.setattr(flags, "_try", lambda given: [])
    monkeypatch.setattr(doctor, "LEAST_DISK", 0.0)
    monkeypatch.setattr(doctor, "TIMES", 1)
    findings = doctor.examine({"data": 1, "tensor": -1}, tmp_path)
    assert all(one.ok for one in findings), doctor.describe(findings)
    named = {one.name: one.found for one in findings}
    assert named["devices"].startswith("8 x cpu; 8 on each of 1 processes")
    assert "TFLOP/s" in named["matrix product"]
    words = named["axis tensor"].replace(",", "").split()
    for name in doctor.COLLECTIVES:
        assert float(words[words.index(name) + 1]) > 0
    assert not any(name in named for name in ("axis data", "axis fsdp"))
    assert doctor.as_json(findings)["ok"]


def test_a_recipe_gives_the_mesh_whatever_its_data(monkeypatch):
    seen, fine = [], [doctor.Finding("all", "well")]
    monkeypatch.setattr(doctor, "examine", lambda sizes, output: seen.append((sizes, output.name)) or fine)
    assert CliRunner().invoke(app, ["doctor", "pretrain", "mesh.tensor=4"]).exit_code == 0
    assert seen[0][0]["tensor"] == 4
    assert seen[0][1] == "pretrain"


def test_an_unknown_flag_is_told_before_it_aborts(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_graph_level=1")
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert not told["ok"]
    [wrong] = [one for one in told["findings"] if not one["ok"]]
    assert "does not know --xla_gpu_graph_level=1" in wrong["remedy"]
    # asked once
    flags._probe.cache_clear()
    monkeypatch.setattr(flags, "_try", lambda given: pytest.fail("asked again"))
    assert flags.refused_flags(["--xla_gpu_graph_level=1"]) == ["--xla_gpu_graph_level=1"]


def test_flags_are_added_where_known_and_not_set(monkeypatch):
    monkeypatch.setattr(flags, "_probe", lambda given: tuple(flag for flag in given if "all_gather" in flag))
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_pipelined_all_reduce=false")
    added = flags.use_flags("auto", "gpu")
    assert added == [flag for flag in flags.OVERLAP["gpu"] if "latency" in flag or "scatter" in flag]
    assert flags.os.environ["XLA_FLAGS"].split() == ["--xla_gpu_enable_pipelined_all_reduce=false", *added]
    assert flags.use_flags("none", "gpu") == flags.use_flags("auto", "cpu") == []
    assert flags.use_flags(["--xla_mine=1"], "tpu") == ["--xla_mine=1"]


def test_what_is_wrong_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    wrong = [one for one in doctor._host(tmp_path) if not one.ok]
    assert [one.name for one in wrong] == ["output", "compilation cache", "hub cache"]
    text = doctor.describe(wrong)
    assert "WRONG output" in text
    assert "-> free some space: checkpoints need it; at least 5 GiB" in text
    versions = {**dict.fromkeys(doctor.LIBRARIES, "1.0"), "jax": "0.10.2", "jaxlib": "0.12.0"}
    monkeypatch.setattr(doctor.importlib.metadata, "version", versions.__getitem__)
    [pair] = [one for one in doctor._versions() if not one.ok]
    assert (pair.found, pair.remedy) == ("jax 0.10.2 with jaxlib 0.12.0", "pip install -U jax==0.12.0")
