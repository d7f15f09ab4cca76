"""Honest plans: memory as measured, FLOPs as counted, traffic as the theory has it; the command."""

import json
import math
import os
import subprocess
import sys
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

from configs.errors import UsageError
from configs.load import load
from model.architecture import Architecture
from model.compute import Compute
from model.flops import train_flops
from model.transformer import init
from model.tree import flatten
from tests.train.tiny import ROOT
from train import cli
from train.losses.lm import lm_loss
from train.planner.abstract import make_abstract
from train.planner.plan import check_fits, plan_of, stand_ins
from train.planner.search import apply, meshes, ranked
from train.planner.targets import parse_target

SMALL = ("model.source=10m", "data.train=unread", "data.max_length=256", "train.batch_size=8")


def laid_out(run, text):
    """The job on a target, to be planned by formulas."""
    target = parse_target(text)
    return make_abstract(run, target, stand_ins(target))


def test_flops_are_those_of_an_unrolled_step():
    """The compiler's own count, of a step without a loop that it would count once; all keys are computed with."""
    arch = Architecture(
        vocab_size=512, d_model=512, d_ff=1536, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=64, max_position=64
    )
    B, T = 4, 64
    compute = Compute(attention="reference", unroll=arch.num_layers)
    params = jax.eval_shape(partial(init, arch), jax.random.key(0))
    row = jax.ShapeDtypeStruct((B, T), jnp.int32)
    batch = {name: row for name in ("tokens", "targets", "positions", "segments")}
    batch["weights"] = jax.ShapeDtypeStruct((B, T), jnp.float32)
    loss = partial(lm_loss, arch=arch, compute=compute, chunk=B * T, z_loss=0.0, router=(0.0, 0.0))
    norms = {"tokens": jax.ShapeDtypeStruct((), jnp.float32)}
    counted = jax.jit(jax.grad(loss, has_aux=True)).lower(params, batch, norms).cost_analysis()
    expected = train_flops(arch, float(B * T), float(B * T * T), False)
    assert counted["flops"] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("dtype", "wide"), [("compute", 1), ("float32", 2)])
def test_theory_of_fsdp_is_three_times_the_weights(dtype, wide):
    """Two gathers and a scatter of gradients, which are twice as wide in float32."""
    run = load("pretrain", [*SMALL, "model.dtype=bfloat16", f"optim.reduce_dtype={dtype}"])
    plan = plan_of(laid_out(run, "v5e:2x4"), False)
    weights = {one["kind"]: one["moved"] for one in plan["theory"]}
    size = plan["parameters"] * 2 * 7 / 8  # bfloat16, seven eighths of it from others
    assert weights["all-gather"] == pytest.approx(2 * size, rel=1e-3)
    assert weights["reduce-scatter"] == pytest.approx(wide * size, rel=1e-3)


@pytest.mark.parametrize(("gather", "passes", "sums"), [("tick", 2 * 4, 4), ("step", 1, 1)])
def test_theory_of_a_pipeline_fetches_a_stages_layers(gather, passes, sums):
    """For each of 4 micro-batches and both passes, or once; embedding and head from the devices of all stages."""
    given = [
        "mesh.stage=2",
        "mesh.fsdp=4",
        "mesh.pipeline_microbatches=4",
        f"mesh.pipeline_gather={gather}",
        "train.batch_size=16",
    ]
    run = load("pretrain", [*SMALL, "model.dtype=bfloat16", "optim.reduce_dtype=compute", *given])
    planned = laid_out(run, "v5e:2x4")
    flows = {(one["kind"], one["axes"]): one["moved"] for one in plan_of(planned, False)["theory"]}
    sizes = {path: math.prod(x.shape) for path, x in flatten(planned.state.params).items()}
    layers = sum(size for path, size in sizes.items() if path.startswith("layers/"))
    rest, share = sum(sizes.values()) - layers, 2 * 3 / 4  # bfloat16, three quarters of it from others
    all_axes = ("stage", "fsdp")
    assert flows["all-gather", ("fsdp",)] == pytest.approx(share * passes * layers / 2, rel=0.01)
    assert flows["reduce-scatter", ("fsdp",)] == pytest.approx(share * sums * layers / 2, rel=0.01)
    assert flows["all-gather", all_axes] == pytest.approx(2 * 7 / 8 * 2 * rest, rel=0.01)
    assert flows["reduce-scatter", all_axes] == pytest.approx(2 * 7 / 8 * rest, rel=0.01)
    assert flows["collective-permute", ("stage",)] == 2 * 2 * planned.tokens_per_device * planned.job.arch.d_model * 2


