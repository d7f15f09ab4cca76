"""The end of a run: a Hugging Face folder, or a PEFT adapter folder."""

import re
import sys
from pathlib import Path

import jax

from convert.adapter import write_adapter
from convert.hf import write_folder
from data.tokenizer import Tokenizer
from model import lora
from model.tree import flatten
from train.setup import Job
from train.state import State

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def export(job: Job, state: State, tokenizer: Tokenizer, folder: Path) -> None:
    """Write `folder` whole or not at all; adapters as an adapter, unless export.merge adds them into the weights."""
    run, params = job.run, job.params(state)
    if run.tune.method == "lora" and not run.export.merge:
        trained = flatten(state.params)
        adapter = {p.removesuffix("/a"): (trained[p], trained[p.removesuffix("a") + "b"]) for p in trained if p.endswith("/a")}
        write_adapter(
            folder,
            adapter,
            job.arch,
            base=run.model.source,
            lora_alpha=run.tune.lora_alpha,
            use_rslora=run.tune.use_rslora,
            dtype=run.export.dtype,
            tokenizer=tokenizer,
            overwrite=True,
        )
    else:
        number, unit = re.fullmatch(r"(\d+)(\w+)", run.export.max_shard_size).groups()  # type: ignore[union-attr]
        write_folder(
            folder,
            jax.jit(lora.merge)(params) if run.tune.method == "lora" else params,
            job.arch,
            config=job.source.config,
            generation_config=job.source.generation_config,
            tokenizer=tokenizer,
            dtype=run.export.dtype,
            max_shard_bytes=int(number) * UNITS[unit],
            overwrite=True,
        )
    if jax.process_index() == 0:
        print(f"exported {folder}", file=sys.stderr)
