"""Curves to PNG: panels, several runs, bad input."""

import json

import pytest
from typer.testing import CliRunner

from configs.errors import UsageError
from train import cli
from train.plot import make_panels, plot, read_curves, smooth

PNG = b"\x89PNG\r\n\x1a\n"


def write(folder, rows, tail=""):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


def rows_of(count, **more):
    return [{"step": i, "loss": 3 / i, "learning_rate": 1e-3, "list": [1, 2], **more} for i in range(1, count + 1)]


def test_numbers_only_and_a_half_line_at_the_end(tmp_path):
    run = write(tmp_path / "a", [*rows_of(2), {"step": 3, "loss": None, "eval_loss": 1.5}], '{"step": 4, "lo')
    assert read_curves(run) == {
        "loss": ([1, 2], [3, 1.5]),
        "learning_rate": ([1, 2], [1e-3] * 2),
        "eval_loss": ([3], [1.5]),
    }


def test_evaluations_of_one_kind_share_a_panel():
    known = [
        "loss",
        "eval_loss",
        "eval_old_loss",
        "eval_new_loss",
        "eval_old_token_accuracy",
        "learning_rate",
        "tokens",
    ]
    assert make_panels(known) == {
        "loss": ["loss"],
        "eval loss": ["eval_loss", "eval_new_loss", "eval_old_loss"],
        "eval token_accuracy": ["eval_old_token_accuracy"],
        "learning_rate": ["learning_rate"],
    }
    assert make_panels(known, ["tokens"]) == {"tokens": ["tokens"]}


def test_smoothing():
    assert smooth([1.0, 2.0, 3.0, 4.0], 1) == [1, 2, 3, 4]
    assert smooth([1.0, 3.0, 5.0, 7.0], 2) == [1, 2, 4, 6]


def test_one_and_several_runs(tmp_path):
    a = write(tmp_path / "a", rows_of(40, eval_old_loss=1.0, eval_new_loss=2.0))
    b = write(tmp_path / "b", rows_of(5, reward=0.5))
    done = CliRunner().invoke(cli.app, ["plot", str(a)])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{a / 'curves.png'}: loss, eval loss, learning_rate\n"
    assert (a / "curves.png").read_bytes().startswith(PNG)
    panels = plot([a, b], tmp_path / "both.png", count=3)
    assert list(panels) == ["loss", "eval loss", "learning_rate", "reward"]
    assert (tmp_path / "both.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("text", "metric", "words"),
    [
        (None, (), "no metrics.jsonl there"),
        ("", (), "no step has been written"),
        ("[1]\n", (), "metrics.jsonl:1: no row of metrics"),
        ('{"step": 1, "loss": 1}\n', ("los",), "--metric los: .* nearest is loss"),
        ('{"step": 1, "tokens": 1}\n', (), "none of loss"),
    ],
)
def test_bad_input(tmp_path, text, metric, words):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UsageError, match=words):
        plot([tmp_path], tmp_path / "x.png", metric)
    assert not (tmp_path / "x.png").exists()
