"""The command itself: quick to start, honest exit codes, one sentence for bad input."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from configs.errors import RunError, UsageError
from train import cli

ROOT = Path(cli.__file__).resolve().parent.parent


def start(*args, code=None, **env):
    """Run the command in a process of its own."""
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "train.cli", *args]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **env}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False, timeout=120)


def test_importing_the_command_is_quick_and_loads_nothing_heavy():
    heavy = "jax", "flax", "numpy", "transformers", "pydantic", "grain", "rich.console"
    began = time.perf_counter()
    done = start(code=f"import sys, train.cli; print([m for m in {heavy!r} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr
    assert time.perf_counter() - began < 2


def test_help_is_quick_and_names_every_command():
    began = time.perf_counter()
    done = start("--help")
    assert time.perf_counter() - began < 3  # 0.3 s; the rest is a busy machine
    assert done.returncode == 0
    for command in ("train", "sample", "generate", "score", "chat", "convert", "inspect", "data", "plot", "plan"):
        assert f" {command} " in done.stdout


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("bad input"), 2, "purestep: bad input\n"),
        (RunError("it failed"), 1, "purestep: it failed\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code, said):
    def refuse(*_):
        raise error

    monkeypatch.setattr("configs.load.load", refuse)
    monkeypatch.setattr(sys, "argv", ["purestep", "train", "recipe.yaml"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == code
    assert capsys.readouterr().err == said


def test_a_bug_keeps_its_traceback(monkeypatch):
    def refuse(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("configs.load.load", refuse)
    monkeypatch.setattr(sys, "argv", ["purestep", "train", "recipe.yaml"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_bad_usage_is_2_and_one_sentence():
    done = start("train", "no-such-recipe.yaml")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "no-such-recipe" in done.stderr
    for args in (
        ["generate", "none", "a", "--top-q", "1"],
        ["nonsense"],
        ["train"],
        ["score", "a", "--batch-size", "0"],
    ):
        assert CliRunner().invoke(cli.app, args).exit_code == 2, args


def test_show_prints_the_resolved_config(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {source: smollm2-135m-instruct}\ndata: {train: rows.jsonl}\n")
    done = CliRunner().invoke(cli.app, ["train", str(recipe), "optim.learning_rate=1e-4", "--show"])
    assert done.exit_code == 0, done.output
    from configs.load import load

    shown = tmp_path / "shown.yaml"
    shown.write_text(done.stdout)
    assert load(shown) == load(recipe, ["optim.learning_rate=1e-4"])


def test_commands_hand_the_run_over(tmp_path, monkeypatch):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {source: smollm2-135m-instruct}\ndata: {train: rows.jsonl}\n")
    seen = []
    functions = {"loop": "train", "rounds": "train_rounds", "sample": "sample", "preflight": "show_data"}
    for module, name in ((f"train.{module}", name) for module, name in functions.items()):
        fake = type(sys)(module)
        setattr(fake, name, lambda run, name=name: seen.append((name, run.train.steps)))
        monkeypatch.setitem(sys.modules, module, fake)
    for command in (["train"], ["train", "train.rounds=2"], ["sample"], ["data", "show"]):
        words, more = [w for w in command if "=" not in w], [w for w in command if "=" in w]
        done = CliRunner().invoke(cli.app, [*words, str(recipe), "train.steps=3", *more])
        assert done.exit_code == 0, done.output
    assert seen == [(name, 3) for name in functions.values()]


def test_the_compilation_cache_is_kept_in_the_users_cache(tmp_path):
    code = (
        "from sharding.compile_cache import enable_compilation_cache as on; print(on()); import jax; "
        "jax.jit(lambda x: x + 1)(1.0).block_until_ready()"
    )
    env = {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = start(code=code, **env)
    assert done.stdout.strip() == str(tmp_path / "purestep" / "xla"), done.stderr
    assert list((tmp_path / "purestep" / "xla").iterdir())
    chosen = start(code=code, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"), **env)
    assert chosen.stdout.strip() == str(tmp_path / "mine")
    two = {**env, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    several = start(code=code, **two, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "several"))
    assert several.stdout.strip() == "None", several.stderr
    assert not (tmp_path / "several").exists(), "programs of several CPUs lose the order of their collectives there"
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert start(code=code, **{**env, "XDG_CACHE_HOME": str(blocked)}).stdout.strip() == "None"
