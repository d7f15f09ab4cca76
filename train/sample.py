"""Completions made by a model, scored, and the best of them kept as data to train on (`purestep sample`)."""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs.errors import UsageError
from configs.load import flatten
from configs.sample import Sample
from configs.schema import Run
from convert.load import load_tokenizer, resolve
from data.prompts import Prompt, read_prompts
from decode.generate import Completion, Sampling, Stats, generate
from decode.jsonl import dump_row, rows_bar, write_rows
from decode.load import Model, load_model
from decode.prompts import check_row
from decode.sampling import SEEDS
from model.lora import merge
from model.weights import Lora
from sharding.compile_cache import enable_compilation_cache
from sharding.mesh import make_mesh
from train.marks import differences
from train.rewards import Rewards, Score, judge_completions, load_rewards, weights_of
from train.score import checksums
from train.selection import Row, describe, keep, summarise
from train.setup import source_of

SAMPLES = "samples.jsonl"
PER_CALL = 4  # times sample.batch_size: completions between two lines on disk, in which slots are refilled
# What says how the file of samples is read, or how fast it is made: it may be changed without sampling anew.
CHOOSING = tuple(
    f"sample.{name}"
    for name in (
        "reward_weights", "reward_timeout", "reward_workers", "missing_eos_penalty", "keep", "keep_n", "min_margin",
        "threshold", "min_pass_rate", "max_pass_rate", "finished_only", "min_tokens", "max_tokens", "min_perplexity",
        "max_perplexity", "max_similarity",
    )
)  # fmt: skip


def sample(run: Run) -> Path:
    """Sample, score and keep, or what is left of it; returns the file of what is kept."""
    if run.train.compilation_cache:
        enable_compilation_cache()
    weights_of(run.sample)
    prompts, folder = open_prompts(run, run.data.train), Path(run.output)
    rewards = load_rewards(run.sample, prompts)
    rows = make_samples(run, load_policy(run), rewards, prompts, folder / SAMPLES)
    print(describe(summarise(rows, run.sample)), file=sys.stderr)
    return keep(rows, run.sample, policy_of(run), folder)


def policy_of(run: Run) -> str:
    """The MODEL that a run starts from."""
    return run.tune.init_adapter or run.model.source


def open_prompts(run: Run, paths: Sequence[str]) -> list[Prompt]:
    """The prompts of files; one that does not fit the model's context with its completion is refused."""
    if jax.process_count() > 1:
        raise UsageError(f"there are {jax.process_count()} processes: sampling runs in one")
    source = resolve(run.tune.init_adapter) if run.tune.init_adapter else source_of(run)
    prompts, skipped = read_prompts(paths, load_tokenizer(source), run.data)
    for prompt in prompts:
        arch = source.arch
        check_row(prompt.tokens, arch.vocab_size, arch.max_position, prompt.where, run.sample.max_new_tokens)
    if skipped:
        print(f"{skipped} malformed rows are skipped (data.on_bad_row)", file=sys.stderr)
    return prompts


def load_policy(run: Run) -> Model:
    """The model that a run starts from, ready to decode; adapters are added into the weights, which is faster."""
    mesh = make_mesh(run.mesh.shape, None, run.mesh.dcn)
    model = load_model(
        run.tune.init_adapter or source_of(run),
        dtype=run.model.dtype,
        attention=run.model.attention,
        mesh=mesh if mesh.size > 1 else None,
    )
    if any(isinstance(x, Lora) for x in jax.tree.leaves(model.params, is_leaf=lambda x: isinstance(x, Lora))):
        model = replace(model, params=jax.jit(merge)(model.params))
    return model


