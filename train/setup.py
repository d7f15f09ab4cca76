"""From a validated Run to everything the loop needs: mesh, placed weights, surgery, optimizer, state, step."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from configs.errors import UsageError
from configs.schema import Run
from convert.adapter import check_adapters, read_adapter, read_adapter_config
from convert.heads import check_language, with_scores
from convert.load import Source, load_params, open_start, stored_dtype
from model import lora
from model.architecture import Architecture
from model.compute import Compute
from model.context import check_rows
from model.pipeline import AXIS, check_schedule, check_stages
from model.transformer import declare, nest
from model.tree import flatten, join, select, split
from model.weights import Lora
from sharding.mesh import make_mesh
from sharding.place import born, check_host_memory, fetch, is_abstract, placer, weight_sharding
from sharding.platform import platform
from sharding.rules import Rules, make_rules
from train.guard import Guard
from train.mesh_choice import choose, tell
from train.optim import averaged, make_optimizer, make_schedule
from train.recipes import Recipe, kind_of, make_recipe, scores_of
from train.state import State, init_state, shardings_of
from train.statistics import group_norms
from train.step import Step, guarded, make_eval, make_step

Tree = Any


@dataclass(frozen=True)
class Portion:
    """How much of a batch is computed at a time: rows, over all devices, and how many such parts there may be."""

    rows: int
    microbatches: int


def portion_of(run: Run) -> Portion:
    """A batch of stored examples in equal parts."""
    return Portion(run.train.batch_size // run.train.microbatches, run.train.microbatches)


@dataclass(frozen=True)
class Job:
    """A run made concrete. Nothing here changes while it trains but the state, which lives in the loop."""

    run: Run
    source: Source
    arch: Architecture
    compute: Compute
    mesh: Mesh
    rules: Rules
    recipe: Recipe
    frozen: Tree
    steps: int
    schedule: optax.Schedule
    tx: optax.GradientTransformation
    portion: Portion

    def step_for(self, state: State) -> Step:
        """The jitted step, with the state kept where it lies."""
        return make_step(
            self.recipe.loss,
            self.recipe.weights,
            self.tx,
            self.portion.microbatches,
            self.run.optim.max_grad_norm,
            shardings_of(state),
            self.recipe.columns,
            self.recipe.learns,
            guard_of(self.run),
            group_norms if self.run.log.norms else None,
            self.run.optim.reduce_dtype == "compute",
        )

    @cached_property
    def evaluate(self) -> Any:
        """The jitted loss without a gradient, and without z-loss and what routers add, which are no part of how good a
        model is; made once, so that it is traced once."""
        none = {"z_loss": 0.0, "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
        plain = self.run.objective.model_copy(update=none)
        recipe = make_recipe(plain, self.arch, self.compute, self.run.sample)
        return make_eval(recipe.loss, recipe.weights, self.portion.microbatches, recipe.columns)

    def params(self, state: State) -> Tree:
        """The whole parameter tree, adapters attached."""
        return join(state.params, self.frozen)

    def averaged(self, state: State) -> State:
        """The state with the weights that are to be used: their average, where the optimizer keeps one."""
        return replace(state, params=averaged(state.params, fetch(state.opt, shardings_of(state.opt))))


def guard_of(run: Run) -> Guard | None:
    """What looks out for bad steps; None: what is not finite is only seen in the numbers."""
    watches = run.train.on_bad_step == "skip" or run.train.spike_factor is not None
    return Guard(run.train.spike_factor) if watches else None


def make_compute(run: Run, rules: Rules) -> Compute:
    """How to compute: 'auto' becomes bfloat16 on accelerators, float32 on a CPU; remat as REMAT_AUTO says."""
    cpu = platform() == "cpu"
    dtype = ("float32" if cpu else "bfloat16") if run.model.dtype == "auto" else run.model.dtype
    remat = REMAT_AUTO[run.tune.method if cpu else "full"] if run.model.remat == "auto" else run.model.remat
    if "float64" in (dtype, run.model.param_dtype) and jax.dtypes.canonicalize_dtype("float64") != "float64":
        raise UsageError("model.dtype: float64 needs JAX_ENABLE_X64=1 in the environment")
    parts, repeats = run.mesh.pipeline_microbatches, run.mesh.pipeline_repeats
    return Compute(
        jnp.dtype(dtype), run.model.attention, remat, run.model.scan_unroll, rules,
        pipeline_microbatches=parts, pipeline_repeats=repeats, pipeline_gather=run.mesh.pipeline_gather,
    )  # fmt: skip


# By tune.method on a CPU, "full" elsewhere. "dots" is 1.1 x faster there (SmolLM2, 4 x 256) and takes 0.6 GB more:
# adapters, with hardly any gradients and moments, can afford it.
REMAT_AUTO = {"full": "full", "lora": "dots"}


def check_batch(run: Run, mesh: Mesh, rules: Rules) -> None:
    """Rows per micro-batch must divide over the mesh axes that split the batch, and over the processes."""
    axes = rules.axes("batch")
    parts = math.prod(mesh.shape[axis] for axis in axes)
    split = " x ".join(f"{a}={mesh.shape[a]}" for a in axes if mesh.shape[a] > 1)
    rows = run.train.batch_size // run.train.microbatches
    if rows % parts:
        below = rows // parts * parts
        near = f"{below} or {below + parts}" if below else str(parts)
        raise UsageError(
            f"train.batch_size {run.train.batch_size} in {run.train.microbatches} micro-batches of {rows} rows does "
            f"not divide over {parts} devices ({split}); {near} rows in a micro-batch would"
        )
    if parts % jax.process_count():
        raise UsageError(
            f"mesh: the batch is split over {parts} devices, but {jax.process_count()} processes each read their own "
            f"rows: the product of the mesh's {', '.join(axes)} must be a multiple of the number of processes"
        )
    if (stages := mesh.shape[AXIS]) > 1:
        check_schedule(stages, rows * stages // parts, run.mesh.pipeline_microbatches)


def prepare(run: Run) -> tuple[Source, Mesh, Rules, Compute]:
    """Everything that can be refused before weights are read."""
    source = with_head(run, source_of(run))
    mesh, rules, compute = lay_out(run, source)
    tell(run, source.arch, compute, mesh)
    return source, mesh, rules, compute


def lay_out(run: Run, source: Source, devices: Sequence[Any] | None = None) -> tuple[Mesh, Rules, Compute]:
    """The mesh of the devices (default: those that are there) and the rules, checked, and how to compute on them."""
    rules, devices = make_rules(run.mesh.preset, run.mesh.rules), list(jax.devices() if devices is None else devices)
    compute = make_compute(run, rules)
    sizes = choose(run, source.arch, compute, devices).shape if run.mesh.auto else run.mesh.shape
    mesh = make_mesh(sizes, devices, run.mesh.dcn)
    check_stages(source.arch, mesh.shape[AXIS], run.mesh.pipeline_repeats)
    if kind_of(run.objective) != "rollout":  # whose rows are counted later
        check_batch(run, mesh, rules)
    for key, asked in (("optim.offload", run.optim.offload), ("model.remat", run.model.remat == "offload")):
        if asked:
            check_host_memory(mesh.devices.flat[0], key)
    for path, declared in declare(source.arch).items():
        weight_sharding(mesh, rules, declared.axes, declared.shape, path)
    if run.data.max_length > source.arch.max_position:
        raise UsageError(
            f"data.max_length {run.data.max_length} is beyond the model's context of {source.arch.max_position} tokens"
        )
    with jax.set_mesh(mesh):
        check_rows(source.arch, compute, run.data.max_length)
    return mesh, rules, compute


def source_of(run: Run) -> Source:
    """The model that a run starts from."""
    return open_start(run.model.model_dump(), run.train.seed)


def with_head(run: Run, source: Source) -> Source:
    """The source with the head that the objective trains: its own, or a new score head."""
    try:
        if (wanted := scores_of(run.objective)) is None:
            check_language(source)
            return source
        return with_scores(source, *wanted, run.train.seed)
    except UsageError as error:
        raise UsageError(f"objective.type={run.objective.type}: {error}") from error


def make_job(
    run: Run, source: Source, mesh: Mesh, rules: Rules, compute: Compute, steps: int, portion: Portion | None = None
) -> tuple[Job, State]:
    """Load the weights into place, do the surgery, make optimizer and state; call under jax.set_mesh(mesh)."""
    place = placer(lora.sharding_of(source.arch, mesh, rules))
    params = load_params(source, place, jnp.dtype(run.model.param_dtype))
    if any(isinstance(x, Lora) for x in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Lora))):
        params = jax.jit(lora.merge)(params)  # a run or adapter as the start: its adapters become part of the base
    return job_of(run, source, mesh, rules, compute, steps, params, portion)


def abstract_params(arch: Architecture, mesh: Mesh, rules: Rules, dtype: Any) -> Tree:
    """The weights' shapes where they would lie, for `job_of` to make a job of shapes: it can be compiled, not run."""
    where = lora.sharding_of(arch, mesh, rules)
    return nest(
        {
            path: jax.ShapeDtypeStruct(d.shape, stored_dtype(path, dtype), sharding=where(path, d.shape))
            for path, d in declare(arch).items()
        }
    )