def test_what_cannot_fit_is_refused_with_a_change_that_would():
    given = ["data.train=unread", "model.source=3b", "data.max_length=2048", "train.batch_size=64"]
    with pytest.raises(UsageError, match="GiB too much; the cheapest change that would fit: ") as caught:
        check_fits(laid_out(load("sft", given), "v5e:1x1"))
    change = str(caught.value).rpartition(": ")[2].split()
    assert change
    assert plan_of(laid_out(load("sft", [*given, *change]), "v5e:1x1"), False)["memory"]["fits"]


def test_the_search_ranks_what_fits():
    planned = laid_out(load("pretrain", [*SMALL, "train.batch_size=64"]), "v5e:2x4")
    best = ranked(planned)
    times = [one.costs.serial for one in best]
    assert all(a <= b + 1e-4 for a, b in pairwise(times))
    assert all(one.peak <= planned.target.memory for one in best)
    run = apply(planned.job.run, best[-1].change)
    assert run is not None
    again = laid_out(run, planned.target.text)
    assert dict(again.job.mesh.shape) == dict(best[-1].planned.job.mesh.shape)


def test_meshes_cover_the_devices():
    arch = Architecture(
        vocab_size=64, d_model=64, d_ff=64, num_layers=1, num_heads=8, num_kv_heads=4, head_dim=8, max_position=8192
    )
    found = list(meshes(arch, 16, 64, 8, 8192))
    assert found
    assert all(math.prod(mesh.values()) == 16 and mesh["tensor"] <= 4 and mesh["context"] <= 2 for mesh in found)


@pytest.mark.plan
@pytest.mark.parametrize("target", ["cpu:1", "cpu:8"])
def test_planned_memory_is_what_a_step_takes(target):
    """Within 10 %: the growth of the process while it steps, and the arguments, against the compiler's peak."""
    given = [
        "model.source=10m", "data.train=unread", "data.max_length=128", "train.batch_size=8", "model.remat=none",
        "model.attention=reference", "objective.loss_chunk=1024",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    command = [sys.executable, "tests/train/planner/measure.py", target, *given]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["measured"] == pytest.approx(found["planned"], rel=0.1), found


def test_the_command_plans_for_a_cpu():
    """Compiled, as the target is at hand; a micro-batched step counts its gathers as often as they happen."""
    args = ["plan", "pretrain", *SMALL[:2], "data.max_length=32", "train.batch_size=16", "train.microbatches=2"]
    done = CliRunner().invoke(cli.app, [*args, "model.dtype=float32", "--target", "cpu:8", "--tokens", "1e6", "--json"])
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert plan["compiled"]
    assert plan["mesh"] == {"fsdp": 8}
    assert plan["memory"]["peak"] > sum(plan["memory"]["parts"][name] for name in ("params", "optimizer")) > 0
    assert set(plan["expected"]["serial"]) >= {"step_seconds", "mfu", "tokens_per_second", "hours", "chip_hours"}
    assert plan["excess"]["fsdp"] > 0.9


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["pretrain"], "--target"),
        (["--target", "v5e:4x4"], "RECIPE"),
        (["pretrain", "--target", "v5e:4x4", "--compute-budget", "1e21"], "--compute-budget"),
        (["pretrain", "--target", "v5e:5"], "--target is 'v5e:5'"),
        (["pretrain", "--target", "cpu:8", "--decode", "64"], "--decode is '64'"),
    ],
)
def test_bad_usage(args, words):
    done = CliRunner().invoke(cli.app, ["plan", *args])
    assert isinstance(done.exception, UsageError)
    assert words in str(done.exception)
