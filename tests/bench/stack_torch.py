"""The peers as workers: `bare | compiled | peft | trl_default | trl_packed MODEL DUMP [checkpointing]`, and
`trl_dpo | trl_dpo_cached MODEL PAIRS [checkpointing]`.

TRL runs its own trainer; a callback waits for the next command before each of its steps. DUMP receives the first
batch as npz, so that our loss of the same tokens can be compared.
"""

import json
import os
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch

from tests.bench import rows
from tests.bench.duel import GEMM, peak_gib, reply, serve, timed

torch.set_num_threads(len(os.sched_getaffinity(0)))


def gemm() -> dict[str, float]:
    m, k, n = GEMM
    x, w = torch.ones(m, k), torch.ones(n, k)  # [out, in], as torch keeps a linear weight
    torch.nn.functional.linear(x, w)
    return timed(lambda: [torch.nn.functional.linear(x, w) for _ in range(20)] and None)


def load(model: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")


def dump(path: str, inputs: dict[str, Any]) -> None:
    names = ("input_ids", "labels", "position_ids", "attention_mask")
    np.savez(path, **{name: inputs[name].numpy() for name in names if isinstance(inputs.get(name), torch.Tensor)})


def predicted(labels: Any) -> float:
    return float((labels[:, 1:] != -100).sum())


def bare(kind: str, model: str, path: str) -> None:
    """A plain torch loop: full rows, AdamW, clipping; `compiled` under torch.compile; `peft` with LoRA adapters."""
    net = load(model)
    if kind == "peft":
        from peft import LoraConfig, get_peft_model

        net = get_peft_model(net, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    net.train()
    weights = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, weight_decay=0.0, fused=True)
    if kind == "compiled":
        net = torch.compile(net)
    tokens = np.stack([e["tokens"] for e in rows.full()]).astype(np.int64)
    data = torch.tensor(tokens).split(rows.ROWS)
    taken = [0]

    def one() -> dict[str, float]:
        ids = data[taken[0] % len(data)]
        if not taken[0]:
            dump(path, {"input_ids": ids, "labels": ids})
        taken[0] += 1
        loss = net(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss.item(), "tokens": predicted(ids)}

    reply({"torch": torch.__version__, "trained": sum(p.numel() for p in weights)})
    serve({"step": lambda: timed(one), "gemm": gemm, "memory": peak_gib})


def in_turn(seen: dict[str, Any]) -> Any:
    """A callback that waits for commands before each of a trainer's steps; tokens and loss of a step are in `seen`."""
    from transformers import TrainerCallback

    class InTurn(TrainerCallback):
        """Answer commands until the next step is asked for; then let the trainer go on."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            for line in sys.stdin:
                what = json.loads(line)["do"]
                if what == "step":
                    self.start = time.perf_counter(), time.process_time()
                    return
                reply({"gemm": gemm, "memory": peak_gib}[what]())
            os._exit(0)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds, cpu = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
            reply({"seconds": seconds, "cpu": cpu, **seen})

    return InTurn()


def trl(kind: str, model: str, path: str, checkpointing: bool) -> None:
    import transformers
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

    examples = rows.uneven()
    data = Dataset.from_dict({"input_ids": [e["tokens"].tolist() for e in examples]})
    seen: dict[str, Any] = {}

    class Trainer(SFTTrainer):
        """SFTTrainer, watched: what it trains on and the loss it finds."""

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if not seen:
                dump(path, inputs)
            seen["tokens"] = predicted(inputs["labels"])
            result = super().compute_loss(model, inputs, *args, **kwargs)
            seen["loss"] = float(result[0] if isinstance(result, tuple) else result)
            return result

    config = SFTConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, max_steps=10_000, max_length=rows.LENGTH + 1,
        per_device_train_batch_size=rows.ROWS, packing=kind == "trl_packed", gradient_checkpointing=checkpointing,
        learning_rate=1e-5, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, report_to=[],
        save_strategy="no", logging_steps=10_000, disable_tqdm=True, dataset_num_proc=None,
    )  # fmt: skip
    trainer = Trainer(
        model=load(model), args=config, train_dataset=data, callbacks=[in_turn(seen)],
        processing_class=AutoTokenizer.from_pretrained(model),
    )  # fmt: skip
    reply({"torch": torch.__version__, "transformers": transformers.__version__, "checkpointing": checkpointing})
    trainer.train()


def prefer(kind: str, model: str, path: str, checkpointing: bool) -> None:
    """TRL's DPOTrainer on pairs of tokens: its reference a copy of the model, or computed beforehand (`_cached`)."""
    import transformers
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer  # type: ignore[attr-defined]

    made = [{name.replace("_tokens", "_ids"): tokens for name, tokens in pair.items()} for pair in rows.read(path)]
    seen: dict[str, Any] = {}

    class Trainer(DPOTrainer):
        """DPOTrainer, watched; the data has been prepared."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen["tokens"], seen["pairs"] = float(inputs["attention_mask"].sum()), len(inputs["attention_mask"]) / 2
            result = super().compute_loss(model, inputs, *args, **kwargs)
            seen["loss"] = float(result[0] if isinstance(result, tuple) else result)
            return result

    config = DPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, max_steps=10_000, max_length=None,
        per_device_train_batch_size=rows.ROWS, precompute_ref_log_probs=kind.endswith("cached"),
        gradient_checkpointing=checkpointing, learning_rate=1e-6, lr_scheduler_type="constant", weight_decay=0.0,
        max_grad_norm=1.0, report_to=[], save_strategy="no", logging_steps=10_000, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model=load(model), args=config, train_dataset=Dataset.from_list(made), callbacks=[in_turn(seen)],
        processing_class=AutoTokenizer.from_pretrained(model),
    )  # fmt: skip
    reply({"torch": torch.__version__, "transformers": transformers.__version__, "checkpointing": checkpointing})
    trainer.train()


def reinforce(model: str, path: str, prompts: int, generations: int, length: int) -> None:
    """TRL's GRPOTrainer with its own generate, on prompts; completions never end early."""
    import transformers
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer  # type: ignore[attr-defined]

    seen: dict[str, Any] = {"tokens": float(prompts * generations * length)}

    class Trainer(GRPOTrainer):
        """GRPOTrainer, watched."""

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            result = super().compute_loss(model, inputs, *args, **kwargs)
            seen["loss"] = float(result[0] if isinstance(result, tuple) else result)
            return result

        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            made = super()._generate(*args, **kwargs)
            seen["time/rollout"] = time.perf_counter() - began
            return made

    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, max_steps=10_000, num_generations=generations,
        per_device_train_batch_size=prompts * generations, max_completion_length=length,
        generation_kwargs={"min_new_tokens": length}, gradient_checkpointing=False, learning_rate=1e-6,
        lr_scheduler_type="constant", max_grad_norm=1.0, report_to=[], save_strategy="no", logging_steps=10_000,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model=load(model), args=config, train_dataset=Dataset.from_list(rows.read(path)), callbacks=[in_turn(seen)],
        processing_class=AutoTokenizer.from_pretrained(model), reward_funcs=rows.letters,
    )  # fmt: skip
    reply({"torch": torch.__version__, "transformers": transformers.__version__})
    trainer.train()


if __name__ == "__main__":
    kind, model, path, *rest = sys.argv[1:]
    if kind == "trl_grpo":
        reinforce(model, path, *map(int, rest))
    elif kind.startswith("trl_dpo"):
        prefer(kind, model, path, "checkpointing" in rest)
    else:
        trl(kind, model, path, "checkpointing" in rest) if kind.startswith("trl") else bare(kind, model, path)
