"""The end of a run: a Hugging Face folder, or a PEFT adapter folder."""

import os
import shutil
import sys
from pathlib import Path

import jax

from convert.adapter import write_adapter
from convert.folder import check_free
from convert.hf import write_folder
from data.tokenizer import Tokenizer
from model import lora
from model.tree import flatten
from train.setup import Job
from train.state import State


def export(job: Job, state: State, tokenizer: Tokenizer, folder: Path) -> None:
    """Write `folder` whole or not at all; adapters as an adapter, unless export.merge adds them into the weights."""
    run, params = job.run, job.params(state)
    if run.tune.method == "lora" and not run.export.merge:
        trained = flatten(state.params)
        owners = [p.removesuffix("/a") for p in trained if p.endswith("/a")]
        adapter = {p: (trained[f"{p}/a"], trained[f"{p}/b"]) for p in owners}
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
        write_folder(
            folder,
            jax.jit(lora.merge)(params) if run.tune.method == "lora" else params,
            job.arch,
            config=job.source.config,
            generation_config=job.source.generation_config,
            tokenizer=tokenizer,
            dtype=run.export.dtype,
            max_shard_bytes=run.export.max_shard_bytes,
            overwrite=True,
        )
    if jax.process_index() == 0:
        print(f"exported {folder}", file=sys.stderr)


def check_export(folder: Path) -> None:
    """Raise UsageError when what lies at `folder` is no export, so would not be replaced: asked before training."""
    check_free(folder, overwrite=True)


def remove_export(folder: Path) -> None:
    """Remove an export; it loses its name first, so that half of one is never taken for a whole."""
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
        folder.rename(old)
        shutil.rmtree(old)
