"""The transformer's invariances: cached = uncached, packed = separate, backend = reference, chunked = whole."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.errors import UsageError
from model import blockwise
from model.architecture import Architecture, Experts, Latent, Rope
from model.attention import BACKENDS, attend
from model.cache import Cache, init_cache
from model.compute import REMAT, Compute
from model.families import architecture_from_hf, hf_config_from
from model.head import Head, cross_entropy, head_of, logits, token_logprobs, token_logprobs_and
from model.mask import Mask, dense, self_attention
from model.transformer import declare, init
from model.transformer import extend as eager_extend
from model.transformer import forward as eager_forward
from model.tree import count, flatten

ARCH = Architecture(97, 32, 3, 4, 2, 8, 48, 64, Rope(1e4), tie_embeddings=True)
VARIANTS = {
    "tied": ARCH,
    "untied": replace(ARCH, tie_embeddings=False),
    "biases": replace(ARCH, attention_bias=True, output_bias=True, mlp_bias=True),
    "qk_norm": replace(ARCH, qk_norm=True, activation="gelu_tanh"),
    "linear": replace(ARCH, rope=Rope(1e4, "linear", 4.0)),
    "llama3": replace(ARCH, rope=Rope(1e4, "llama3", 8.0, 1.0, 4.0, 32)),
    "gemma3": replace(
        ARCH, rope=Rope(1e6), qk_norm=True, norm_offset=1.0, post_norms=True, embed_scale=32**0.5,
        query_pre_attn_scalar=6.0, windows=(4, 4, 0), local_rope=Rope(1e2),
    ),
    "experts": replace(
        ARCH, dense_layers=1, experts=Experts(4, 2, 12, "sigmoid", correction=True, shared_d_ff=8, shared_gate=True)
    ),
    "clipped experts": replace(
        ARCH, sinks=True, windows=(4, 0, 4),
        experts=Experts(4, 2, 12, "chosen", router_bias=True, bias=True, glu=(2.0, 1.0)),
    ),
    "latent": replace(ARCH, num_kv_heads=4, latent=Latent(10, 4, 6, 12), attention_bias=True),
    "latent, q straight": replace(ARCH, num_kv_heads=4, latent=Latent(10, 4, 8), attention_multiplier=0.4),
}  # fmt: skip
SLOW = ("clipped experts", "latent, q straight")  # the others have most of it
EACH = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in VARIANTS]
COMPUTE = Compute(attention="reference")
# eager code would compile every operation by itself
forward = jax.jit(eager_forward, static_argnums=(0, 1))
extend = jax.jit(eager_extend, static_argnums=(0, 1))


def make(arch, seed=0):
    """Random weights, biases and norm scales included, so that none of them can be ignored unnoticed."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: init(arch, key), jax.random.key(seed))
    noise = lambda path, x: jnp.asarray(rng.normal(float("norm" in str(path)), 0.1, x.shape), x.dtype)  # noqa: E731
    return jax.tree_util.tree_map_with_path(noise, shapes)


def rows(lengths, T, seed=0):
    """Random tokens, one sequence per row, padded on the right."""
    rng = np.random.default_rng(seed)
    B = len(lengths)
    segments = (np.arange(T)[None] < np.array(lengths)[:, None]).astype(np.int32)
    tokens = rng.integers(0, 97, (B, T)).astype(np.int32)
    return jnp.asarray(tokens), jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T)), jnp.asarray(segments)


@pytest.mark.parametrize("name", EACH)
def test_every_declared_weight_matters(name):
    arch = VARIANTS[name]
    params, batch = make(arch), rows([12, 12], 12)
    head = lambda p: logits(forward(arch, COMPUTE, p, *batch), head_of(arch, p))  # noqa: E731
    grads = flatten(jax.jit(jax.grad(lambda p: (head(p) ** 2).sum()))(params))
    assert set(grads) == set(declare(arch))
    # a bias on k shifts all scores of a query alike: softmax does not see it without RoPE, a little with it; a router's
    # correction only chooses
    assert all(float(jnp.abs(g).max()) > 0 for path, g in grads.items() if not path.endswith("correction"))


@pytest.mark.parametrize("name", EACH)
def test_cached_equals_uncached(name):
    arch = VARIANTS[name]
    params = make(arch)
    tokens, positions, segments = rows([12, 9], 12)
    whole = forward(arch, COMPUTE, params, tokens, positions, segments)
    cache = init_cache(arch, 2, 14, jnp.float32)
    lengths = jnp.array([7, 5])
    first = (jnp.arange(7)[None] < lengths[:, None]).astype(jnp.int32)
    hidden, cache = extend(arch, COMPUTE, params, tokens[:, :7], first, cache)
    np.testing.assert_allclose(hidden[0], whole[0, :7], atol=2e-5)
    np.testing.assert_allclose(hidden[1, :5], whole[1, :5], atol=2e-5)
    for _ in range(4):  # each row goes on from its own length
        at = cache.length
        token = jnp.take_along_axis(tokens, at[:, None], 1)
        hidden, cache = extend(arch, COMPUTE, params, token, jnp.ones((2, 1), jnp.int32), cache)
        np.testing.assert_allclose(hidden[:, 0], whole[jnp.arange(2), at], atol=2e-5)
    assert cache.length.tolist() == [11, 9]


