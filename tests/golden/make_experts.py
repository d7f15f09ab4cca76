"""The oracle of tests/golden/experts.py: transformers in float64. Needs the extra `parity`.

    python -m tests.golden.make_experts [family ...]
"""

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from convert.hf import write_folder
from model.architecture import Architecture
from model.families import architecture_from_hf
from model.rope import frequencies
from tests.golden import experts
from tests.golden.gemma3 import batch, digest


@contextlib.contextmanager
def widened() -> Iterator[None]:
    """What transformers computes in float32 for double models too (norms, RoPE's angles, softmax, routers) is computed
    in float64: there float32 means that."""
    names, float_ = ("float", "float32"), torch.Tensor.float
    kept = {name: getattr(torch, name) for name in names}
    try:
        for name in names:
            setattr(torch, name, torch.float64)
        torch.Tensor.float = torch.Tensor.double
        yield
    finally:
        for name, value in kept.items():
            setattr(torch, name, value)
        torch.Tensor.float = float_


def make_oracle(config: dict[str, Any], dtype: torch.dtype = torch.float64) -> Any:
    """transformers' model with the golden's weights, read from the folder that we write."""
    arch = architecture_from_hf(config)
    with tempfile.TemporaryDirectory() as folder:
        params = experts.params_of(arch, experts.tensors(config), np.float32)
        write_folder(Path(folder) / "model", params, arch, config=config)
        model = AutoModelForCausalLM.from_pretrained(
            Path(folder) / "model", dtype=dtype, attn_implementation="eager", experts_implementation="eager"
        ).eval()
    if dtype == torch.float64:  # the frequencies are made in float32: these are checked, then replaced
        rotary = model.model.rotary_emb
        known = torch.tensor(frequencies(arch.rope, rotated(arch)))
        np.testing.assert_allclose(rotary.inv_freq.double(), known, rtol=1e-6)
        model = model.double()
        rotary.inv_freq = known
    return model


def rotated(arch: Architecture) -> int:
    """How many numbers of a head there are for RoPE."""
    return arch.head_dim if arch.latent is None else arch.latent.rope_dim


def theirs(model: Any) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
    """(logits, mean loss, {name in a checkpoint: gradient}) of the golden's batch."""
    b = {k: torch.tensor(v).long() for k, v in batch().items()}
    model.get_input_embeddings().padding_idx = None
    with widened() if model.dtype == torch.float64 else contextlib.nullcontext():
        out = model(b["tokens"], attention_mask=b["segments"], position_ids=b["positions"]).logits
        logp = torch.log_softmax(out, -1).gather(2, b["targets"][..., None])[..., 0]
        loss = -logp[b["weights"] > 0].sum() / b["weights"].sum()
        loss.backward()
    grads = {name: p.grad.numpy() for name, p in model.named_parameters()}
    return out.detach().numpy(), loss.item(), apart(grads, model.config.model_type)


def apart(grads: dict[str, np.ndarray], family: str) -> dict[str, np.ndarray]:
    """transformers' stacked experts by the names that checkpoints have for each."""
    if family == "gpt_oss":  # stacked there, too
        return grads
    gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    made = {}
    for name, g in grads.items():
        stem = name.rpartition(".experts.")[0]
        if name.endswith(".experts.gate_up_proj"):
            for e, whole in enumerate(g):
                made[f"{stem}.experts.{e}.{gate}.weight"], made[f"{stem}.experts.{e}.{up}.weight"] = np.split(whole, 2)
        elif name.endswith(".experts.down_proj"):
            made |= {f"{stem}.experts.{e}.{down}.weight": whole for e, whole in enumerate(g)}
        else:
            made[name] = g
    old = family == "mixtral"
    return {name.replace(".mlp.", ".block_sparse_moe.") if old else name: g for name, g in made.items()}


if __name__ == "__main__":
    torch.set_num_threads(2)
    for family in sys.argv[1:] or experts.CONFIGS:
        file = experts.FOLDER / f"{family}.npz"
        np.savez_compressed(file, **digest(*theirs(make_oracle(experts.CONFIGS[family]))))
        print(f"{file}: {file.stat().st_size / 1e3:.0f} kB")
