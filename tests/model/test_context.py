"""Attention over a mesh, by itself: ring, ulysses and the TPU's kernel against the reference, values and gradients."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.errors import UsageError
from model.architecture import Architecture
from model.attention import attend
from model.compute import Compute
from model.context import attend_over, check_rows
from model.mask import self_attention
from sharding.mesh import make_mesh
from sharding.rules import make_rules


def rows(T, N, K, H, V, dtype, segments=True):
    """q, k, v, what the output is weighed by, positions and segments of three packed texts and padding."""
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    ends = np.array([[T // 4, T // 2 + 3, T - 2], [3, T // 3, T]])
    at = np.arange(T)
    segment = 1 + (at[None, :, None] >= ends[:, None]).sum(-1)
    starts = np.concatenate([np.zeros((2, 1), int), ends], 1)
    positions = at[None] - np.take_along_axis(starts, segment - 1, 1)
    segment[segment == 4] = 0
    weight = make(2, T, N, V) * (segment > 0)[..., None, None]
    return make(2, T, N, H), make(2, T, K, H), make(2, T, K, V), weight, jnp.asarray(positions), jnp.asarray(segment)


def total(q, k, v, sinks, weight, fn):
    return (fn(q, k, v, sinks) * weight).sum()


def compare(fn, plain, given, weight, tolerance):
    """Values and gradients by all that are given."""
    args = tuple(i for i, x in enumerate(given) if x is not None)
    ours, theirs = (jax.jit(jax.value_and_grad(partial(total, weight=weight, fn=f), args))(*given) for f in (fn, plain))
    for found, wanted in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.linalg.norm(found - wanted) < tolerance * np.linalg.norm(wanted)


CASES = {
    "plain": {},
    "windows, soft cap, sinks": {"window": 7, "softcap": 1.5, "sinks": True},
    "branches, values of another width": {"branches": True, "V": 6, "K": 8},
    "kv heads on every device": {"K": 2, "rules": {"kv_heads": None}},
}


@pytest.mark.parametrize(("backend", "chunk"), [("ring", 4), ("ulysses", 512), ("chunked", 4)])
@pytest.mark.parametrize("case", CASES)
def test_rows_split_over_devices(backend, case, chunk, monkeypatch):
    monkeypatch.setattr("model.blockwise.BLOCKS", {"cpu": (256, chunk)})
    for module in ("blockwise", "context"):
        monkeypatch.setattr(f"model.{module}.WHOLE", chunk)
    how, T, N = CASES[case], 32, 8
    mesh = make_mesh({"fsdp": 2, "tensor": 4} if backend == "chunked" else {"data": 2, "context": 2, "tensor": 2})
    with jax.enable_x64(), jax.set_mesh(mesh):
        q, k, v, weight, positions, segments = rows(T, N, how.get("K", 4), 4, how.get("V", 4), jnp.float64)
        branches = jnp.asarray(np.arange(T)[None] % 3 + np.zeros((2, 1), int)) if how.get("branches") else None
        mask = self_attention(positions, segments, how.get("window"), branches)
        sinks = jnp.linspace(-1, 1, N) if how.get("sinks") else None
        compute = Compute(jnp.float64, backend, rules=make_rules(overrides=how.get("rules")))
        ours = lambda q, k, v, s: attend_over(q, k, v, mask, compute, how.get("softcap"), s)  # noqa: E731
        plain = lambda q, k, v, s: attend(q, k, v, mask, "reference", how.get("softcap"), s)  # noqa: E731
        compare(ours, plain, (q, k, v, sinks), weight, 1e-9)


@pytest.mark.parametrize("window", [None, 100])
def test_the_kernel_of_tpus_interpreted(window):
    T = 256
    mesh = make_mesh({"tensor": 2}, jax.devices()[:2])
    with jax.set_mesh(mesh):
        q, k, v, weight, positions, segments = rows(T, 4, 2, 8, 8, jnp.float32)
        mask = self_attention(positions, segments, window and jnp.asarray(window))
        known = replace(mask, windows=(100, 2**31 - 1) if window else ())  # as of a layer scan
        ours = lambda q, k, v, s: attend_over(q, k, v, known, Compute(attention="splash"), 5.0)  # noqa: E731
        plain = lambda q, k, v, s: attend(q, k, v, mask, "reference", 5.0)  # noqa: E731
        compare(ours, plain, (q, k, v, None), weight, 1e-5)


@pytest.mark.parametrize(
    ("backend", "T", "mesh", "more", "message"),
    [
        ("ring", 36, {"context": 8}, {}, "'ring' wants rows of a multiple of 2 x mesh.context = 16 tokens, not 36"),
        ("ulysses", 32, {"context": 8}, {}, "'ulysses' wants heads, and kv heads, that divide over mesh.tensor x"),
        ("splash", 128, {"context": 8}, {}, "'splash' has whole rows only, and mesh.context is 8: ring and ulysses"),
        ("splash", 36, {}, {}, "'splash' wants rows that attend to themselves, of a multiple of 128 tokens, not 36"),
        ("splash", 128, {}, {"window": jnp.asarray(3)}, "'splash' wants windows that are known when it is compiled"),
        ("splash", 128, {}, {"branches": jnp.zeros((2, 128), int)}, "'splash' has causal attention only, without"),
    ],
)
def test_what_a_backend_cannot_serve_is_refused(backend, T, mesh, more, message):
    with jax.set_mesh(make_mesh({**mesh, "data": 1}, jax.devices()[: mesh.get("context", 1)])):
        q, k, v, _, positions, segments = rows(T, 4, 2, 4, 4, jnp.float32)
        with pytest.raises(UsageError, match=f"model.attention: {message}"):
            attend_over(q, k, v, self_attention(positions, segments, **more), Compute(attention=backend))


@pytest.mark.parametrize(
    ("backend", "T", "mesh", "message"),
    [
        ("auto", 36, {"context": 8}, "data.max_length 36 is not a multiple of 2 x mesh.context = 16"),
        (
            "splash",
            64,
            {},
            "model.attention: 'splash' wants whole rows of a multiple of 128 tokens: data.max",
        ),
        ("splash", 128, {"context": 2}, "data.max_length is 128, mesh.context 2"),
        ("ulysses", 64, {"context": 2, "tensor": 2}, "mesh.tensor x mesh.context = 4, and the model has 2 kv heads"),
    ],
)
def test_refused_before_anything_is_compiled(backend, T, mesh, message):
    arch = Architecture(32, 16, 1, 4, 2, 4, 24, 64)
    devices = jax.devices()[: int(np.prod([*mesh.values()]))]
    with jax.set_mesh(make_mesh(mesh, devices)), pytest.raises(UsageError, match=message):
        check_rows(arch, Compute(attention=backend), T)