def test_packed_equals_separate():
    params = make(ARCH)
    tokens, positions, segments = rows([5, 7], 7)
    separate = forward(ARCH, COMPUTE, params, tokens, positions, segments)
    packed = jnp.concatenate([tokens[0, :5], tokens[1]])[None]
    where = jnp.concatenate([jnp.arange(5), jnp.arange(7)])[None]
    which = jnp.array([[1] * 5 + [2] * 7])
    together = forward(ARCH, COMPUTE, params, packed, where, which)
    np.testing.assert_allclose(together[0, :5], separate[0, :5], atol=1e-5)
    np.testing.assert_allclose(together[0, 5:], separate[1], atol=1e-5)


def test_branches_equal_separate_rows():
    """A beginning once with two branches behind it, packed beside another row, is the two whole rows."""
    params = make(ARCH)
    tokens, positions, segments = rows([9, 7], 9)
    tokens = tokens.at[1, :4].set(tokens[0, :4])
    separate = forward(ARCH, COMPUTE, params, tokens, positions, segments)
    packed = jnp.concatenate([tokens[0, :3], tokens[0], tokens[1, 4:7]])[None]
    where = jnp.concatenate([jnp.arange(3), jnp.arange(9), jnp.arange(4, 7)])[None]
    which = jnp.array([[1] * 3 + [2] * 12])
    branches = jnp.array([[1] * 3 + [0] * 4 + [1] * 5 + [2] * 3])
    together = forward(ARCH, COMPUTE, params, packed, where, which, branches)[0]
    np.testing.assert_allclose(together[3:12], separate[0], atol=1e-5)
    np.testing.assert_allclose(together[12:], separate[1, 4:7], atol=1e-5)


def test_padding_is_invisible():
    params = make(ARCH)
    tokens, positions, segments = rows([6], 12)
    padded = forward(ARCH, COMPUTE, params, tokens, positions, segments)
    alone = forward(ARCH, COMPUTE, params, tokens[:, :6], positions[:, :6], segments[:, :6])
    np.testing.assert_allclose(padded[:, :6], alone, atol=1e-5)


@pytest.mark.parametrize(("remat", "unroll"), [*((name, 1) for name in REMAT), ("none", 2)])
def test_remat_and_unroll_change_nothing(remat, unroll):
    params, batch = make(ARCH), rows([12], 12)
    loss = lambda c: lambda p: (forward(ARCH, c, p, *batch) ** 2).sum()  # noqa: E731
    expected = jax.jit(jax.grad(loss(COMPUTE)))(params)
    found = jax.jit(jax.grad(loss(replace(COMPUTE, remat=remat, unroll=unroll))))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), expected, found)


# lengths of rows, blocks and whole rows of model/blockwise.py, scores at once: one block; many that do not divide the
# rows, row by row; as they are
BLOCKS = {"one": (7, (9, 9), 9, 999), "many": (7, (3, 2), 0, 1), "as they are": (1100, (256, 256), 256, 2**28)}


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@pytest.mark.parametrize("case", BLOCKS)
def test_attention_backends_agree(backend, case, monkeypatch):
    T, blocks, whole, most = BLOCKS[case]
    for name, value in (("BLOCKS", {"cpu": blocks}), ("WHOLE", whole), ("MOST", most)):
        monkeypatch.setattr(blockwise, name, value)
    rng = np.random.default_rng(T)
    q = jnp.asarray(rng.normal(size=(2, T, 4, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(2, T, 2, 8)), jnp.float32) for _ in range(2))
    segments = jnp.asarray(np.sort(rng.integers(1, 4, (2, T)), axis=1).astype(np.int32)).at[1, -2:].set(0)
    branches = jnp.asarray(rng.integers(0, 3, (2, T)), jnp.int32)
    mask = self_attention(jnp.broadcast_to(jnp.arange(T), (2, T)), segments, jnp.int32(50), branches)
    real = (segments > 0)[..., None, None]

    def value(name):
        return lambda q, k, v: (jnp.where(real, attend(q, k, v, mask, name), 0) ** 2).sum()

    want, expected = jax.jit(jax.value_and_grad(value("reference"), (0, 1, 2)))(q, k, v)
    got, found = jax.jit(jax.value_and_grad(value(backend), (0, 1, 2)))(q, k, v)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(found, expected, strict=True):
        assert float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) < 1e-5


