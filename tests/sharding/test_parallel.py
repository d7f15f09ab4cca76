"""Every axis of the mesh, alone and in pairs: loss and gradients are those of one device, and the compiled step has the
collectives that theory asks for and no others."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from model import lora
from model.architecture import Architecture, Experts
from model.compute import Compute
from model.transformer import init, nest
from model.tree import flatten
from sharding.mesh import make_mesh
from sharding.place import place_batch
from sharding.rules import DEFAULT
from train.losses.lm import lm_loss

T, ROWS = 32, 8
DENSE = Architecture(64, 16, 2, 8, 4, 4, 32, 64)
ARCHS = {
    "dense": DENSE,
    "moe": Architecture(
        64, 16, 2, 8, 4, 4, 32, 64, tie_embeddings=True, experts=Experts(8, 2, 8, shared_d_ff=8, aux_loss_coef=0.2)
    ),
}
PAIRS = [{"data": 2, "fsdp": 4}, {"fsdp": 4, "tensor": 2}, {"tensor": 2, "context": 4}, {"expert": 4, "data": 2}]
ALONE = [{"data": 8}, {"fsdp": 8}, {"tensor": 4}, {"context": 8}, {"expert": 8}]
# what the brief of a mesh does not name: three axes, and experts with each other axis
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


def program(arch: Architecture, mesh, dtype: str, attention: str = "auto", remat: str = "none"):
    """(jitted loss and gradients, their arguments) on a mesh, which must be in context."""
    where = lora.sharding_of(arch, mesh, DEFAULT)
    flat = {path: jax.device_put(x, where(path, x.shape)) for path, x in weights(arch, dtype).items()}
    compute = Compute(jnp.dtype(dtype), attention, remat)
    norms = {"tokens": jnp.asarray(100.0, dtype)}

    def loss(params, rows):
        return lm_loss(params, rows, norms, arch=arch, compute=compute, chunk=64, z_loss=1e-2, router=(0.2, 1e-2))[0]

    shardings = nest({path: x.sharding for path, x in flat.items()})
    step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))
    return step, (nest(flat), place_batch(batch(), mesh, DEFAULT))


def made(arch: Architecture, shape: dict[str, int], dtype: str, attention: str = "auto", remat: str = "none"):
    """{path: gradient}, and the loss among them, on a mesh of as many devices as its axes need."""
    mesh = make_mesh(shape, jax.devices()[: int(np.prod(list(shape.values())))])
    with jax.set_mesh(mesh):
        step, arguments = program(arch, mesh, dtype, attention, remat)
        loss, grads = step(*arguments)
    return {"loss": np.asarray(loss), **{path: np.asarray(g) for path, g in flatten(grads).items()}}


@cache
def alone(kind: str, dtype: str) -> dict[str, np.ndarray]:
    """The same on one device."""
    return made(ARCHS[kind], {"data": 1}, dtype, "reference")


def far(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, float]:
    """{path: norm of the difference / norm}."""
    assert ours.keys() == theirs.keys()
    return {path: float(np.linalg.norm(ours[path] - x) / np.linalg.norm(x)) for path, x in theirs.items()}
