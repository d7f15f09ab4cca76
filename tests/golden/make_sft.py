"""Make sft.npz: losses and gradients of TRL's SFTTrainer. Needs the extra `parity`.

    python -m tests.golden.make_sft

Tiny model, full and LoRA, in float64: two micro-batches with very uneven masks, and a window in which one micro-batch
has no trained token. SmolLM2-135M-Instruct in float32: two conversations of the quick start.
"""

import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from convert.hf import write_folder
from convert.load import load_params, load_tokenizer, resolve
from model.rope import frequencies
from tests.golden import sft


def in_double(model: Any, folder: Path) -> Any:
    """The oracle in float64 throughout: transformers computes RoPE's angles and RMSNorm in float32 for double models
    too (1e-6 off), so these two are replaced; the frequencies are checked against its own first."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    arch, model = resolve(folder).arch, model.double()
    rotary, frequency = model.model.rotary_emb, torch.tensor(np.asarray(frequencies(arch.rope, arch.head_dim)))
    np.testing.assert_allclose(rotary.inv_freq.double(), frequency, rtol=1e-6)

    def rotate(x, position_ids, layer_type=None):
        angles = position_ids[..., None].double() * frequency
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()

    rotary.forward = rotate
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            double = torch.nn.RMSNorm(arch.d_model, module.variance_epsilon, dtype=torch.float64)
            double.weight = module.weight
            module.forward = double.forward
    return model


class ExactLogProbs:
    """TRL's chunked log-probs without chunks, in the dtype of the hidden states: its own works in float32 always."""

    @staticmethod
    def apply(hidden, weight, bias, labels, temperature, chunk, softcap, scale, outputs):
        """(log-probs of the labels, entropy, log of the sum of p^2, mean logit, whether the label is the likeliest)."""
        assert bias is None
        assert softcap is None
        assert scale == 1
        logits = hidden @ weight.T / temperature
        logp = torch.log_softmax(logits, -1)
        entropy = -(logp.exp() * logp).sum(-1)
        chosen, squares = logp.gather(1, labels[:, None])[:, 0], torch.logsumexp(2 * logp, -1)
        return chosen, entropy, squares, logits.mean(-1), logp.argmax(-1) == labels


def theirs(
    folder: Path, micro: list[list[dict[str, Any]]], dtype: torch.dtype, adapter: Path | None = None
) -> tuple[float, dict[str, np.ndarray]]:
    """(loss, {name: gradient}): SFTTrainer's own collator, count of the window's tokens, compute_loss; then backward.

    torch's Embedding drops the lookup's gradient of `padding_idx`; SmolLM2 pads with its end of turn, which would
    then learn from the head's side only. It is switched off: the gradient is that of the loss.
    """
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    from trl.trainer import utils

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    model.get_input_embeddings().padding_idx = None
    if dtype == torch.float64:
        model = in_double(model, folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True, autocast_adapter_dtype=False).to(dtype)
    rows = [
        {"input_ids": row["tokens"].tolist(), "labels": np.where(row["weights"] > 0, row["tokens"], -100).tolist()}
        for together in micro
        for row in together
    ]
    with tempfile.TemporaryDirectory() as scratch:
        config = SFTConfig(
            scratch, use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None, report_to=[],
            per_device_train_batch_size=len(micro[0]), gradient_accumulation_steps=len(micro),
            dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        trainer = SFTTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    size = len(micro[0])
    batches = [trainer.data_collator(rows[i : i + size]) for i in range(0, len(rows), size)]
    count = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    model.train()
    total = 0.0
    kernel = ExactLogProbs if dtype == torch.float64 else utils._ChunkedLogProbFunction
    with mock.patch.object(utils, "_ChunkedLogProbFunction", kernel):
        for batch in batches:
            loss = trainer.compute_loss(model, batch, num_items_in_batch=count)
            loss.backward()
            total += loss.item()
    grads = {
        name.replace(".default.weight", ".weight"): p.grad.numpy()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return total, grads


def export_real(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder."""
    source = resolve("smollm2-135m-instruct")
    tokenizer = load_tokenizer(source)
    write_folder(folder, load_params(source), source.arch, config=source.config, tokenizer=tokenizer, dtype="float32")
    return folder


def main() -> None:
    """Run the oracle and write the file."""
    torch.set_num_threads(2)
    kept: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = sft.make_tiny(Path(scratch) / "tiny")
        adapter = sft.make_adapter(Path(scratch) / "adapter", folder)
        for name, micro in sft.windows().items():
            for method, path in (("full", None), ("lora", adapter)):
                kept |= sft.digest(*theirs(folder, micro, torch.float64, path), f"{name}/{method}")
        rows = sft.chat_rows("smollm2-135m-instruct")
        for i, row in enumerate(rows):
            kept |= {f"rows/{i}/tokens": row["tokens"], f"rows/{i}/weights": row["weights"]}
        kept |= sft.digest(*theirs(export_real(Path(scratch) / "real"), [rows], torch.float32), "smollm2/full")
    np.savez_compressed(sft.FILE, **kept)
    print(f"{sft.FILE}: {sft.FILE.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
