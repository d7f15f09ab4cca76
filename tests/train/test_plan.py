"""What a budget buys: the identities and optima of the laws, and the command."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from configs.errors import UsageError
from train import cli
from train.plan import (
    BESIROGLU,
    SIZES,
    nearest_sizes,
    predict_loss,
    propose,
    read_budget,
    split_by_law,
    split_by_ratio,
    train_flops,
)  # fmt: skip

BUDGETS = st.floats(15, 28).map(lambda x: 10**x)


@given(BUDGETS, st.floats(1, 200))
def test_the_budget_is_spent_exactly(flops, ratio):
    n, d = split_by_ratio(flops, ratio)
    assert train_flops(n, d) == pytest.approx(flops)
    assert d / n == pytest.approx(ratio)
    assert train_flops(*split_by_law(flops)) == pytest.approx(flops)


@given(BUDGETS, st.floats(1.01, 100))
def test_more_compute_buys_more_of_both_and_a_lower_loss(flops, more):
    for split in (split_by_ratio, split_by_law):
        (n, d), (bigger, longer) = split(flops), split(flops * more)
        assert bigger > n
        assert longer > d
        assert BESIROGLU.e < predict_loss(bigger, longer) < predict_loss(n, d)


@given(BUDGETS, st.floats(0.02, 3))
def test_the_laws_optimum_is_the_least_loss_of_its_budget(flops, away):
    n, d = split_by_law(flops)
    least = predict_loss(n, d)
    for factor in (1 + away, 1 / (1 + away)):
        assert predict_loss(n * factor, d / factor) > least


def test_the_numbers_of_the_papers():
    n, d = split_by_ratio(5.76e23)  # Gopher's budget; Chinchilla: 70 B, 1.4 T
    assert n == pytest.approx(70e9, rel=0.02)
    assert d == pytest.approx(1.4e12, rel=0.02)
    n, d = split_by_law(5.76e23)  # 2404.10102, abstract and figure 5: consistent with about 20 tokens a parameter
    assert 15 < d / n < 30


def test_nearest_sizes():
    assert nearest_sizes(1.2e8)[0] == "smollm2-135m"
    assert all(nearest_sizes(n)[0] == name for name, n in SIZES.items())


def test_forms_of_a_budget():
    assert read_budget("1e21", 0.4) == 1e21
    assert read_budget("8xH100:24h", 0.5) == pytest.approx(8 * 989e12 * 86400 * 0.5)
    assert read_budget("2xa100:1.5d", 1.0) == pytest.approx(2 * 312e12 * 1.5 * 86400)
    for text, words in {
        "much": "is 'much', allowed",
        "-1e21": "allowed",
        "nan": "allowed",
        "8xABC:1h": "known: A100",
    }.items():
        with pytest.raises(UsageError, match=words):
            read_budget(text, 0.4)


def test_the_command():
    run = CliRunner()
    args = ["plan", "--compute-budget", "1e21", "--batch-tokens", "1000000", "--peak-flops", "8e15", "--mfu", "0.5"]
    done = run.invoke(cli.app, [*args, "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert rows == json.loads(json.dumps(propose(1e21, 20.0, 10**6, 8e15, 0.5)))
    first = next(iter(rows.values()))
    assert first["seconds"] == pytest.approx(250000)
    assert first["steps"] == pytest.approx(first["tokens"] / 1e6, abs=1)
    said = run.invoke(cli.app, args).stdout
    for words in ("2.89 B", "57.7 B", "llama-3.2-3b", "69.4 h", "nats a token"):
        assert words in said, said
    assert run.invoke(cli.app, ["plan", "--compute-budget", "1e21", "--mfu", "2"]).exit_code == 2
