"""Losses, advantages and gradients of learning by reward against TRL by golden files (tests/golden/make_policy.py); no
torch needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import policy, preferences

# what is proven here by a like case too
SLOW = {
    "bnpo token", "bnpo sequence", "dr_grpo sequence", "dapo sequence", "cispo sequence", "sapo sequence",
    "luspo token", "vespo sequence", "aligned", "kl not corrected", "entropy", "sampler token_truncate",
    "sampler sequence_truncate", "sampler off policy", "truncated dapo token", "truncated luspo sequence",
    "truncated sapo sequence", "truncated vespo token",
}  # fmt: skip


@pytest.fixture(scope="module")
def golden():
    with np.load(policy.FILE) as file:
        return dict(file)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return policy.make_policies(tmp_path_factory.mktemp("policies"))


@pytest.fixture(autouse=True, scope="module")
def _one_compile():
    with policy.one_compile():
        yield


@pytest.mark.parametrize(
    ("case", "dtype", "tolerance"),
    [pytest.param(case, "float64", 1e-9, marks=pytest.mark.slow if case in SLOW else ()) for case in policy.CASES]
    + [pytest.param(case, "float32", 1e-5, marks=pytest.mark.slow) for case in policy.CASES if case not in SLOW],
)
def test_policy(golden, folders, case, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        value, grads, _, advantages, _ = policy.ours(folders, case, jnp.dtype(dtype), policy.samples(), jit=lambda f: f)
    expected = [np.full(len(one), each) for one, each in zip(advantages, golden[f"{case}/advantages"], strict=True)]
    np.testing.assert_allclose(np.concatenate(advantages), np.concatenate(expected), rtol=0, atol=tolerance)
    want = float(golden[f"{case}/loss"])
    assert abs(value - want) < tolerance * max(1, abs(want))
    apart = preferences.compare(golden, case, value, grads)
    del apart["loss"]  # a mean of advantages may be near 0
    worst = max(apart, key=apart.__getitem__)
    assert apart[worst] < tolerance, (worst, apart[worst])
