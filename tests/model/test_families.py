"""Every family against transformers by golden files (tests/golden/make_families.py), and what holds for all of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.errors import UsageError
from convert.adapter import check_adapters
from convert.heads import check_language, with_scores
from convert.source import Source
from convert.tables import match
from convert.tensors import Tensor
from model.cache import init_cache
from model.compute import Compute
from model.families import architecture_from_hf, hf_config_from
from model.head import Head, cross_entropy, token_logprobs_and
from model.transformer import declare, extend, forward
from tests.golden import families
from tests.golden.families import CONFIGS, LENGTH

each_family = pytest.mark.parametrize("name", CONFIGS)


# in float32, and with a cache, where the maths differs most; all others by CI apart
FLOAT32, CACHED = ("llama3", "gemma2", "cohere"), {"gemma2", "smollm3", "olmo3", "glm4", "cohere2", "gpt_neox", "gpt2"}


@pytest.mark.parametrize(
    ("name", "dtype", "attention", "tolerance"),
    [
        *((name, "float64", "chunked", 1e-9) for name in CONFIGS),
        *(
            pytest.param(name, "float32", "reference", 1e-5, marks=() if name in FLOAT32 else pytest.mark.slow)
            for name in CONFIGS
        ),
    ],
)
def test_logits_loss_and_gradients(name, dtype, attention, tolerance):
    with np.load(families.FOLDER / f"{name}.npz") as file:
        golden = dict(file)
    with jax.enable_x64(dtype == "float64"):
        apart = families.compare(golden, *families.ours(CONFIGS[name], jnp.dtype(dtype), attention))
    worst = max(apart, key=apart.__getitem__)
    assert apart[worst] < tolerance, (worst, apart[worst])


@pytest.mark.parametrize(
    "name",
    [
        name if name in CACHED else pytest.param(name, marks=pytest.mark.slow)
        for name in CONFIGS
        if not name.startswith("bert")
    ],
)
def test_decoding_with_a_cache_equals_the_full_forward(name):
    """In two pieces, rows of different lengths in both."""
    if CONFIGS[name].get("rope_parameters", {}).get("rope_type") == "dynamic":
        pytest.skip("keys in the cache keep the base of their time, here and in transformers")
    arch, compute, b = architecture_from_hf(CONFIGS[name]), Compute(attention="reference"), families.batch()
    params = families.params_of(arch, families.tensors(CONFIGS[name]), jnp.float32)
    lengths, piece = np.array([LENGTH, LENGTH - families.PADDED]), 16
    rows = np.stack([np.roll(row, -(LENGTH - n)) for row, n in zip(b["tokens"], lengths, strict=True)])
    real = (np.arange(LENGTH)[None] < lengths[:, None]).astype(np.int32)
    where = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), rows.shape)
    whole = jax.jit(forward, static_argnums=(0, 1))(arch, compute, params, rows, where, real)
    step = jax.jit(extend, static_argnums=(0, 1))
    cache, done = init_cache(arch, 2, LENGTH + piece, jnp.float32), np.zeros(2, int)
    for give in ((16, 13), (8, 2)):
        fill = [np.pad(row[at : at + n], (0, piece - n)) for row, at, n in zip(rows, done, give, strict=True)]
        segments = (np.arange(piece)[None] < np.array(give)[:, None]).astype(np.int32)
        hidden, cache = step(arch, compute, params, np.stack(fill), segments, cache)
        for row, (at, n) in enumerate(zip(done, give, strict=True)):
            np.testing.assert_allclose(hidden[row, :n], whole[row, at : at + n], atol=2e-5)
        done += give


@each_family
def test_weights_and_config_go_in_and_come_out(name):
    arch, weights = architecture_from_hf(CONFIGS[name]), families.tensors(CONFIGS[name])
    leaves = families.leaves(arch, weights, np.float32)
    assert {path: leaf.shape for path, leaf in leaves.items()} == {p: d.shape for p, d in declare(arch).items()}
    back = families.theirs_of(arch, families.nest(leaves))
    assert back.keys() == weights.keys()
    for key, value in weights.items():
        assert back[key].tobytes() == value.tobytes(), key
    assert architecture_from_hf(hf_config_from(arch)) == arch


@pytest.mark.parametrize("tied", [True, False])
def test_scaled_and_capped_logits_have_their_gradients(tied):
    """Of the loss with its z-term, of chosen log-probs at a temperature and of the entropy, against jax's own."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        hidden, weight = (
            jnp.asarray(rng.normal(size=(2, 5, 8))),
            jnp.asarray(rng.normal(size=(13, 8) if tied else (8, 13))),
        )
        targets, weights = jnp.asarray(rng.integers(0, 13, (2, 5))), jnp.asarray(rng.random((2, 5)))

        def chunked(x, w):
            head = Head(w, tied, 0.7, 2.0)
            logp, entropy = token_logprobs_and("entropy", x, head, targets, 4, 1.3, learn=True)
            return cross_entropy(x, head, targets, weights, 4, 1e-2)[0] + (weights * (logp + 0.5 * entropy)).sum()

        def whole(x, w):
            out = 2.0 * jnp.tanh(0.7 / 2.0 * jnp.einsum("BTD,VD->BTV" if tied else "BTD,DV->BTV", x, w))
            cool, z = jax.nn.log_softmax(out / 1.3), jax.nn.logsumexp(out, -1)
            pick = lambda v: jnp.take_along_axis(v, targets[..., None], -1)[..., 0]  # noqa: E731
            each = z - pick(out) + 1e-2 * z**2 + pick(cool) - 0.5 * (jnp.exp(cool) * cool).sum(-1)
            return (weights * each).sum()

        for found, want in zip(
            *(jax.jit(jax.value_and_grad(f, (0, 1)))(hidden, weight) for f in (chunked, whole)), strict=True
        ):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, want)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("qwen3", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping = 30.0 is not supported"),
        ("mistral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("granite", {"sliding_window": 8}, "sliding_window = 8"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ("llama_yarn", {"rope_parameters": {"rope_type": "yarn", "mrope_section": [1]}}, "mrope_section"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope"}}, "short_factor is missing"),
        ("olmo2", {"layer_types": [families.LOCAL] * 4}, "layer_types is not supported"),
        ("qwen2", {"layer_types": ["linear_attention"] * 4}, "layer_types has 4 entries of linear_attention"),
    ],
)
def test_what_a_family_does_not_have_is_refused(name, change, says):
    with pytest.raises(UsageError, match=says):
        architecture_from_hf({**CONFIGS[name], **change})


