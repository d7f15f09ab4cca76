"""Steps compiled for pods and clusters that are not there: they compile, fit, and run the collectives they should."""

import json
import os
import subprocess
import sys

import pytest

from configs.load import load
from tests.golden.collectives import CASES, FILE, model_in, plan_case, release, summary
from tests.train.tiny import ROOT
from train.planner.abstract import lower, make_abstract
from train.planner.plan import make_plan
from train.planner.targets import has_compiler, parse_target, set_environment

pytestmark = pytest.mark.plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    for text in ("v5e:4x4", "h100:8"):
        assert has_compiler(parse_target(text)), "the marker plan needs: pip install -e '.[plan]'"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "")  # put back afterwards, as are the others
        for name in (
            "TPU_SKIP_MDS_QUERY",
            "TPU_WORKER_HOSTNAMES",
            "TPU_ACCELERATOR_TYPE",
            "ALLOW_MULTIPLE_LIBTPU_LOAD",
        ):
            patch.setenv(name, "")
        set_environment(parse_target("v5e:4x4"))
        yield tmp_path_factory.mktemp("plan")


@pytest.mark.parametrize("name", CASES)
def test_collectives_and_memory(folder, name):
    plan = plan_case(name, folder)
    assert plan["compiled"]
    assert plan["memory"]["fits"]
    golden = json.loads(FILE.read_text())
    assert release() in golden, "no numbers of this release of jax: python -m tests.golden.collectives"
    assert summary(plan) == golden[release()][name]


@pytest.mark.parametrize("mesh", [(), ("mesh.stage=2", "mesh.fsdp=8")], ids=["fsdp", "stages"])
def test_attention_on_a_tpu_is_splash(folder, mesh):
    """Its three kernels, forward and both backward, on each device's own heads and rows."""
    given = ["data.train=unread", "data.max_length=256", "train.batch_size=64", f"model.source={model_in(folder)}"]
    text = lower(make_abstract(load("pretrain", [*given, *mesh]), parse_target("v5e:4x4"))).compile().as_text()
    for kernel in ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"):
        assert kernel in text


def test_compilers_without_their_devices_change_nothing():
    """Ordinary commands look for no TPU or GPU, and say nothing of it."""
    code = "from train.cli import quiet; quiet(); import jax; print(jax.default_backend())"
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("cpu\n", "")


def test_decoding_compiles(folder):
    given = ["data.train=unread", "data.max_length=256", "sample.max_new_tokens=128", "sample.batch_size=16"]
    more = ["train.batch_size=2", "sample.num_generations=8", f"model.source={model_in(folder)}"]
    plan = make_plan(load("grpo", [*given, *more]), parse_target("v5e:2x2"))
    assert plan["decode"]["fits"]
    assert (
        plan["decode"]["cache"] == 16 * 257 * 2 * 2 * 4 * 64 * 2
    )  # rows, slots, layers, k and v, heads, size, bfloat16
    assert plan["decode"]["peak"] > plan["decode"]["cache_per_device"] > 0
