"""Every processor against what transformers' own made of the same logits and rows (tests/golden/make_logits.py)."""

import numpy as np
import pytest

from tests.golden.logits import CASES, FILE, ours, same


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(FILE))


@pytest.mark.parametrize("name", CASES)
def test_as_transformers(golden, name):
    lengths = [int(key.split("/")[1]) for key in golden if key.startswith("logits/")]
    assert len(lengths) == 3
    for length in lengths:
        found = ours(name, golden[f"logits/{length}"], golden[f"tokens/{length}"], length)
        same(found, golden[f"{name}/{length}"], 1e-6)
