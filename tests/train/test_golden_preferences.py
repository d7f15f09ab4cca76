"""Preference losses and gradients against TRL by golden files (tests/golden/make_preferences.py); no torch needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import preferences, sft
from tests.parity.test_dpo_parity import CASES, FREE, KTO, as_ours, columns_of, labelled, ours, rows
from train.losses import packed

OPTIONS = {name: {"beta": preferences.BETA, **as_ours(options)} for name, options in CASES.items()}
OPTIONS |= {name: {"reference": "none", **mine} for name, (_, mine) in FREE.items()}
OPTIONS |= {name: {"type": "kto", **options} for name, options in KTO.items()}
# TRL takes some logs in float32 always
SINGLE = ("exo_pair", "orpo")


@pytest.fixture(scope="module")
def golden():
    with np.load(preferences.FILE) as file:
        return dict(file)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = sft.make_tiny(tmp_path_factory.mktemp("preferences") / "tiny")
    return sft.make_adapter(folder.with_name("adapter"), folder)


@pytest.fixture(autouse=True, scope="module")
def _one_compile():
    """The model is compiled once for all cases, what follows it runs operation by operation."""
    compiled = jax.jit(packed.policy_logprobs, static_argnames=("arch", "compute", "chunk"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "policy_logprobs", compiled)
        yield


def check(golden, adapter, case, dtype, tolerance):
    examples = labelled(case)[1] if case in KTO else columns_of(rows())
    with jax.enable_x64(dtype == "float64"):
        value, grads, _ = ours(adapter, examples, jnp.dtype(dtype), 1, lambda f: f, **OPTIONS[case])
    apart = preferences.compare(golden, case, value, grads)
    worst = max(apart, key=apart.__getitem__)
    assert apart[worst] < tolerance, (worst, apart[worst])


# discopop divides margins, and with them their rounding, by discopop_tau = 0.05: float64 proves it
@pytest.mark.parametrize("case", [case for case in OPTIONS if case != "discopop"])
def test_float32(golden, adapter, case):
    check(golden, adapter, case, "float32", 1e-5)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case == "discopop" else pytest.mark.slow)
        for case in OPTIONS
        if case not in SINGLE
    ],
)
def test_float64(golden, adapter, case):
    check(golden, adapter, case, "float64", 1e-9)
