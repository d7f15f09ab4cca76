"""What the SFT goldens are about: the model, the batches, and our side of the comparison. No torch here."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from convert.adapter import read_adapter_config, write_adapter
from convert.load import load_params, resolve
from convert.tables import rows as table
from data.pack import fill_row
from model.compute import Compute
from model.tree import flatten, split
from sharding.mesh import make_mesh
from tests.train import tiny
from train.losses.lm import lm_loss, lm_weights
from train.state import State
from train.step import make_step

FILE = Path(__file__).with_name("sft.npz")
LARGEST = 16  # entries kept of each gradient, besides its norm
RANK, ALPHA = 4, 6.0
TARGETS = ("layers/attn/q/weight", "layers/attn/o/weight", "layers/mlp/down/weight")


def make_tiny(folder: Path) -> Path:
    """The tiny Llama: grouped queries, tied embeddings, numbers from numpy's generator, so the same everywhere."""
    return tiny.make_model(folder, seed=11)


def make_adapter(folder: Path, base: Path) -> Path:
    """A LoRA adapter of a model as a PEFT folder, neither a nor b zero."""
    arch, rng = resolve(base).arch, np.random.default_rng(12)
    pairs = {}
    for row in table(arch):
        if row.ours in TARGETS:
            shape, n = row.layer_shape(arch), len(row.inputs)
            a, b = (arch.num_layers, *shape[:n], RANK), (arch.num_layers, RANK, *shape[n:])
            pairs[row.ours] = tuple(0.1 * rng.standard_normal(s).astype(np.float32) for s in (a, b))
    write_adapter(folder, pairs, arch, base=str(base), lora_alpha=ALPHA)
    return folder


def windows() -> dict[str, list[list[dict[str, np.ndarray]]]]:
    """Name -> micro-batches of rows: very uneven masks; and a micro-batch in which nothing is trained."""
    rng = np.random.default_rng(13)
    rows = [rng.integers(4, 300, n).astype(np.int32) for n in (24, 9, 17, 5)]
    masks = [np.arange(24) >= 21, np.ones(9), np.arange(17) % 2, np.arange(5) == 4]
    uneven = [{"tokens": t, "weights": m.astype(np.float32)} for t, m in zip(rows, masks, strict=True)]
    silent = [*uneven[:2], *({**row, "weights": row["weights"] * 0} for row in uneven[2:])]
    return {name: [all_rows[:2], all_rows[2:]] for name, all_rows in (("uneven", uneven), ("silent", silent))}


def chat_rows(model: str, count: int = 2, length: int = 64) -> list[dict[str, np.ndarray]]:
    """The first conversations of the quick start as the model's tokenizer and template give them."""
    from configs.load import load
    from convert.load import load_tokenizer
    from data.examples import open_examples

    data = load("quickstart", [f"data.max_length={length}"]).data
    examples = open_examples(data.train, load_tokenizer(resolve(model)), data)
    return [examples[i] for i in range(count)]


def ours(model: Path | str, micro: list[list[dict[str, Any]]], length: int, dtype: Any) -> tuple[float, dict[str, Any]]:
    """(loss, {transformers' or peft's name: gradient}) of one optimizer step of ours over the micro-batches."""
    source = resolve(model)
    params = load_params(source, dtype=np.dtype(dtype))
    lora = source.kind == "adapter"
    trainable, frozen = split(params, (lambda p: p.endswith(("/a", "/b"))) if lora else (lambda p: True))
    # what the optimizer is given is kept as its state
    keep = optax.GradientTransformation(
        lambda p: jax.tree.map(jnp.zeros_like, p), lambda g, _, p=None: (jax.tree.map(jnp.zeros_like, g), g)
    )
    dealt = [row for together in zip(*micro, strict=True) for row in together]  # as split_batch takes them apart
    filled = [fill_row([row], length) for row in dealt]
    batch = {name: jnp.asarray(np.stack([row[name] for row in filled])) for name in filled[0]}
    loss = partial(lm_loss, arch=source.arch, compute=Compute(dtype, "reference", "full"), chunk=32)
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        state = State(jnp.zeros((), jnp.int32), trainable, jax.jit(keep.init)(trainable))
        state, metrics = make_step(loss, lm_weights, keep, len(micro))(state, frozen, batch)
    grads = {path: np.asarray(g) for path, g in flatten(state.opt).items()}
    return float(metrics["loss"]), named(grads, source, lora)


def named(grads: dict[str, np.ndarray], source: Any, lora: bool) -> dict[str, np.ndarray]:
    """Our gradients under their names and in their layout (which moves numbers about, so it is right for both)."""
    if not lora:
        return {
            name: row.to_theirs(grads[row.ours][i] if row.stacked else grads[row.ours], source.arch)
            for row in table(source.arch)
            for i, name in enumerate(row.names(source.arch))
        }
    import tempfile

    from safetensors.numpy import load_file

    owners = sorted({path.rpartition("/")[0] for path in grads})
    pairs = {path: (grads[f"{path}/a"], grads[f"{path}/b"]) for path in owners}
    alpha = read_adapter_config(source.path).lora_alpha
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder) / "grads", pairs, source.arch, base="base", lora_alpha=alpha)
        return load_file(Path(folder) / "grads" / "adapter_model.safetensors")


def apart(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """norm(difference) / norm(gradient) of every leaf; both sides must have the same leaves."""
    assert found.keys() == expected.keys(), set(found) ^ set(expected)
    norm = lambda x: float(np.linalg.norm(np.asarray(x, np.float64)))  # noqa: E731
    return {
        name: norm(np.asarray(found[name], np.float64) - g) / norm(g) if norm(g) else norm(found[name])
        for name, g in expected.items()
    }


def digest(loss: float, grads: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """What a golden keeps of gradients: each one's norm and its largest entries."""
    kept: dict[str, np.ndarray] = {f"{prefix}/loss": np.float64(loss)}  # type: ignore[dict-item]
    for name, g in grads.items():
        flat = np.asarray(g, np.float64).ravel()
        at = np.argsort(-np.abs(flat), kind="stable")[:LARGEST]
        kept |= {
            f"{prefix}/{name}/norm": np.linalg.norm(flat),
            f"{prefix}/{name}/at": at.astype(np.int32),
            f"{prefix}/{name}/values": flat[at],
        }
    return kept


def compare(golden: Any, prefix: str, loss: float, grads: dict[str, np.ndarray]) -> dict[str, float]:
    """Relative differences from a golden: of the loss, of every gradient's norm and largest entries (over its norm)."""
    want = {key.removeprefix(prefix + "/"): golden[key] for key in golden if key.startswith(prefix + "/")}
    expected = float(want.pop("loss"))
    names = {key.rpartition("/")[0] for key in want}
    assert names == grads.keys(), names ^ set(grads)
    found = {"loss": abs(loss / expected - 1)}
    for name in names:
        flat, norm = np.asarray(grads[name], np.float64).ravel(), want[f"{name}/norm"]
        entries = np.abs(flat[want[f"{name}/at"]] - want[f"{name}/values"]).max()
        found[name] = float(max(abs(np.linalg.norm(flat) - norm), entries) / (norm or 1))
    return found
