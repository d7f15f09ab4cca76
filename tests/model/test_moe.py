"""Mixture of experts: routers by their rules in plain NumPy, grouped products against the dense reference, losses."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from model.architecture import Architecture, Experts
from model.compute import Compute
from model.head import cross_entropy, head_of
from model.moe import Bank, apply_experts, balance_loss, clipped_glu, largest_load, route, seen, z_loss
from model.transformer import forward, init
from train.losses.lm import lm_loss

PLAIN = Experts(count=8, top_k=3, d_ff=5)
ROUTERS = {
    "softmax": PLAIN,
    "softmax, not normalised": Experts(8, 3, 5, normalise=False, scale=2.5),
    "top-k then softmax": Experts(8, 3, 5, scores="chosen"),
    "sigmoid with correction": Experts(8, 3, 5, scores="sigmoid", correction=True, scale=1.5),
    "best groups by two": Experts(8, 3, 5, scores="sigmoid", correction=True, groups=4, groups_kept=2),
    "best groups by one": Experts(8, 3, 5, normalise=False, groups=4, groups_kept=2, group_best=1),
}


def by_the_rules(logits: np.ndarray, how: Experts, bias: np.ndarray) -> dict[int, float]:
    """{expert: weight} of one token."""
    softmax = np.exp(logits) / np.exp(logits).sum()
    scores = {"softmax": softmax, "sigmoid": 1 / (1 + np.exp(-logits)), "chosen": logits}[how.scores]
    choice, candidates = scores + bias, list(range(how.count))
    if how.groups > 1:
        size = how.count // how.groups
        parts = [range(g * size, (g + 1) * size) for g in range(how.groups)]
        parts.sort(key=lambda part: -sum(sorted(choice[list(part)])[-how.group_best :]))
        candidates = [e for part in parts[: how.groups_kept] for e in part]
    chosen = sorted(candidates, key=lambda e: -choice[e])[: how.top_k]
    kept = np.exp(scores[chosen]) if how.scores == "chosen" else scores[chosen]
    if how.normalise or how.scores == "chosen":
        kept = kept / kept.sum()
    return dict(zip(chosen, how.scale * kept, strict=True))


@pytest.mark.parametrize("kind", ROUTERS)
def test_router(kind):
    how, rng = ROUTERS[kind], np.random.default_rng(0)
    logits, bias = rng.standard_normal((64, how.count)), how.correction * rng.standard_normal(how.count)
    with jax.enable_x64():
        chosen, weights = route(jnp.asarray(logits), how, jnp.asarray(bias) if how.correction else None)
    for row, experts, found in zip(logits, np.asarray(chosen), np.asarray(weights), strict=True):
        expected = by_the_rules(row, how, bias)
        assert dict(zip(experts.tolist(), found, strict=True)) == pytest.approx(expected, abs=1e-12)


def experts(dtype, bias: bool):
    """(rows, their weights, the bank) of 7 experts, one of which nobody wants."""
    rng = np.random.default_rng(1)
    make = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    biases = (make(7, 4), make(7, 4), make(7, 6)) if bias else None
    chosen = jnp.asarray([rng.permutation(6)[:3] for _ in range(20)])
    return make(20, 6), chosen, make(20, 3), Bank(make(7, 6, 4), make(7, 6, 4), make(7, 4, 6), biases)


@pytest.mark.parametrize("kind", ["silu", "clipped, biases"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])
def test_grouped_products_are_those_of_the_dense_reference(kind, dtype, tolerance):
    glu = partial(clipped_glu, alpha=1.7, limit=1.5) if "clipped" in kind else lambda gate, up: nn.silu(gate) * up
    with jax.enable_x64(dtype == "float64"):
        x, chosen, weights, bank = experts(jnp.dtype(dtype), "biases" in kind)

        def total(x, weights, bank, backend):
            out = apply_experts(x, chosen, weights, bank, glu, backend)
            return (out * jnp.sin(jnp.arange(out.size).reshape(out.shape))).sum(), out

        made = {}
        for backend in ("dense", "ragged", "blocks"):
            grad = jax.value_and_grad(partial(total, backend=backend), (0, 1, 2), has_aux=True)
            made[backend] = jax.tree.leaves(jax.jit(grad)(x, weights, bank))
    for backend in ("ragged", "blocks"):
        for ours, theirs in zip(made[backend], made["dense"], strict=True):
            far = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
            assert far < tolerance, (backend, far)
    loop = np.zeros((20, 6))
    gate, up, down = (np.asarray(w, np.float64) for w in (bank.gate, bank.up, bank.down))
    b = [np.asarray(w, np.float64) for w in bank.biases or (np.zeros((7, 4)), np.zeros((7, 4)), np.zeros((7, 6)))]
    for row, at in np.ndindex(20, 3):
        e = int(chosen[row, at])
        hidden = glu(jnp.asarray(x[row]) @ gate[e] + b[0][e], jnp.asarray(x[row]) @ up[e] + b[1][e])
        loop[row] += float(weights[row, at]) * (np.asarray(hidden, np.float64) @ down[e] + b[2][e])
    np.testing.assert_allclose(made["dense"][1], loop, atol=3e-5)


def test_few_tokens_take_no_more_blocks_than_choices():
    x, chosen, weights, bank = experts(jnp.float32, False)
    one = (x[:1], chosen[:1], weights[:1], bank, lambda gate, up: nn.silu(gate) * up)
    np.testing.assert_allclose(apply_experts(*one, "blocks"), apply_experts(*one, "dense"), rtol=2e-5)
    shapes = {v.aval.shape for e in jax.make_jaxpr(partial(apply_experts, glu=one[4], backend="blocks"))(*one[:4]).eqns
              for v in e.outvars}  # fmt: skip
    assert (3, 6, 4) in shapes  # three gathered experts
    assert (7, 1, 4) not in shapes


def test_an_unknown_backend_is_refused():
    x, chosen, weights, bank = experts(jnp.float32, False)
    with pytest.raises(ValueError, match="'sparse' is unknown; allowed: auto, ragged, blocks, dense"):
        apply_experts(x, chosen, weights, bank, lambda gate, up: gate * up, "sparse")


def test_losses_of_the_router():
    even = jnp.zeros((8, 4))
    chosen = jnp.asarray([[i % 4, (i + 1) % 4] for i in range(8)])
    layer = lambda *x: jax.tree.map(lambda x: x[None], seen(*x))  # noqa: E731
    made = layer(even, chosen, None)
    assert float(balance_loss(made)) == pytest.approx(2)  # top_k where all is even
    assert float(z_loss(made)) == pytest.approx(np.log(4) ** 2)
    assert float(largest_load(made)) == pytest.approx(1 / 4)
    # padding does not count, whatever it chose
    rng = np.random.default_rng(0)
    logits, real = jnp.asarray(rng.standard_normal((8, 4)), jnp.float32), jnp.arange(8) < 5
    chosen = jax.lax.top_k(logits, 2)[1]
    some, few = layer(logits, chosen, real), layer(logits[:5], chosen[:5], None)
    for loss in (balance_loss, z_loss, largest_load):
        assert float(loss(some)) == pytest.approx(float(loss(few)), rel=1e-6)
    none = layer(logits, chosen, real & False)
    assert float(balance_loss(none)) == float(z_loss(none)) == float(largest_load(none)) == 0


ARCH = Architecture(
    vocab_size=31, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=24, max_position=32,
    experts=Experts(4, 2, 12, shared_d_ff=8, shared_gate=True, scores="sigmoid", correction=True),
)  # fmt: skip


def test_the_whole_model_is_the_same_by_either_backend_and_router_losses_add_up():
    with jax.enable_x64():
        params = init(ARCH, jax.random.key(0), jnp.float64)
        tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, 31)
        rows = {"tokens": tokens, "positions": jnp.arange(8)[None] + 0 * tokens, "segments": jnp.ones_like(tokens)}
        batch = {**rows, "targets": jnp.roll(tokens, -1, 1), "weights": jnp.ones((2, 8))}
        norms = {"tokens": jnp.asarray(16.0)}

        def loss(params, compute):
            return lm_loss(params, batch, norms, arch=ARCH, compute=compute, router=(0.3, 0.1))

        computes = [Compute(jnp.float64, experts="dense"), Compute(jnp.float64, remat="full", experts="ragged")]
        made = [jax.jit(jax.value_and_grad(partial(loss, compute=c), has_aux=True))(params) for c in computes]
        hidden = forward(ARCH, computes[0], params, **rows)
        plain, _ = cross_entropy(hidden, head_of(ARCH, params), batch["targets"], batch["weights"])
    for ours, theirs in zip(*map(jax.tree.leaves, made), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    (total, sums), grads = made[0]
    mean = {name: float(value / weight) for name, (value, weight) in sums.items()}
    assert mean["loss"] == pytest.approx(float(plain) / 16)
    assert float(total) == pytest.approx(mean["loss"] + 0.3 * mean["aux_loss"] + 0.1 * mean["router_z_loss"])
    assert 0.25 <= mean["expert_load/max"] <= 0.5
    assert np.abs(grads["layers"]["mlp"]["correction"]).max() == 0
    assert np.abs(grads["layers"]["mlp"]["router"]["weight"]).max() > 0
    assert set(grads) == {"embed", "layers", "norm", "head"}
