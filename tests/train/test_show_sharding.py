"""--show-sharding: the table's bytes are those of a real job, weights that lie whole are told of."""

import re

import jax
import jax.numpy as jnp
import pytest

from configs.errors import UsageError
from model.tree import flatten
from train.setup import abstract_params, job_of, make_job, prepare
from train.show_sharding import giants, rows_of, show_sharding

MESHES = {"full": ("mesh.stage=2", "mesh.fsdp=2", "mesh.tensor=2"), "lora": ("mesh=auto", "tune.method=lora")}


@pytest.mark.parametrize("method", MESHES)
def test_bytes_are_those_of_the_job(make_run, method):
    run = make_run(*MESHES[method])
    source, mesh, rules, compute = prepare(run)
    with jax.set_mesh(mesh):
        job, state = make_job(run, source, mesh, rules, compute, 3)
        shapes = abstract_params(source.arch, mesh, rules, jnp.dtype(run.model.param_dtype))
        rows = list(rows_of(*job_of(run, source, mesh, rules, compute, 3, shapes)))
    first = lambda x: x.addressable_shards[0].data.nbytes  # noqa: E731
    real = {path: first(x) for path, x in flatten(job.params(state)).items()}
    assert {row.path: row.bytes for row in rows} == real
    moments = [first(x) for x in jax.tree.leaves(state.opt) if x.ndim]
    assert sum(row.state for row in rows) == sum(moments)
    assert all(len(row.axes) == len(row.shape) == len(row.split) for row in rows)


def test_what_lies_whole_is_told(make_run, capsys):
    show_sharding(make_run("mesh.tensor=2", "mesh.fsdp=4", "mesh.rules={vocab: null, vocab_embed: null}"))
    told = capsys.readouterr().out
    (embed,) = [line for line in told.splitlines() if line.startswith(" embed/weight")]
    assert "vocab vocab_embed" in embed
    assert "WHOLE on every device" in embed
    assert re.search(r"embed/weight: \d+\.\d% of the model lies whole on all 8 devices; fsdp x tensor could", told)
    (up,) = [line for line in told.splitlines() if line.startswith(" layers/mlp/up/weight")]
    assert "mlp: tensor" in up
    assert "WHOLE" not in up


def test_the_mesh_is_checked_first(make_run):
    with pytest.raises(UsageError, match=r"mesh\.stage=8 does not divide the model's 2 layers; it may be 2"):
        show_sharding(make_run("mesh.stage=8", "mesh.fsdp=1"))
    assert giants([], 8) == []
