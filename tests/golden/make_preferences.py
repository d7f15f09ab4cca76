"""Make preferences.npz: losses and gradients of TRL's DPOTrainer, CPOTrainer and ORPOTrainer. Needs the extra `parity`.

    python -m tests.golden.make_preferences

The tiny model with an adapter, in float64; the reference of DPO is the model without it.
"""

import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from tests.golden import make_sft, preferences, sft
from tests.parity.test_dpo_parity import CASES, rows, theirs


def reference_free(
    folder: Path, adapter: Path, pairs: Any, beta: float, **options: Any
) -> tuple[float, dict[str, Any]]:
    """(loss, {name: gradient}) by CPOTrainer's forward pass, loss and likelihood of the completions.

    ORPO: by ORPOTrainer's odds ratio; its own likelihood counts the prompts too, so CPO's stands in for it.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    model = make_sft.in_double(model, folder)
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True, autocast_adapter_dtype=False).double()
    settings = {"label_smoothing": 0.0, "simpo_gamma": 0.0, "alpha": 0.0, **options}
    stub = SimpleNamespace(
        beta=beta, is_encoder_decoder=False, aux_loss_enabled=False, pad_token_id=0,
        concatenated_inputs=CPOTrainer.concatenated_inputs, get_batch_logps=CPOTrainer.get_batch_logps,
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x),
        **settings,
    )  # fmt: skip
    batch: dict[str, torch.Tensor] = {}
    for at, side in enumerate(("chosen", "rejected"), 1):
        ids = [torch.tensor([*pair[0], *pair[at]]) for pair in pairs]
        labels = [torch.tensor([-100] * len(pair[0]) + pair[at]) for pair in pairs]
        batch |= {
            f"{side}_input_ids": pad_sequence(ids, batch_first=True),
            f"{side}_attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
            f"{side}_labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }
    stub.concatenated_forward = partial(CPOTrainer.concatenated_forward, stub)
    stub.cpo_loss = partial(CPOTrainer.cpo_loss, stub)
    if stub.loss_type == "orpo":
        stub.loss_type = "simpo"  # means of log-probs
        chosen, rejected, _, _, likelihood = stub.concatenated_forward(model, batch)
        loss = stub.cpo_alpha * likelihood - ORPOTrainer.odds_ratio_loss(stub, chosen, rejected)[0].mean()
    else:
        loss, _ = CPOTrainer.get_batch_loss_metrics(stub, model, batch)
    loss.backward()
    named = {name.replace(".default.weight", ".weight"): p for name, p in model.named_parameters() if p.requires_grad}
    return loss.item(), {name: p.grad.numpy() for name, p in named.items()}


def main() -> None:
    """Run the oracles and write the file."""
    torch.set_num_threads(2)
    kept: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = sft.make_tiny(Path(scratch) / "tiny")
        adapter = sft.make_adapter(Path(scratch) / "adapter", folder)
        for name, options in CASES.items():
            found = theirs(make_sft, folder, adapter, rows(), torch.float64, beta=preferences.BETA, **options)
            kept |= preferences.digest(*found[:2], name)
        for name, (options, _) in preferences.FREE.items():
            kept |= preferences.digest(*reference_free(folder, adapter, rows(), **options), name)
    np.savez_compressed(preferences.FILE, **kept)
    print(f"{preferences.FILE}: {preferences.FILE.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
