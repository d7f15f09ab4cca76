"""The tiny model and its data, made once; runs of it in this process and in others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A random Llama of two layers with a chat tokenizer, as a Hugging Face folder."""
    return tiny.make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """60 short conversations."""
    return tiny.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", tiny.make_chats(60))


@pytest.fixture
def make_run(tmp_path, tiny_model, chats):
    """make_run(*overrides, output='run') -> the Run of a short training."""
    from configs.load import load

    def make(*more, output="run", model=tiny_model, data=chats, recipe="sft"):
        return load(recipe, tiny.overrides(tmp_path / output, model, data, *more))

    return make


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A folder where the processes that tests start share what they have compiled."""
    return tmp_path_factory.mktemp("xla")


@pytest.fixture
def start(compiled):
    """start(*arguments, devices=1, **environment) -> a process that does `purestep train sft ARGUMENTS`."""
    begun = []

    def begin(*arguments, devices=1, **environment):
        env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            **environment,
        }
        command = [sys.executable, "-m", "train.cli", "train", *map(str, arguments)]
        process = subprocess.Popen(
            command, env={k: v for k, v in env.items() if v is not None},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        begun.append(process)
        return process

    yield begin
    for process in begun:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True, scope="session")
def _compile_once(tmp_path_factory):
    """Runs in this process share compiled programs, as a second start of the command would."""
    import jax

    names = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla-here")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in names.items():
        jax.config.update(name, value)
    yield
    jax.config.update("jax_compilation_cache_dir", None)
