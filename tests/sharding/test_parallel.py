"""Every axis of the mesh, alone and in pairs: loss and gradients are those of one device, and the compiled step has the
collectives that theory asks for and no others."""

import re
from collections import Counter
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from model import lora
from model.architecture import Architecture, Experts, Latent
from model.compute import Compute
from model.exchange import by_exchange
from model.head import Head, token_logprobs_and
from model.transformer import init, nest
from model.tree import flatten
from sharding.mesh import make_mesh
from sharding.place import place_batch
from sharding.rules import DEFAULT, spec
from train.losses.lm import lm_loss

T, ROWS = 32, 8
DENSE = Architecture(64, 16, 2, 8, 4, 4, 32, 64)
ARCHS = {
    "dense": DENSE,
    "moe": Architecture(
        64, 16, 2, 8, 4, 4, 32, 64, tie_embeddings=True, experts=Experts(8, 2, 8, shared_d_ff=8, aux_loss_coef=0.2)
    ),
}
ARCHS["latent"] = replace(ARCHS["moe"], num_layers=3, dense_layers=1, num_kv_heads=8, latent=Latent(4, 2, 4, q_rank=8))
ARCHS["biased"] = replace(ARCHS["moe"], experts=Experts(8, 2, 8, bias=True, router_bias=True, correction=True))
PAIRS = [{"data": 2, "fsdp": 4}, {"fsdp": 4, "tensor": 2}, {"tensor": 2, "context": 4}, {"expert": 4, "data": 2}]
ALONE = [{"data": 8}, {"fsdp": 8}, {"tensor": 4}, {"context": 8}, {"expert": 8}]
MORE = [{"fsdp": 2, "expert": 2, "tensor": 2}, {"expert": 4, "context": 2}, {"data": 2, "context": 2, "tensor": 2}]


def batch(rows: int = ROWS) -> dict[str, np.ndarray]:
    """Packed rows of two to three texts and padding, losses on an uneven part of them."""
    rng = np.random.default_rng(0)
    segments, positions = np.zeros((2, rows, T), np.int32)
    for row in range(rows):
        ends = np.sort(rng.choice(np.arange(2, T + 1), 3, replace=False))
        for number, (a, b) in enumerate(zip([0, *ends], ends, strict=False), 1):
            segments[row, a:b], positions[row, a:b] = number, np.arange(b - a)
    tokens, targets = rng.integers(0, 64, (2, rows, T)).astype(np.int32)
    weights = (segments > 0) * (rng.random((rows, T)) < np.linspace(0.1, 0.9, rows)[:, None])
    return {"tokens": tokens, "targets": targets, "positions": positions, "segments": segments,
            "weights": weights.astype(np.float32)}  # fmt: skip


def weights(arch: Architecture, dtype: str) -> dict[str, np.ndarray]:
    shapes, rng = flatten(jax.eval_shape(partial(init, arch), jax.random.key(0))), np.random.default_rng(1)
    return {path: rng.normal(float("norm" in path), 0.2, x.shape).astype(dtype) for path, x in shapes.items()}


def program(arch: Architecture, mesh, dtype: str, attention: str = "auto", remat: str = "none", experts: str = "auto"):
    """(jitted loss and gradients, their arguments) on a mesh, which must be in context."""
    where = lora.sharding_of(arch, mesh, DEFAULT)
    flat = {path: jax.device_put(x, where(path, x.shape)) for path, x in weights(arch, dtype).items()}
    compute = Compute(jnp.dtype(dtype), attention, remat, experts=experts)
    norms = {"tokens": jnp.asarray(100.0, dtype)}

    def loss(params, rows):
        return lm_loss(params, rows, norms, arch=arch, compute=compute, chunk=64, z_loss=1e-2, router=(0.2, 1e-2))[0]

    shardings = nest({path: x.sharding for path, x in flat.items()})
    step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))
    return step, (nest(flat), place_batch(batch(), mesh, DEFAULT))


KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"


def collectives(text: str) -> dict[str, int]:
    """{kind: how many arrays} of a compiled program, a loop's once: not statistics (less than 64 numbers), of which
    versions of XLA share what they will, nor those among one device."""
    found: Counter[str] = Counter()
    for shapes, kind, rest in re.findall(rf"= (.+?) ({KINDS})(?:-start)?\((.*)", text):
        if "replica_groups={{0},{1}" not in rest:
            sizes = [np.prod([int(n) for n in dims.split(",") if n]) for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)]
            found[kind] += sum(bool(size >= 64) for size in sizes)
    return dict(sorted(found.items()))


def made(arch: Architecture, shape: dict[str, int], dtype: str, **how: str):
    """({path: gradient}, the loss among them; collectives) on a mesh of as many devices as its axes need."""
    mesh = make_mesh(shape, jax.devices()[: int(np.prod(list(shape.values())))])
    with jax.set_mesh(mesh):
        step, arguments = program(arch, mesh, dtype, **how)
        compiled = step.lower(*arguments).compile()
        loss, grads = compiled(*arguments)
    numbers = {"loss": np.asarray(loss), **{path: np.asarray(g) for path, g in flatten(grads).items()}}
    return numbers, collectives(str(compiled.as_text()))


