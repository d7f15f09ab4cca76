"""A tiny chat model as a Hugging Face folder, chat data, and recipes that train the one on the other."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "red blue green one two three sun moon sea yes no name is my the a of to".split()


def make_tokenizer(template: str | None = TEMPLATE):
    """A byte-level BPE of 256 bytes, the special tokens and a few merges, filled up to 320 tokens."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from data.tokenizer import wrap_fast

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "<|im_start|>", "<|im_end|>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([" ".join(WORDS) + " user assistant system\n"] * 4, trainer)
    config = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    return wrap_fast(backend, config if template is None else {**config, "chat_template": template})


def make_model(folder: Path, template: str | None = TEMPLATE, seed: int = 0, drop: tuple = (), **changes) -> Path:
    """A random Llama with its tokenizer; `drop` leaves tensors out, `changes` go into config.json."""
    from safetensors.numpy import save_file

    from convert.tables import rows
    from model.families import architecture_from_hf

    folder.mkdir(parents=True)
    tokenizer = make_tokenizer(template)
    tokenizer.save(folder)
    config = {**CONFIG, "vocab_size": -(-tokenizer.vocab_size // 16) * 16, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    arch, rng = architecture_from_hf({**config, "model_type": "llama"}), np.random.default_rng(seed)
    tensors = {
        name: (1 if "norm" in name else 0) + 0.1 * rng.standard_normal(row.their_shape(arch)).astype("float32")
        for row in rows(arch)
        for name in row.names(arch)
        if name not in drop
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_chats(count: int, seed: int = 0) -> list[dict]:
    """Conversations of uneven length."""
    rng = np.random.default_rng(seed)
    say = lambda most: " ".join(rng.choice(WORDS, rng.integers(1, most)))  # noqa: E731
    return [
        {"messages": [{"role": "user", "content": say(4)}, {"role": "assistant", "content": say(7)}]}
        for _ in range(count)
    ]


def write_rows(path: Path, rows: list[dict]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def overrides(output: Path, model: Path, data: Path, *more: str) -> list[str]:
    """Arguments after RECIPE that make a short run of a tiny model: 12 steps, a checkpoint every 4."""
    return [
        f"output={output}",
        f"model.source={model}",
        f"data.train={data}",
        "data.max_length=48",
        "data.window=16",
        "optim.learning_rate=1e-3",
        "optim.weight_decay=0.1",
        "train.epochs=null",
        "train.steps=12",
        "train.batch_size=8",
        "train.compilation_cache=false",
        "checkpoint.every=4",
        "log.preflight=false",
        "log.tensorboard=false",
        *more,
    ]


@contextmanager
def one_device():
    """Runs of this process take one of its devices: for what has nothing to do with a mesh; quicker."""
    import jax
    import pytest

    from sharding.mesh import make_mesh
    from train import sample, setup

    with pytest.MonkeyPatch.context() as patch:
        for module in (sample, setup):
            patch.setattr(module, "make_mesh", lambda *_: make_mesh({}, jax.devices()[:1]))
        yield


def launch(cache, arguments, devices=1, module="train.cli", **environment):
    """A process that does `purestep train ARGUMENTS`; an environment variable that is None is unset."""
    alone = devices == 1 and "JAX_COORDINATOR_ADDRESS" not in environment  # else see sharding/compile_cache.py
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(cache) if alone else None,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        **environment,
    }
    env = {name: value for name, value in env.items() if value is not None}
    command = [sys.executable, "-m", module, "train", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)
