"""Every processor against transformers' own, in float64, on random logits and random rows. The extra `parity`."""

import jax
import numpy as np
import pytest

from tests.golden.logits import CASES, SLOTS, draw, ours, same

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", CASES)
def test_as_transformers(name):
    from tests.golden.make_logits import theirs

    with jax.enable_x64(True):
        for seed in range(60):
            length = 1 + seed % (SLOTS - 1)
            logits, tokens = draw(1000 + seed, length, np.float64)
            same(ours(name, logits, tokens, length), theirs(name, logits.copy(), tokens[:, :length]), 1e-12)