def job_of(
    run: Run,
    source: Source,
    mesh: Mesh,
    rules: Rules,
    compute: Compute,
    steps: int,
    params: Tree,
    portion: Portion | None = None,
) -> tuple[Job, State]:
    """The surgery, the optimizer and the state around weights, or around shapes that stand for them."""
    params, keep = SURGERY[run.tune.method](run, source.arch, params, mesh, rules)
    trainable, frozen = split(params, keep)
    del params
    axes = {path: declared.axes for path, declared in declare(source.arch).items()}
    tx = make_optimizer(run.optim, steps, trainable, axes)
    recipe = make_recipe(run.objective, source.arch, compute, run.sample)
    start = recipe.columns.start
    start = start if guard_of(run) is None else guarded(start)
    state = init_state(trainable, tx, mesh, start, run.optim.offload)
    schedule = make_schedule(run.optim, steps)
    portion = portion or portion_of(run)
    job = Job(run, source, source.arch, compute, mesh, rules, recipe, frozen, steps, schedule, tx, portion)
    return job, state


def _full(run: Run, arch: Architecture, params: Tree, mesh: Mesh, rules: Rules) -> tuple[Tree, Callable[[str], bool]]:
    chosen = select(flatten(params), run.tune.trainable, "tune.trainable")
    return params, chosen.__contains__