def make_samples(run: Run, model: Model, rewards: Rewards, prompts: Sequence[Prompt], path: Path) -> list[Row]:
    """One row a prompt, with its completions and their rewards, also written to `path` when all are there.

    An unfinished file, under another name until then, is gone on with; one made otherwise is refused.
    """
    marks, beside = _marks(run, model, prompts), path.with_suffix(".part")
    _check_same(path, marks)
    if path.exists():
        return read_samples(path)
    chosen, k = run.sample, run.sample.num_generations
    at_once = max(1, PER_CALL * chosen.batch_size // k)  # prompts
    rows = _whole(beside, at_once)
    with rows_bar("sampling", len(prompts) * k) as progress, open(beside, "a", encoding="utf-8") as file:
        progress(len(rows) * k)
        for start in range(len(rows), len(prompts), at_once):
            some = prompts[start : start + at_once]
            seeds = [(chosen.seed + start + i) % SEEDS for i in range(len(some))]
            made = complete(model, chosen, some, seeds, progress=progress)
            scores = judge_completions(rewards, some, made).scores
            more = list(map(as_row, some, seeds, made, scores))
            file.write("".join(dump_row(row) + "\n" for row in more))
            file.flush()
            rows += more
    for counts, what in ((rewards.failed, "failed on {} completions: not judged"), (rewards.late, "was late on {}: 0")):
        for name, count in counts.items():
            print(f"reward '{name}' {what.format(count)}", file=sys.stderr)
    beside.replace(path)
    return rows


def complete(
    model: Model,
    sample: Sample,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    *,
    progress: Callable[[int], None] = lambda rows: None,
    stats: Stats | None = None,
    scaled_logprobs: bool = False,
) -> list[list[Completion]]:
    """sample.num_generations completions of each prompt."""
    k = sample.num_generations
    sampling = Sampling(
        sample.max_new_tokens, temperature=sample.temperature, top_p=sample.top_p, top_k=sample.top_k,
        min_p=sample.min_p, num_return_sequences=k, scaled_logprobs=scaled_logprobs,
        # rows that pad the embedding stand for no text: nothing could be trained on them
        suppress_tokens=tuple(range(model.tokenizer.vocab_size, model.arch.vocab_size)),
    )  # fmt: skip
    tokens = [prompt.tokens for prompt in prompts]
    flat = generate(model, tokens, sampling, seeds=seeds, batch_size=sample.batch_size, progress=progress, stats=stats)
    return [flat[i : i + k] for i in range(0, len(flat), k)]


def as_row(prompt: Prompt, seed: int, made: Sequence[Completion], scores: Sequence[Mapping[str, Score]]) -> Row:
    """A prompt with its completions and their rewards, as files of samples hold them."""
    completions = [
        {
            "text": one.text,
            "tokens": one.tokens,
            "logprob": one.score,
            "finish_reason": one.finish_reason,
            "rewards": score,
        }
        for one, score in zip(made, scores, strict=True)
    ]
    return {"prompt": prompt.value, "prompt_tokens": prompt.tokens, "seed": seed, "completions": completions}


def _marks(run: Run, model: Model, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What samples depend on: the knobs, the prompts, the weights."""
    wanted = ("model.source", "model.dtype", "model.attention", "data.chat_template", "tune.init_adapter", "sample.")
    knobs = {key: value for key, value in flatten(run).items() if key.startswith(wanted) and key not in CHOOSING}
    said = json.dumps([[p.tokens, p.columns] for p in prompts], sort_keys=True, default=str)
    digest = hashlib.sha256()
    for value in jax.tree.leaves(jax.device_get(jax.jit(checksums)(model.params))):
        digest.update(np.asarray(value).tobytes())
    return {**knobs, "prompts": hashlib.sha256(said.encode()).hexdigest(), "weights": digest.hexdigest()}


def _check_same(path: Path, marks: Mapping[str, Any]) -> None:
    """Refuse to go on with samples that were made otherwise; write down how these are."""
    note = path.with_suffix(".json")
    try:
        if note.exists():
            old = json.loads(note.read_text(encoding="utf-8"))
            if lines := differences(old, json.loads(json.dumps(marks))):
                what = f"{path.parent} holds samples made otherwise; choose another output=..., or restore:"
                raise UsageError("\n  ".join([what, *lines]))
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = note.with_suffix(".tmp")
        beside.write_text(json.dumps(marks, ensure_ascii=False, indent=1), encoding="utf-8")
        beside.replace(note)
    except OSError as error:
        raise UsageError(f"output={path.parent} cannot be written: {error.strerror}") from error


def _whole(path: Path, at_once: int) -> list[Row]:
    """The rows of whole calls in an unfinished file; what follows them is cut off."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        del rows[len(rows) // at_once * at_once :]
        write_rows(str(path), rows)
    return rows


def read_samples(path: Path) -> list[Row]:
    """The rows of a finished file of samples."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