def test_unknown_backend_says_which_exist():
    x = jnp.zeros((1, 2, 2, 4))
    mask = self_attention(jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"flash.*allowed: auto, reference"):
        attend(x, x, x, mask, "flash")


def test_dense_mask():
    positions = jnp.array([[0, 1, 0, 1, 2, 0]])
    segments = jnp.array([[1, 1, 2, 2, 2, 0]])
    seen = dense(self_attention(positions, segments))[0].astype(int).tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    window = dense(Mask(positions, positions, segments, segments, 2))[0, 4].astype(int).tolist()
    assert window == [0, 0, 0, 1, 1, 0]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [1, 5, 24, 1000])
def test_chunked_cross_entropy_equals_whole(tied, chunk):
    arch = replace(ARCH, tie_embeddings=tied)
    params, (tokens, positions, segments) = make(arch), rows([12, 9], 12)
    weights = jnp.asarray(np.random.default_rng(1).random((2, 12)), jnp.float32) * segments
    targets = jnp.roll(tokens, -1, 1)

    def whole(p):
        all_logits = logits(forward(arch, COMPUTE, p, tokens, positions, segments), head_of(arch, p))
        log_z = jax.nn.logsumexp(all_logits, -1)
        chosen = jnp.take_along_axis(all_logits, targets[..., None], -1)[..., 0]
        right = (all_logits.argmax(-1) == targets) * weights
        return (weights * (log_z - chosen + 1e-2 * log_z**2)).sum(), right.sum()

    def chunked(p):
        hidden = forward(arch, COMPUTE, p, tokens, positions, segments)
        return cross_entropy(hidden, head_of(arch, p), targets, weights, chunk, 1e-2)

    (want, right), expected = jax.jit(jax.value_and_grad(whole, has_aux=True))(params)
    (got, hits), found = jax.jit(jax.value_and_grad(chunked, has_aux=True))(params)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(hits, right, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert float(jnp.linalg.norm(a - b)) < 1e-5 * float(jnp.linalg.norm(b)) + 1e-7


def test_loss_has_no_array_of_all_logits_and_a_frozen_head_no_gradient():
    B, T, V, D = 2, 64, 97, 32
    x, w = jnp.ones((B, T, D)), jnp.ones((D, V))
    y, m = jnp.zeros((B, T), jnp.int32), jnp.ones((B, T))
    from model.head import Head

    loss = lambda x, w: cross_entropy(x, Head(w, False), y, m, 16)[0]  # noqa: E731
    both, frozen = (str(jax.make_jaxpr(jax.grad(loss, which))(x, w)) for which in ((0, 1), 0))
    assert f"f32[{B},{T},{V}]" not in both
    assert f"f32[{B * T},{V}]" not in both
    products = lambda text: text.count("dot_general")  # noqa: E731
    assert (products(both), products(frozen)) == (3, 2)


def test_token_logprobs_and_temperature():
    params, (tokens, positions, segments) = make(ARCH), rows([12, 12], 12)
    hidden = forward(ARCH, COMPUTE, params, tokens, positions, segments)
    head = head_of(ARCH, params)
    for temperature in (1.0, 0.7):
        every = jax.nn.log_softmax(logits(hidden, head) / temperature)
        want = jnp.take_along_axis(every, tokens[..., None], -1)[..., 0]
        got = jax.jit(token_logprobs, static_argnums=(3, 4))(hidden, head, tokens, 5, temperature)
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_token_logprobs_where_they_count(tied):
    """Values, gradients of hidden states and head: those of log softmax at the positions in the mask, 0 elsewhere."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        hidden, weight = (
            jnp.asarray(rng.normal(size=(3, 11, 6))),
            jnp.asarray(rng.normal(size=(9, 6) if tied else (6, 9))),
        )
        targets, g = jnp.asarray(rng.integers(0, 9, (3, 11)), jnp.int32), jnp.asarray(rng.normal(size=(3, 11)))
        for share in (0.0, 0.3, 1.0):
            where = jnp.asarray(rng.random((3, 11)) < share).at[1].set(False)

            def plain(hidden, weight, where=where):
                every = jax.nn.log_softmax(logits(hidden, Head(weight, tied)) / 0.7)
                return jnp.where(where, jnp.take_along_axis(every, targets[..., None], -1)[..., 0], 0)

            def ours(hidden, weight, where=where):
                return token_logprobs(hidden, Head(weight, tied), targets, 7, 0.7, where)

            for one, other in zip(*(jax.vjp(f, hidden, weight) for f in (plain, ours)), strict=True):
                if callable(one):
                    one, other = one(g), other(g)
                jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-12), other, one)
            logp, squares = jax.jit(partial(token_logprobs_and, "squares"), static_argnums=3)(
                hidden, Head(weight, tied), targets, 7, where=where
            )
            want = jax.nn.logsumexp(2 * jax.nn.log_softmax(logits(hidden, Head(weight, tied))), -1)
            np.testing.assert_allclose(squares, jnp.where(where, want, 0), rtol=0, atol=1e-12)
            assert (logp[~where] == 0).all()


@pytest.mark.parametrize("tied", [False, True])
def test_token_entropies(tied):
    """Entropies at a temperature, and their gradients beside those of log-probs: of hidden states and of a head."""
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        hidden, weight = jnp.asarray(rng.normal(size=(2, 9, 6))), jnp.asarray(rng.normal(size=(7, 6)))
        weight = weight if tied else weight.T
        targets, where = jnp.asarray(rng.integers(0, 7, (2, 9)), jnp.int32), jnp.asarray(rng.random((2, 9)) < 0.6)
        g = tuple(jnp.asarray(x) for x in rng.normal(size=(2, 2, 9)))

        def plain(hidden, weight):
            every = jax.nn.log_softmax(logits(hidden, Head(weight, tied)) / 0.7)
            found = jnp.take_along_axis(every, targets[..., None], -1)[..., 0], -(jnp.exp(every) * every).sum(-1)
            return tuple(jnp.where(where, x, 0) for x in found)

        def ours(hidden, weight, learn=True):
            return token_logprobs_and("entropy", hidden, Head(weight, tied), targets, 5, 0.7, where, learn)

        def grads(f, g):
            values, back = jax.vjp(f, hidden, weight)
            return values, back(g)

        zero = jnp.zeros_like(g[0])
        close = partial(np.testing.assert_allclose, rtol=0, atol=1e-12)
        for cotangents in (g, (zero, g[1])):
            jax.tree.map(close, *(jax.jit(partial(grads, f))(cotangents) for f in (ours, plain)))
        # one that is a metric alone has no gradient
        still = jax.jit(partial(grads, partial(ours, learn=False)))(g)
        jax.tree.map(close, still, (plain(hidden, weight), jax.jit(partial(grads, plain))((g[0], zero))[1]))
        # of the entropy alone: log-probs without a cotangent
        alone = (jax.jit(jax.grad(lambda h, w, f=f: f(h, w)[1].sum(), (0, 1)))(hidden, weight) for f in (ours, plain))
        jax.tree.map(close, *alone)


def test_bfloat16_compute_keeps_float32_where_it_must():
    params, batch = make(ARCH), rows([12], 12)
    hidden = forward(ARCH, replace(COMPUTE, dtype=jnp.bfloat16), params, *batch)
    assert hidden.dtype == jnp.bfloat16
    assert logits(hidden, head_of(ARCH, params)).dtype == jnp.float32
    loss, _ = cross_entropy(hidden, head_of(ARCH, params), batch[0], jnp.ones((1, 12)))
    assert loss.dtype == jnp.float32


def test_cache_drops_what_lies_beyond_the_last_slot():
    params = make(ARCH)
    tokens, _, segments = rows([3], 6)
    cache = init_cache(ARCH, 1, 4, jnp.float32)
    _, cache = extend(ARCH, COMPUTE, params, tokens, segments, cache)
    assert isinstance(cache, Cache)
    assert cache.length.tolist() == [3]


def test_families_round_trip_and_refuse_what_they_do_not_know():
    for arch in (VARIANTS["untied"], VARIANTS["linear"], VARIANTS["llama3"], VARIANTS["biases"]):
        assert architecture_from_hf(hf_config_from(arch)) == arch
    config = hf_config_from(ARCH)
    old = {k: v for k, v in config.items() if k != "rope_parameters"}  # transformers 4's keys alone
    assert architecture_from_hf(old) == ARCH
    with pytest.raises(UsageError, match=r"model_type 'mamba' is not supported; supported: bert, .*, llama"):
        architecture_from_hf({**config, "model_type": "mamba"})
    with pytest.raises(UsageError, match="RoPE scaling 'axial'"):
        architecture_from_hf({**config, "rope_parameters": {"rope_type": "axial", "factor": 4.0}})
    with pytest.raises(UsageError, match="sliding_window = 4096"):
        architecture_from_hf({**config, "sliding_window": 4096})
    with pytest.raises(UsageError, match="hidden_size is missing"):
        architecture_from_hf({k: v for k, v in config.items() if k != "hidden_size"})


def test_count():
    assert count(make(ARCH)) == sum(int(np.prod(d.shape)) for d in declare(ARCH).values())