def _lora(run: Run, arch: Architecture, params: Tree, mesh: Mesh, rules: Rules) -> tuple[Tree, Callable[[str], bool]]:
    tune, where = run.tune, lora.sharding_of(arch, mesh, rules)
    abstract = lambda path, shape, dtype, _: jax.ShapeDtypeStruct(shape, dtype, sharding=where(path, shape))  # noqa: E731
    if tune.init_adapter is not None:
        config = read_adapter_config(Path(tune.init_adapter))
        start = read_adapter(Path(tune.init_adapter), arch)
        scale = config.scale
        place, kind = abstract if is_abstract(params) else placer(where), jnp.dtype(jnp.float32)
        adapter = {
            path: tuple(
                place(f"{path}/{part}", x.shape, kind, x.astype("float32").__getitem__)
                for part, x in zip("ab", pair, strict=True)
            )
            for path, pair in start.items()
        }
    else:
        declared = declare(arch)
        targets = lora.target_paths(list(declared), tune.target_modules)
        if not run.export.merge:
            check_adapters(targets, arch)
        shapes = lora.adapter_shapes(declared, targets, tune.r)
        shardings = {
            path: tuple(where(f"{path}/{part}", d.shape) for part, d in zip("ab", pair, strict=True))
            for path, pair in shapes.items()
        }
        make_key = partial(jax.random.key, run.train.seed)
        key = jax.eval_shape(make_key) if is_abstract(params) else make_key()
        adapter = born(partial(lora.init_adapter, shapes), shardings, key)
        scale = lora.scale_of(tune.r, tune.lora_alpha, tune.use_rslora)
    # a score head is trained whole beside the adapters
    return lora.attach(params, adapter, scale), lambda path: path.endswith(("/a", "/b")) or path.startswith("score/")


SURGERY = {"full": _full, "lora": _lora}
