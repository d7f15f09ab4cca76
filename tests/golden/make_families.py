"""Make tests/golden/families/*.npz: what transformers computes, in float64, from the tiny models. Extra `parity`.

python -m tests.golden.make_families [family ...]
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification
from transformers.core_model_loading import revert_weight_conversion

from tests.golden import families


class Double(TorchFunctionMode):
    """Where transformers asks for float32 (angles, norms, softmax, routers), it gets float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        wide = lambda x: torch.float64 if x is torch.float32 else x  # noqa: E731
        return func(*map(wide, args), **{key: wide(value) for key, value in (kwargs or {}).items()})


def write(folder: Path, config: dict[str, Any], weights: dict[str, np.ndarray] | None = None) -> Path:
    """A Hugging Face folder of a tiny model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = weights or families.tensors(config)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


ENCODERS = {"ForMaskedLM": AutoModelForMaskedLM, "ForSequenceClassification": AutoModelForSequenceClassification}


def name_of(folder: Path) -> str:
    """The class in a folder's config.json."""
    return json.loads((folder / "config.json").read_text())["architectures"][0]


def load(folder: Path, dtype: torch.dtype) -> Any:
    """transformers' model of a folder; no weight may be missing or left over."""
    of = next((auto for end, auto in ENCODERS.items() if name_of(folder).endswith(end)), AutoModelForCausalLM)
    model, info = of.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
        **({"experts_implementation": "eager"} if of is AutoModelForCausalLM else {}),
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    model.get_input_embeddings().padding_idx = None  # torch would drop the padding token's gradient in the lookup
    return model.eval()


def ask(model: Any) -> torch.Tensor:
    """Logits of the batch."""
    left = not type(model).__name__.endswith("ForSequenceClassification")
    b = {name: torch.tensor(column).long() for name, column in families.batch(left).items()}
    # dynamic RoPE goes by the longest sequence that the model has seen: the shorter row alone, then the longer one
    dynamic = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type") == "dynamic"
    outs = []
    for rows in ([1], [0]) if dynamic else ([0, 1],):
        some = {name: column[rows] for name, column in b.items()}
        where = {"attention_mask": some["segments"], "position_ids": some["positions"]}
        where |= {"token_type_ids": some["types"]} if model.config.model_type == "bert" else {"use_cache": False}
        outs.insert(0, model(some["tokens"], **where).logits)
    return torch.cat(outs)


def theirs(config: dict[str, Any]) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
    """(logits, mean loss, {the checkpoint's name: gradient}) of the golden's batch, all in float64."""
    torch.set_default_dtype(torch.float64)
    with tempfile.TemporaryDirectory() as scratch, Double():
        model = load(write(Path(scratch) / "tiny", config), torch.float64)
        for name, buffer in model.named_buffers():
            assert buffer.dtype != torch.float32, name
        b = {k: torch.tensor(v).long() for k, v in families.batch().items()}
        out = ask(model)
        assert out.dtype == torch.float64
        logp = torch.log_softmax(out, -1)
        if out.ndim == 2:  # of a classifier the rows' labels are 0 and 1
            loss = -(logp[0, 0] + logp[1, 1]) / 2
        else:
            chosen = logp.gather(2, b["targets"][..., None])[..., 0]
            loss = -chosen[b["weights"] > 0].sum() / b["weights"].sum()
        loss.backward()
    torch.set_default_dtype(torch.float32)
    grads = {name: p.grad for name, p in model.named_parameters()}
    named = {name: g.numpy() for name, g in revert_weight_conversion(model, grads).items()}
    return out.detach().numpy(), loss.item(), named


def make(name: str) -> None:
    """One family's golden."""
    file = families.FOLDER / f"{name}.npz"
    file.parent.mkdir(exist_ok=True)
    np.savez_compressed(file, **families.digest(*theirs(families.CONFIGS[name])))
    print(f"{file}: {file.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or families.CONFIGS:
        make(name)
