"""Pipelines: whatever the stages, rounds and other axes, loss and gradients are those of one device."""

import json
import re
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs.errors import UsageError
from model import lora
from model.architecture import Architecture, Experts, Latent
from model.compute import Compute
from model.pipeline import Schedule, check_schedule, check_stages, schedule_of
from model.transformer import declare, forward, init, nest, read
from model.tree import flatten, join, split
from sharding.mesh import make_mesh
from sharding.rules import DEFAULT
from train.losses.lm import lm_loss

T, ROWS = 16, 16
DENSE = Architecture(64, 16, 8, 4, 2, 4, 32, 64)
ARCHS = {"dense": DENSE, "moe": replace(DENSE, experts=Experts(4, 2, 8, shared_d_ff=8, aux_loss_coef=0.2))}
# as DeepSeek's: dense layers before the mixture's, attention by a short vector
LATENT = Latent(rank=4, rope_dim=2, value_dim=4, q_rank=6)
ARCHS["latent"] = replace(ARCHS["moe"], num_layers=10, dense_layers=2, num_kv_heads=4, latent=LATENT)


def batch() -> dict[str, np.ndarray]:
    """Packed rows of two texts and padding, losses on an uneven part of them."""
    rng, at = np.random.default_rng(0), np.arange(T)[None]
    first, end = rng.integers(2, 8, (ROWS, 1)), rng.integers(9, T + 1, (ROWS, 1))
    segments = np.where(at < end, 1 + (at >= first), 0)
    tokens, targets = rng.integers(0, 64, (2, ROWS, T))
    weights = (segments > 0) * (rng.random((ROWS, T)) < np.linspace(0.1, 0.9, ROWS)[:, None])
    whole = {"tokens": tokens, "targets": targets, "positions": np.where(at < first, at, at - first)}
    whole |= {"segments": segments, "branches": np.clip(at - first - 1, 0, 2) * (segments == 2)}
    return {**{name: x.astype(np.int32) for name, x in whole.items()}, "weights": weights.astype(np.float64)}


def loss_of(arch: Architecture, compute: Compute, trained, frozen, rows):
    norms = {"tokens": jnp.asarray(100.0, compute.dtype)}
    return lm_loss(join(trained, frozen), rows, norms, arch=arch, compute=compute, chunk=64, router=(0.2, 1e-2))


def branched(arch: Architecture, compute: Compute, trained, frozen, rows):
    at = (rows[name] for name in ("tokens", "positions", "segments", "branches"))
    hidden = forward(arch, compute, join(trained, frozen), *at)
    return (hidden * jnp.sin(jnp.arange(hidden.size).reshape(hidden.shape)) * rows["weights"][:, :, None]).sum(), {}


def made(kind: str, shape: dict[str, int], adapters: bool = False, loss=loss_of, **how):
    """(loss, what else it tells, gradients, the program) in float64, on as many devices as the mesh needs."""
    arch, compute = ARCHS[kind], Compute(jnp.float64, "auto", "full", **how)
    rng, declared = np.random.default_rng(1), declare(arch)
    mesh = make_mesh(shape, jax.devices()[: int(np.prod(list(shape.values())))])
    with jax.enable_x64(), jax.set_mesh(mesh):
        where = lora.sharding_of(arch, mesh, DEFAULT)
        draw = lambda path, shape: jax.device_put(rng.normal(float("norm" in path), 0.2, shape), where(path, shape))  # noqa: E731
        params, trained = nest({path: draw(path, d.shape) for path, d in declared.items()}), lambda path: True
        if adapters:
            pairs = lora.adapter_shapes(declared, lora.target_paths(list(declared), "all-linear"), 2)
            pair = lambda path, pair: tuple(draw(f"{path}/{x}", d.shape) for x, d in zip("ab", pair, strict=True))  # noqa: E731
            some = {path: pair(path, shapes) for path, shapes in pairs.items()}
            params, trained = lora.attach(params, some, 0.5), lambda path: path.endswith(("/a", "/b"))
        place = NamedSharding(mesh, P(DEFAULT.axes("batch"), "context"))
        rows = {name: jax.device_put(x, place) for name, x in batch().items()}
        step = jax.jit(jax.value_and_grad(partial(loss, arch, compute), has_aux=True))
        program = step.lower(*(arguments := (*split(params, trained), rows))).compile()
        (total, told), grads = jax.device_get(program(*arguments))
    return total, jax.tree.leaves(told), flatten(grads), str(program.as_text())


@cache
def alone(kind: str, *more):
    """The same on one device."""
    return made(kind, {}, *more)


def same(ours, theirs) -> None:
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-9)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-9)
    assert ours[2].keys() == theirs[2].keys()
    for path, g in theirs[2].items():
        assert np.linalg.norm(ours[2][path] - g) < 1e-9 * np.linalg.norm(g), path


slow = lambda *case: pytest.param(*case, marks=pytest.mark.slow)  # noqa: E731


@pytest.mark.parametrize(
    ("kind", "shape", "repeats", "microbatches"),
    [
        ("dense", {"stage": 2, "data": 2, "fsdp": 2}, 1, None),
        ("moe", {"stage": 2}, 2, None),
        ("latent", {"stage": 2, "fsdp": 2}, 1, None),
        slow("latent", {"stage": 4, "tensor": 2}, 2, None),
        slow("dense", {"stage": 4}, 2, 8),
        slow("moe", {"stage": 2, "tensor": 2}, 4, None),
        slow("dense", {"stage": 2, "tensor": 2, "context": 2}, 2, 4),
        slow("moe", {"stage": 2, "data": 2, "fsdp": 2}, 1, None),
        slow("moe", {"stage": 2, "expert": 2, "context": 2}, 2, None),
    ],
)
def test_loss_and_gradients_are_those_of_one_device(kind, shape, repeats, microbatches):
    how = {"pipeline_repeats": repeats, "pipeline_microbatches": microbatches}
    same(made(kind, shape, pipeline_gather="step" if "data" in shape else "tick", **how), alone(kind))


