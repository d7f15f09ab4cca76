"""Losses and gradients against TRL's SFTTrainer by golden files (tests/golden/make_sft.py); no torch needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.errors import RunError
from convert.load import resolve
from tests.golden import sft


@pytest.fixture(scope="module")
def golden():
    with np.load(sft.FILE) as file:
        return dict(file)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = sft.make_tiny(tmp_path_factory.mktemp("sft") / "tiny")
    return {"full": folder, "lora": sft.make_adapter(folder.with_name("adapter"), folder)}


@pytest.mark.parametrize("window", ["uneven", "silent"])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-9)])
def test_tiny(golden, models, window, method, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        found = sft.ours(models[method], sft.windows()[window], 24, jnp.dtype(dtype))
    apart = sft.compare(golden, f"{window}/{method}", *found)
    worst = max(apart, key=apart.__getitem__)
    assert apart[worst] < tolerance, (worst, apart[worst])


@pytest.mark.slow
def test_smollm2(golden):
    try:
        resolve("smollm2-135m-instruct")
    except RunError as error:
        pytest.skip(str(error))
    rows = [{name: golden[f"rows/{i}/{name}"] for name in ("tokens", "weights")} for i in range(2)]
    apart = sft.compare(golden, "smollm2/full", *sft.ours("smollm2-135m-instruct", [rows], 64, jnp.float32))
    worst = max(apart, key=apart.__getitem__)
    assert apart[worst] < 1e-4, (worst, apart[worst])


def test_the_quick_starts_first_rows_are_those_of_the_golden(golden):
    """Else the goldens are to be made anew, or the chat masks have changed."""
    try:
        found = sft.chat_rows("smollm2-135m-instruct")
    except RunError as error:
        pytest.skip(str(error))
    for i, row in enumerate(found):
        np.testing.assert_array_equal(row["tokens"], golden[f"rows/{i}/tokens"])
        np.testing.assert_array_equal(row["weights"], golden[f"rows/{i}/weights"])
