"""Gemma 3's maths against transformers by a golden file (test_families.py has more), and its config both ways."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.errors import UsageError
from model.architecture import Architecture, Rope
from model.compute import Compute
from model.families import architecture_from_hf, hf_config_from
from model.transformer import forward
from tests.golden import families

CONFIG = families.CONFIGS["gemma3"]
ARCH = architecture_from_hf(CONFIG)


@pytest.mark.parametrize(
    ("attention", "remat", "dtype", "tolerance"),
    [
        ("chunked", "dots", "float64", 1e-9),
        ("reference", "none", "float32", 1e-5),
        ("xla", "dots", "float32", 1e-5),  # jax.nn's softmax is float32 always
    ],
)
def test_logits_loss_and_gradients(attention, remat, dtype, tolerance):
    with np.load(families.FOLDER / "gemma3.npz") as file:
        golden = dict(file)
    with jax.enable_x64(dtype == "float64"):
        apart = families.compare(golden, *families.ours(CONFIG, jnp.dtype(dtype), attention, remat))
    worst = max(apart, key=apart.__getitem__)
    assert apart[worst] < tolerance, (worst, apart[worst])


def test_packed_equals_separate():
    """Windows look back in positions of one segment, not in slots."""
    params = families.params_of(ARCH, families.tensors(CONFIG), jnp.float32)
    run = jax.jit(forward, static_argnums=(0, 1))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 97, (1, 21)), jnp.int32)
    where, which = jnp.concatenate([jnp.arange(9), jnp.arange(12)])[None], jnp.array([[1] * 9 + [2] * 12])
    together = run(ARCH, Compute(attention="reference"), params, tokens, where, which)
    for cut in (slice(0, 9), slice(9, 21)):
        alone = run(ARCH, Compute(attention="reference"), params, tokens[:, cut], where[:, cut], which[:, cut])
        np.testing.assert_allclose(together[:, cut], alone, atol=2e-5)


def test_the_norms_product_is_not_rounded_before_its_scale():
    """As Gemma does it, and Llama does not: seen in bfloat16 only."""
    from model.layers import rms_norm

    x, scale = (jnp.asarray(np.random.default_rng(i).normal(size=n), jnp.bfloat16) for i, n in ((0, (4, 64)), (1, 64)))
    wide = np.asarray(x, np.float32)
    normed = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    expected = jnp.asarray(normed * (1 + np.asarray(scale, np.float32)), jnp.bfloat16)
    np.testing.assert_array_equal(rms_norm(x, scale, 1e-6, 1.0), expected)


def test_config_both_ways():
    assert (ARCH.windows, ARCH.query_pre_attn_scalar) == ((5, 5, 0, 5, 0), 10.0)
    assert (ARCH.rope, ARCH.local_rope) == (Rope(1e6, "linear", 8.0), Rope(100.0))
    assert architecture_from_hf(hf_config_from(ARCH)) == ARCH
    plain = replace(ARCH, rope=Rope(1e6), query_pre_attn_scalar=16.0, windows=(), local_rope=None, attention_bias=True,
                    output_bias=True, tie_embeddings=False)  # fmt: skip
    assert architecture_from_hf(hf_config_from(plain)) == plain
    # the keys that transformers 4 wrote, which the published models have
    old = {k: v for k, v in CONFIG.items() if k not in ("rope_parameters", "layer_types")}
    old |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    found = architecture_from_hf({**old, "num_hidden_layers": 8, "sliding_window_pattern": 3})
    assert found.windows == (5, 5, 0, 5, 5, 0, 5, 5)
    assert (found.rope, found.local_rope) == (Rope(1e6, "linear", 8.0), Rope(1e4))
    assert architecture_from_hf({**old, "num_hidden_layers": 7}).windows == (5, 5, 5, 5, 5, 0, 5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not supported"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is not supported"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ({"layer_types": ["sliding_attention"] * 4 + ["chunked_attention"]}, "layer_types has 5 .*chunked_attention"),
        ({"layer_types": ["full_attention"] * 4}, r"layer_types has 4 .*5 \(num_hidden_layers\)"),
        ({"sliding_window": None}, "sliding_window is missing"),
        ({"rope_parameters": {"rope_type": "default"}}, r"rope_parameters\.rope_type"),
        ({"rope_parameters": {"full_attention": {"rope_type": "axial", "factor": 2.0}}}, "'axial' is not supported"),
        ({"hidden_activation": "relu"}, "hidden_activation = 'relu'"),
        ({"model_type": "gemma3"}, "model_type 'gemma3' is not supported; supported: .*gemma3_text"),
    ],
)
def test_what_would_change_the_maths_is_refused(change, says):
    with pytest.raises(UsageError, match=says):
        architecture_from_hf({**CONFIG, **change})


def test_a_config_that_cannot_say_it_is_not_written():
    llama = Architecture(97, 32, 2, 4, 2, 8, 48, 64)
    with pytest.raises(UsageError, match="llama cannot express this model's qk_norm"):
        hf_config_from(replace(llama, qk_norm=True))
    with pytest.raises(UsageError, match="llama cannot express this model's output_bias"):
        hf_config_from(replace(llama, attention_bias=True))
    with pytest.raises(UsageError, match="gemma3_text cannot express this model's windows"):
        hf_config_from(replace(ARCH, windows=(5, 5, 0, 6, 0)))
    with pytest.raises(ValueError, match="4 windows for 5 layers"):
        replace(ARCH, windows=(5, 5, 0, 5))
