"""The end of a run: a Hugging Face folder, or a PEFT adapter folder."""

import os
import shutil
import sys
from pathlib import Path

import jax

from configs.errors import UsageError
from convert.adapter import write_adapter
from convert.folder import check_free
from convert.hf import write_folder
from data.chat import end_of_turn
from data.tokenizer import Tokenizer
from model import lora
from model.tree import flatten
from train.setup import Job
from train.state import State


def export(job: Job, state: State, tokenizer: Tokenizer, folder: Path) -> None:
    """Write `folder` whole or not at all; adapters as an adapter, unless export.merge adds them into the weights."""
    run, params, config = job.run, job.params(state), job.source.config
    if job.arch.num_labels:
        tokenizer = tokenizer.with_pad(pad_of(tokenizer))
        config = {**config, "pad_token_id": tokenizer.pad_id}
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
            config=config,
            generation_config=None if job.arch.num_labels else job.source.generation_config,
            tokenizer=tokenizer,
            dtype=run.export.dtype,
            max_shard_bytes=run.export.max_shard_bytes,
            overwrite=True,
        )
    if jax.process_index() == 0:
        print(f"exported {folder}", file=sys.stderr)


def pad_of(tokenizer: Tokenizer) -> int:
    """A special token to pad with that ends no text: transformers reads a score at the last token that is not it."""
    ends = {*tokenizer.eos_ids, tokenizer.special_tokens.get(end_of_turn(tokenizer))}
    own = [tokenizer.pad_id] if tokenizer.pad_id is not None else []
    free = [index for index in [*own, *sorted(tokenizer.special_ids)] if index not in ends]
    if not free:
        raise UsageError(
            "the tokenizer's special tokens all end texts, so none can pad those of a reward model: transformers reads "
            "the score at the last token that is not padding; give the model a tokenizer with a padding token"
        )
    return free[0]


def check_export(folder: Path) -> None:
    """Raise UsageError when what lies at `folder` is no export, so would not be replaced: asked before training."""
    check_free(folder, overwrite=True)


def remove_export(folder: Path) -> None:
    """Remove an export; it loses its name first, so that half of one is never taken for a whole."""
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
        folder.rename(old)
        shutil.rmtree(old)
