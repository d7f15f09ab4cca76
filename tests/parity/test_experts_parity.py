"""Families with experts against transformers, live: tiny models with every number of every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden.experts import CONFIGS, ours
from tests.golden.gemma3 import batch

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def oracle():
    from tests.golden import make_experts

    return make_experts


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])
def test_tiny(oracle, family, dtype, tolerance):
    import torch

    config = CONFIGS[family]
    with jax.enable_x64(dtype == "float64"):
        out, loss, grads = ours(config, jnp.dtype(dtype), attention="chunked")
    want, expected, theirs = oracle.theirs(oracle.make_oracle(config, getattr(torch, dtype)))
    real = batch()["segments"] > 0
    far = {"logits": np.abs(out - want)[real].max(), "loss": abs(loss - expected)}
    only_chooses = {name for name in grads if "e_score_correction_bias" in name}
    assert grads.keys() - only_chooses == theirs.keys()
    assert all(np.abs(grads[name]).max() == 0 for name in only_chooses)
    far |= {k: np.linalg.norm(grads[k] - g) / max(np.linalg.norm(g), 1e-6) for k, g in theirs.items()}
    worst = max(far, key=far.__getitem__)
    gradient = max(far[name] for name in theirs)
    print(f"{family} {dtype}: logits {far['logits']:.1e}, loss {far['loss']:.1e}, worst gradient {gradient:.1e}")
    assert far[worst] < tolerance, worst