@cache
def alone(kind: str, dtype: str) -> dict[str, np.ndarray]:
    """The same on one device."""
    return made(ARCHS[kind], {"data": 1}, dtype, attention="reference")[0]


def far(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """The largest of norm of the difference / norm (of a weight without a gradient: 1)."""
    assert ours.keys() == theirs.keys()
    return float(np.max([np.linalg.norm(ours[path] - x) / (np.linalg.norm(x) or 1) for path, x in theirs.items()]))


def name(shape: dict[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in shape.items())


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{"expert": 4, "data": 2}, {"expert": 4, "tensor": 2}], ids=name)
def test_tokens_sent_to_the_devices_of_their_experts(shape, monkeypatch):
    """Where experts are on more devices than a token has: as on accelerators, with a stand-in for their collective."""
    sent = []
    monkeypatch.setattr("model.exchange.PLATFORMS", ("cpu",))
    monkeypatch.setattr("model.moe.by_exchange", lambda *args: sent.append(1) or by_exchange(*args))
    with jax.enable_x64():
        numbers, _ = made(ARCHS["moe"], shape, "float64")
        assert far(numbers, alone("moe", "float64")) < 1e-9
    assert sent


# Of large arrays: all-gathers, reduce-scatters, permutes, and all-reduces at most. A change here wants a reason.
# fsdp gathers 7 weights of a layer twice, embedding and head once; tensor gathers the stream twice each way in a layer
# and twice outside; a ring sends k, v and columns of ids, and dk and dv behind them. On a CPU the partitioner reduces
# the gradients of weights and then cuts them, where others scatter them.
COLLECTIVES = {
    ("dense", "data=2 x fsdp=4"): (16, 2, 0, 16),
    ("dense", "fsdp=4 x tensor=2"): (22, 3, 0, 18),
    ("dense", "tensor=2 x context=4"): (6, 1, 16, 23),
    ("dense", "expert=4 x data=2"): (16, 2, 0, 16),
    ("moe", "data=2 x fsdp=4"): (20, 5, 0, 19),
    ("moe", "fsdp=4 x tensor=2"): (30, 9, 0, 24),
    ("moe", "tensor=2 x context=4"): (10, 4, 16, 29),
    ("moe", "expert=4 x data=2"): (21, 5, 0, 19),
}


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("shape", PAIRS, ids=name)
def test_pairs_of_axes_are_one_device(kind, shape):
    numbers, found = made(ARCHS[kind], shape, "float32")
    assert far(numbers, alone(kind, "float32")) < 1e-5
    gathers, scatters, permutes, reduces = COLLECTIVES[kind, name(shape)]
    assert found.pop("all-reduce") <= reduces
    expected = {"all-gather": gathers, "collective-permute": permutes, "reduce-scatter": scatters}
    assert found == {collective: count for collective, count in expected.items() if count}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        *((kind, shape) for kind in ("dense", "moe") for shape in ALONE),
        *((kind, shape) for kind in ("biased", "latent") for shape in MORE),
    ],
    ids=lambda part: part if isinstance(part, str) else name(part),
)
def test_any_axes_are_one_device_to_the_last_digits(kind, shape):
    with jax.enable_x64():
        experts = "ragged" if kind == "biased" else "auto"
        numbers, _ = made(ARCHS[kind], shape, "float64", remat="dots", experts=experts)
        assert far(numbers, alone(kind, "float64")) < 1e-9


@pytest.mark.parametrize("statistic", ["squares", "entropy"])
def test_log_probabilities_by_parts_of_the_vocabulary(statistic):
    """With a softmax's statistic and all gradients, where few positions count: in some rows, and some devices, none."""
    learn = statistic == "entropy"

    def value(x, w, y, where, g):
        head = Head(w, learn, 0.7, 3.0)  # tied or not
        logp, number = token_logprobs_and(statistic, x, head, y, 8, 0.9, where, learn)
        return (g * (logp + 0.3 * number)).sum(), (logp, number)

    found = []
    for shape in ({"data": 1}, {"fsdp": 2, "context": 2, "tensor": 2}):
        mesh = make_mesh(shape, jax.devices()[: 8 if len(shape) > 1 else 1])
        with jax.enable_x64(), jax.set_mesh(mesh):
            rng = np.random.default_rng(2)
            x, w, g = (rng.standard_normal(size) for size in ((4, 16, 8), (24, 8) if learn else (8, 24), (4, 16)))
            where, y = (rng.random((4, 16)) < 0.3) & (np.arange(4) != 1)[:, None], rng.integers(0, 24, (4, 16))
            table = spec(DEFAULT, ("vocab", "embed") if learn else ("embed", "vocab"))
            args = jax.device_put(x), jax.device_put(w, NamedSharding(mesh, table)), *map(jnp.asarray, (y, where, g))
            made = jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))(*args)
            found.append([np.asarray(part) for part in jax.tree.leaves(made)])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