def test_adapters_of_fused_weights_are_refused_by_name():
    arch = architecture_from_hf(CONFIGS["phi3"])
    with pytest.raises(UsageError, match="phi3 keeps layers/attn/q/weight as parts of qkv_proj"):
        check_adapters(["layers/attn/q/weight", "layers/attn/o/weight"], arch)


def test_an_encoder_generates_nothing_and_is_not_trained(tmp_path):
    source = Source("hf", "bert", tmp_path, architecture_from_hf(CONFIGS["bert"]), CONFIGS["bert"], None)
    for use in (check_language, lambda source: with_scores(source, 1, False, 0)):
        with pytest.raises(UsageError, match=r"'bert' is an encoder \(bert\)"):
            use(source)


@pytest.mark.parametrize(
    ("name", "change", "more"),
    [
        ("gpt2", lambda key: key.removeprefix("transformer."), ["h.0.attn.bias", "h.3.attn.masked_bias"]),
        ("gpt_neox", lambda key: key, ["gpt_neox.layers.1.attention.rotary_emb.inv_freq"]),
        (
            "bert",
            lambda key: key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
            ["cls.seq_relationship.weight", "bert.pooler.dense.bias"],
        ),
    ],
)
def test_checkpoints_as_they_are_published(name, change, more):
    """OpenAI's without the first part of every name, buffers that were saved, the first BERTs' names of norms."""
    arch, weights = architecture_from_hf(CONFIGS[name]), families.tensors(CONFIGS[name])
    given = {change(key): value for key, value in weights.items()} | {key: np.zeros(3, np.float32) for key in more}
    found = match({k: Tensor(v.shape, v.dtype, "", partial(lambda x: x, v)) for k, v in given.items()}, arch, name)
    for path, leaf in families.leaves(arch, weights, np.float32).items():
        np.testing.assert_array_equal(found[path].read((), np.dtype(np.float32)), leaf)
