"""A job of shapes is the job: state, batch and step as training has them, on the same mesh."""

import jax
import pytest

from configs.errors import UsageError
from configs.load import load
from tests.train.tiny import make_chats, make_model, overrides, write_rows
from train.feed import open_feed
from train.planner.abstract import lower, make_abstract
from train.planner.targets import parse_target
from train.setup import make_job, prepare

TARGET = parse_target("cpu:8")
PAIRS = [{"prompt": "red", "chosen": f"blue {i}", "rejected": "green"} for i in range(16)]
LABELLED = [{"prompt": "red", "completion": f"blue {i}", "label": i % 2 == 0} for i in range(16)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("plan") / "model")


@pytest.mark.parametrize(
    ("recipe", "rows", "changes"),
    [
        ("sft", make_chats(16), ("mesh.tensor=2", "optim.name=muon", "train.microbatches=2", "train.on_bad_step=skip")),
        ("dpo", PAIRS, ("tune.method=lora", "mesh.fsdp=2", "mesh.data=4", "objective.reference=adapterless")),
        ("dpo", PAIRS, ("optim.state_dtype=bfloat16", "tune.trainable=['*attn*']")),
        ("kto", LABELLED, ()),
    ],
)
def test_the_shapes_of_a_real_job(tmp_path, model, recipe, rows, changes):
    run = load(recipe, overrides(tmp_path / "run", model, write_rows(tmp_path / "rows.jsonl", rows), *changes))
    planned = make_abstract(run, TARGET)
    source, mesh, rules, compute = prepare(run)
    feed = open_feed(run, source, mesh, rules)
    with jax.set_mesh(mesh):
        job, state = make_job(run, source, mesh, rules, compute, 12, feed.portion)
        if job.recipe.reference is not None:
            feed.begin(job, state)
        batch, _ = feed.next(job, state, 1, print)
    feed.close()
    assert planned.job.compute == job.compute
    for mine, real in ((planned.state, state), (planned.job.frozen, job.frozen)):
        assert jax.tree.structure(mine) == jax.tree.structure(real)
        for x, y in zip(jax.tree.leaves(mine), jax.tree.leaves(real), strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    assert {name: (x.shape, x.dtype) for name, x in planned.batch.items()} == {
        name: (x.shape, x.dtype) for name, x in batch.items()
    }


@pytest.mark.parametrize("changes", [(), ("objective.num_iterations=2", "objective.beta=0.1", "tune.method=lora")])
def test_the_step_of_a_policy_has_all_its_columns(tmp_path, model, changes):
    given = ("sample.max_new_tokens=16", "sample.num_generations=2", "sample.batch_size=8", "sample.reward=exact")
    run = load("grpo", overrides(tmp_path, model, tmp_path, *given, *changes))
    assert lower(make_abstract(run, TARGET)).as_text()


def test_a_preset_needs_no_tokenizer_and_no_data():
    planned = make_abstract(load("pretrain_8b_pod", ["data.train=unread"]), TARGET, jax.devices())
    assert planned.job.arch.vocab_size == 128256
    assert "vocabulary" in planned.assumed[0]


def test_what_does_not_divide_is_refused():
    with pytest.raises(UsageError, match=r"mesh\.rules\.kv_heads"):
        make_abstract(
            load("pretrain_8b_pod", ["data.train=unread", "mesh.tensor=3", "mesh.fsdp=2"]), TARGET, jax.devices()[:6]
        )