@pytest.mark.slow
def test_adapters_beside_frozen_weights_and_branches():
    ours = made("dense", {"stage": 2}, True, branched, pipeline_repeats=2)
    same(ours, alone("dense", True, branched))
    assert all(path.endswith(("/a", "/b")) for path in ours[2])
    # by theory: the embedding, the stream and its gradient once each, and the four columns' two masks; nothing else
    assert len(re.findall(r" all-gather(?:-start)?\(", ours[3])) <= 3 + 2 * 3
    assert not re.search(r" all-to-all(?:-start)?\(", ours[3])


def test_rows_that_do_not_divide_and_caches_go_layer_by_layer():
    """Scoring a few rows, and decoding, have no micro-batches: the same numbers all the same."""
    params = jax.jit(partial(init, DENSE))(jax.random.key(0))
    rows = {name: jnp.asarray(x[:3]) for name, x in batch().items()}

    def run(shape):
        with jax.set_mesh(make_mesh(shape, jax.devices()[: shape.get("stage", 1)])):
            columns = (rows["tokens"], rows["positions"], rows["segments"])
            return jax.device_get(
                jax.jit(lambda p: (forward(DENSE, Compute(), p, *columns), read(DENSE, Compute(), p, *columns[::2])))(
                    params
                )
            )

    for ours, theirs in zip(jax.tree.leaves(run({"stage": 4})), jax.tree.leaves(run({})), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_schedules():
    assert Schedule(4, 8).ticks == 11
    assert Schedule(4, 8).bubble == pytest.approx(3 / 11)
    assert Schedule(4, 8, 5).bubble == pytest.approx(3 / 43)
    assert schedule_of(4, 16) == Schedule(4, 8)
    assert schedule_of(4, 4) == Schedule(4, 4)
    assert schedule_of(4, 48, 16, 2) == Schedule(4, 16, 2)
    assert schedule_of(4, 6) is schedule_of(4, 16, 6) is schedule_of(4, 16, 32) is None


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: check_schedule(4, 24, 6), "mesh.pipeline_microbatches is 6, mesh.stage=4 and 24 rows a micro-batch"),
        (lambda: check_schedule(4, 24, 16), "multiples of mesh.stage that divide the rows: 4, 8, 12, 24"),
        (lambda: check_stages(DENSE, 3, 1), "mesh.stage=3 does not divide the model's 8 layers; it may be 2, 4, 8"),
        (lambda: check_stages(DENSE, 4, 4), "mesh.stage=4 x mesh.pipeline_repeats=4 does not divide the model's 8"),
        (lambda: check_stages(DENSE, 4, 4), "layers; it may be 2"),
        (
            lambda: check_stages(ARCHS["latent"], 3, 1),
            "divide the model's 8 layers behind the 2 dense ones; it may be 2, 4",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(act, message):
    with pytest.raises(UsageError) as raised:
        act()
    assert message in str(raised.value)


@pytest.mark.slow
def test_whole_runs_are_those_of_one_device(tmp_path, chats, tiny_model):
    """The command's way through all of it: micro-batches of the step, an evaluation, decoded samples, adapters."""
    from configs.load import load
    from tests.train import tiny
    from train.loop import train

    def losses(name, *more):
        some = (
            "train.steps=3",
            "train.batch_size=16",
            "train.microbatches=2",
            "train.eval_every=2",
            f"data.eval={chats}",
        )
        some += (f"log.samples={chats}", "log.sample_max_new_tokens=2", "tune.method=lora", "export.enabled=false")
        train(load("sft", tiny.overrides(tmp_path / name, tiny_model, chats, *some, *more)))
        told = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        answers = json.loads((tmp_path / name / "samples.json").read_text())
        return [row[key] for row in told for key in ("loss", "eval_loss") if key in row], answers

    ours, said = losses("stages", "mesh.stage=2", "mesh.fsdp=4")
    with tiny.one_device():
        theirs, expected = losses("one")
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert said == expected


@pytest.mark.slow
def test_preferences_are_learnt_as_on_one_device(tmp_path, tiny_model, monkeypatch):
    """Pairs as branches behind a prompt, adapters, the reference on the fly: through two stages."""
    from configs.load import load
    from tests.train import tiny
    from train.loop import train

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = tiny.WORDS
    pairs = tiny.write_rows(tmp_path / "pairs.jsonl", [
        {"prompt": [{"role": "user", "content": words[i % 17]}], "chosen": " ".join(words[: i % 4 + 1]),
         "rejected": f"zz {words[i % 7]}"}
        for i in range(40)
    ])  # fmt: skip
    more = ("data.max_length=64", "export.enabled=false", "train.batch_size=16", "train.steps=4", "tune.method=lora",
            "tune.r=4", "optim.weight_decay=0", "objective.reference=adapterless")  # fmt: skip

    def told(name, *mesh):
        train(load("dpo", tiny.overrides(tmp_path / name, tiny_model, pairs, *more, *mesh)))
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [[row[key] for key in ("loss", "grad_norm", "rewards/margins")] for row in rows]

    ours = told("stages", "mesh.stage=2", "mesh.data=2", "mesh.fsdp=2", "mesh.pipeline_microbatches=2")
    with tiny.one_device():
        theirs = told("one")
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
