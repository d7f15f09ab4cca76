"""A recipe's job as shapes on a target's devices: everything that training would have, but no weights and no data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from configs.presets import presets, read_preset
from configs.schema import Run
from convert.load import Source, open_start, resolve
from convert.vocabulary import grow
from data.examples import KINDS
from data.pack import fill_row
from model.families import architecture_from_hf
from sharding.place import batch_shardings
from sharding.platform import targeting
from train.groups import COLUMNS as SAMPLED
from train.groups import portion_of as portion_of_samples
from train.planner.targets import Target, devices_of
from train.recipes import kind_of
from train.setup import Job, Portion, abstract_params, job_of, lay_out, portion_of, with_head
from train.state import State

VOCABULARY = 128256  # Llama 3's: of a preset, where no tokenizer says another


@dataclass(frozen=True)
class Planned:
    """What is compiled, and the target that it is for."""

    target: Target
    job: Job
    state: State
    batch: dict[str, jax.ShapeDtypeStruct]
    assumed: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Positions that a step computes at most."""
        return self.batch["tokens"].size

    @property
    def tokens_per_device(self) -> int:
        """Of them, those of one device and micro-batch."""
        x = self.batch["tokens"]
        assert x.sharding is not None
        rows, length = x.sharding.shard_shape(x.shape)
        return rows * length // self.job.portion.microbatches


def make_abstract(run: Run, target: Target, devices: list[Any] | None = None) -> Planned:
    """The job of a recipe on a target, of shapes with their shardings; UsageError for what cannot be laid out."""
    source, assumed = shape_of_source(run)
    source = with_head(run, source)
    with targeting(target.chip.kind):
        mesh, rules, compute = lay_out(run, source, devices or devices_of(target))
        if kind_of(run.objective) == "rollout":
            longest = run.data.max_length + 1 - run.sample.max_new_tokens
            portion = portion_of_samples(run, longest, mesh, rules)
            assumed = (*assumed, "every prompt as long as a row allows")
        else:
            portion = portion_of(run)
        with jax.set_mesh(mesh):
            params = abstract_params(source.arch, mesh, rules, jnp.dtype(run.model.param_dtype))
            steps = run.train.steps or 1000  # of the schedule: its constants alone
            job, state = job_of(run, source, mesh, rules, compute, steps, params, portion)
    return Planned(target, job, state, abstract_batch(job, portion), assumed)


def shape_of_source(run: Run) -> tuple[Source, tuple[str, ...]]:
    """The model that a run starts from, known by its config alone, and what had to be assumed of it."""
    name, words = run.model.source, run.model.tokenizer
    if name in presets() and words is None:
        arch = architecture_from_hf({**read_preset(name), "vocab_size": VOCABULARY})
        return Source("new", name, Path(name), arch, {}, None), (
            f"a vocabulary of {VOCABULARY:,} (model.tokenizer says another)",
        )
    if name in presets() or run.model.init == "random":
        return open_start({**run.model.model_dump(), "init": "random"}, run.train.seed), ()
    source = resolve(name, weights=False)
    if run.model.resize_vocab and words is not None:
        from convert.load import open_tokenizer

        source = grow(source, open_tokenizer(words).vocab_size)
    return source, ()


def abstract_batch(job: Job, portion: Portion) -> dict[str, jax.ShapeDtypeStruct]:
    """The columns of a batch, as the feed of this objective makes them."""
    run, kind = job.run, kind_of(job.run.objective)
    more = SAMPLED if kind == "rollout" else KINDS[kind].columns
    columns = {name: x.dtype for name, x in fill_row([], run.data.max_length, 0, more).items()}
    if kind == "rollout":
        del columns["completions"]  # read before the step
        wanted = ["advantages"]
        if run.objective.num_iterations * run.objective.steps_per_generation > 1:
            wanted.append("old_logprobs")
        if run.objective.needs_reference:
            wanted.append("ref_logprobs")
    else:
        wanted = ["ref_logprobs"] if job.recipe.reference is not None else []
    columns |= {name: jnp.dtype(jnp.float32) for name in wanted}
    rows = portion.rows * portion.microbatches
    shapes = {name: jax.ShapeDtypeStruct((rows, run.data.max_length), kind) for name, kind in columns.items()}
    where = batch_shardings(shapes, job.mesh, job.rules)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[name]) for name, x in shapes.items()}


def changed(planned: Planned, run: Run) -> Planned:
    """The same target with another run, on the same devices."""
    return make_abstract(run, planned.target, list(planned.job.mesh.devices.flat))


def lower(planned: Planned) -> Any:
    """The step of the job, traced for the target."""
    job = planned.job
    with targeting(planned.target.chip.kind), jax.set_mesh(job.mesh):
        step: Any = job.step_for(planned.state)  # jitted
        return step.lower(planned.state, job.frozen, planned.batch)
