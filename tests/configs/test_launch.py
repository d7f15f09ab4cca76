"""The launch recipes: they parse, they are shipped, and the one that needs no cloud runs."""

import os
import subprocess
import sys

import pytest
import yaml

from tests.train.tiny import ROOT

FOLDER = ROOT / "configs" / "launch"
SCRIPTS = sorted(path.name for path in FOLDER.iterdir() if path.suffix in (".sh", ".sbatch"))
WORK = """
import os, pathlib, sys
me = os.environ["JAX_PROCESS_ID"]
path = pathlib.Path(sys.argv[1]) / me
tries = int(path.read_text()) if path.exists() else 0
path.write_text(str(tries + 1))
line = [me, os.environ["JAX_NUM_PROCESSES"], os.environ["JAX_COORDINATOR_ADDRESS"], *sys.argv[2:]]
os.write(1, (" ".join(line) + chr(10)).encode())
sys.exit(int(sys.argv[3]) if tries < 2 else 0)
"""


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_parses(name):
    assert subprocess.run(["bash", "-n", str(FOLDER / name)], check=False, capture_output=True).stderr == b""


def test_the_jobset():
    job = yaml.safe_load((FOLDER / "gke_jobset.yaml").read_text())["spec"]
    slice_of = job["replicatedJobs"][0]["template"]["spec"]
    assert slice_of["parallelism"] == slice_of["completions"]
    pod = slice_of["template"]["spec"]
    assert pod["containers"][0]["command"][:2] == ["purestep", "train"]
    names = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == names


def launch(tmp_path, code, **more):
    file = tmp_path / "work.py"
    file.write_text(WORK)
    env = {**os.environ, "HOSTS": "node1 node2", "ON": "", "PAUSE": "0", "COORDINATOR": "127.0.0.1:9", **more}
    command = ["bash", str(FOLDER / "two_machines.sh"), sys.executable, str(file), str(tmp_path), "a b", str(code)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_two_machines_start_again_until_it_ends_well(tmp_path):
    done = launch(tmp_path, 1)
    assert done.returncode == 0, done.stderr
    said = sorted(done.stdout.splitlines())
    assert said == ["0 2 127.0.0.1:9 a b 1"] * 3 + ["1 2 127.0.0.1:9 a b 1"] * 3
    assert "exit code 1; once more in 0 s (1 of 20)" in done.stderr


@pytest.mark.parametrize(("code", "restarts", "tries"), [(2, "20", "1"), (1, "1", "2")])
def test_two_machines_give_up(tmp_path, code, restarts, tries):
    assert launch(tmp_path, code, RESTARTS=restarts).returncode == code
    assert [(tmp_path / me).read_text() for me in "01"] == [tries] * 2
