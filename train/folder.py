"""A run's folder: whether a run may go on in it, and what it holds from the start."""

import os
from pathlib import Path

from configs.errors import UsageError
from configs.load import diff, dump, load
from configs.schema import Run
from convert.folder import write_json, written_beside
from convert.run import START
from convert.source import Source
from data.tokenizer import Tokenizer
from train.export import check_export
from train.samples import read_samples

# Changing these does not change what is learnt, or only where it runs: a run may resume with other values.
MAY_CHANGE = (
    "output", "mesh", "log", "checkpoint", "export", "model.attention", "model.remat", "model.scan_unroll",
    "train.microbatches", "train.compilation_cache", "train.keep_memory", "train.eval_every", "train.eval_on_start",
    "train.eval_batches",
    "train.max_rollbacks", "train.profile_steps", "train.hang_timeout", "train.heartbeat_timeout",
    "train.join_timeout", "train.xla_flags", "data.prefetch", "data.eval",
    "objective.loss_chunk",
)  # fmt: skip


def check_same_run(run: Run, folder: Path) -> None:
    """Refuse a folder that cannot be written, or holds a run that this one would not continue; changes nothing."""
    path = folder / "config.yaml"
    inside = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not inside.is_dir():
        raise UsageError(f"output={folder}: {inside} is a file, a folder is to be written there")
    if not os.access(inside, os.W_OK):
        raise UsageError(f"output={folder}: {inside} may not be written to")
    if path.exists():
        if lines := [line for line in diff(load(path), run) if not line.startswith(MAY_CHANGE)]:
            said = f"{folder} holds a run with another config; choose another output=..., or restore:"
            raise UsageError("\n  ".join([said, *lines]))
    if run.export.enabled:
        check_export(folder / "export")
    if run.log.samples is not None:
        read_samples(Path(run.log.samples))


def keep_start(source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    """Write down what MODEL=RUN needs besides a checkpoint: presets and tokenizers may be elsewhere one day."""
    place = folder / START
    if not place.exists():
        with written_beside(place) as part:
            write_json(part / "config.json", source.config)
            if source.generation_config is not None:
                write_json(part / "generation_config.json", source.generation_config)
            tokenizer.save(part)


def record(run: Run, folder: Path) -> None:
    """Write config.yaml: from here on the folder is a run."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    beside = path.with_suffix(".tmp")
    beside.write_text(dump(run), encoding="utf-8")
    beside.replace(path)
