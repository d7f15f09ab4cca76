"""`purestep inspect`: numbers by hand, what is refused and why, and no weight read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from configs.errors import UsageError
from convert import inspection
from convert.inspection import inspect, render
from train import cli

ROOT = Path(cli.__file__).resolve().parent.parent


def test_numbers(tiny, monkeypatch):
    folder, given = tiny(dtype="bfloat16", tie_word_embeddings=False)
    monkeypatch.setattr("convert.tensors._reader", lambda *args: lambda: pytest.fail("a weight was read"))
    told = inspect(str(folder))
    total = sum(v.size for v in given.values())
    assert told["parameters"] == {
        "total": total, "embed": 40 * 24, "norms": 7 * 24, "attention": 3 * 2 * (48 + 16) * 24, "mlp": 3 * 3 * 24 * 36,
        "head": 40 * 24,
    }  # fmt: skip
    assert told["memory"]["weights"] == {"float32": 4 * total, "bfloat16": 2 * total}
    assert told["memory"]["cache_per_1000_tokens"]["bfloat16"] == 2 * 3 * 2 * 8 * 1000 * 2
    assert told["memory"]["training_adamw"] == 16 * total
    assert told["layers"] == [
        {"layers": [0, 1, 2], "heads": 6, "kv_heads": 2, "head_dim": 8, "ffn": 36, "experts": None, "window": None,
         "rope": {"theta": 10000.0}}
    ]  # fmt: skip
    assert (told["family"], told["context"], told["vocabulary"], told["problems"]) == ("llama", 64, 40, [])
    assert (told["tensors"], told["dtypes"]) == (len(given), {"BF16": len(given)})
    assert told["files"] == {"model.safetensors": (folder / "model.safetensors").stat().st_size}
    assert told["tokenizer"] is None


def test_layers_of_two_kinds(tmp_path):
    config = {
        "model_type": "gemma3_text", "vocab_size": 90, "hidden_size": 24, "intermediate_size": 40, "sliding_window": 5,
        "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = inspect(str(tmp_path))
    windowed, full = told["layers"]
    assert (windowed["window"], windowed["layers"], windowed["rope"]) == (5, [0, 1, 2, 3, 4, 6, 7], {"theta": 1e4})
    assert (full["window"], full["layers"], full["rope"]) == (None, [5], {"theta": 1e6})
    assert told["settings"]["post_norms"] is True
    text = render(told)
    assert f"window {windowed['window']}" in text
    assert "sees everything" in text
    assert "files" not in text


def test_a_refused_model_is_told_about_all_the_same(tiny):
    folder, given = tiny()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gptx", "magic": 7}))
    done = CliRunner().invoke(cli.app, ["inspect", str(folder)])
    assert done.exit_code == 1
    assert "NOT SUPPORTED" in done.output
    assert "model_type 'gptx' is not supported" in done.output
    assert "magic = 7" in done.output
    assert f"{len(given)}: {len(given)} F32" in done.output
    with pytest.raises(UsageError, match="does not exist"):
        inspect(str(folder) + "x")


def test_weights_that_do_not_fit(tiny):
    told = inspect(str(tiny(drop=["model.norm.weight"], add={"odd": np.zeros(3, np.float32)})[0]))
    assert "1 missing: model.norm.weight" in told["problems"][0]
    assert "odd" in told["problems"][0]
    assert told["parameters"]["total"] > 0


def test_the_real_model_as_json(smollm2):
    """A process of its own: quick, without jax, one JSON object."""
    code = "import sys; from train import cli; cli.quiet(); cli.app(standalone_mode=False); print('jax' in sys.modules)"
    command = [sys.executable, "-c", code, "inspect", "smollm2-135m-instruct", "--json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=True)
    text, jax = done.stdout.splitlines()
    told = json.loads(text)
    assert jax == "False"
    assert (told["kind"], told["family"], told["parameters"]["total"]) == ("gguf", "llama", 134_515_008)
    assert told["dtypes"] == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    assert (told["tokenizer"]["kind"], told["tokenizer"]["size"], told["tokenizer"]["eos"]) == (
        "BPE, bytes",
        49152,
        [2],
    )
    assert told["chat_template"].startswith("{%")
    assert "tokenizer   BPE, bytes, 49,152 tokens; begin 1, end [2], pad 2" in render(told)
    assert "--- template" in render(told, template=True)


def test_ranges_and_sizes():
    assert inspection._ranges([0, 1, 2, 4, 6, 7]) == "0-2, 4, 6-7"
    assert [inspection._bytes(n) for n in (12, 3400, 5_600_000, 7_890_000_000)] == [
        "12 B",
        "3.4 kB",
        "5.6 MB",
        "7.89 GB",
    ]
