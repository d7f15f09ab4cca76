"""Every knob of a run: its name, range, default and meaning. Frozen; a run is checked before anything is paid for."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic.fields import FieldInfo

from configs.checkpoint import Checkpoint
from configs.data import Data
from configs.mesh import Mesh
from configs.objective import Objective
from configs.optim import Optim
from configs.policy import COMPARES
from configs.sample import Sample
from configs.section import Int, Section, Strings, Text, knob
from configs.section import several as _several


def _targets(value: Any) -> Any:
    return value if value == "all-linear" else _several(value)


class Model(Section):
    """The weights to start from, and how they are computed with."""

    source: str = Field(
        min_length=1,
        description="hub id, local Hugging Face folder, GGUF file, run folder or short name; init=random: a preset "
        "(125m, 1b, ...), a config.json or one of those, whose architecture is taken",
    )
    init: Literal["source", "random"] = knob("source", "the source's weights, or new ones drawn from train.seed")
    # Each layer adds two branches to the residual stream: unscaled, its variance would grow with the depth (GPT-2).
    init_scheme: Literal["normal", "scaled"] = knob(
        "scaled", "init=random: all matrices alike, or those that end a residual branch divided by sqrt(2 x layers)"
    )
    tokenizer: Annotated[str, Field(min_length=1)] | None = knob(
        None, "folder, hub id or any MODEL whose tokenizer is used; null: the source's own"
    )
    resize_vocab: bool = knob(
        False, "a tokenizer with more tokens than the model: add rows to embedding and head, each the mean of the old"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = knob(
        "auto", "dtype of activations and matrix products; auto = bfloat16 on GPU and TPU, float32 on CPU"
    )
    param_dtype: Literal["float32", "bfloat16", "float64"] = knob("float32", "dtype the weights are kept in")
    attention: Literal["auto", "reference", "xla", "chunked", "splash", "ring", "ulysses"] = knob(
        "auto", "attention backend; auto logs its choice. With mesh.context > 1: ring (auto's) or ulysses"
    )
    remat: Literal["auto", "none", "full", "dots", "offload"] = knob(
        "auto",
        "what backward recomputes: nothing, each block, or all but the matrix products; offload: each block, whose "
        "inputs wait in the host's memory; auto picks",
    )
    scan_unroll: Int = knob(1, "layers per iteration of the scan over layers", "0 layers would be no loop", ge=1)


class Tune(Section):
    """Which weights learn: all, some, or adapters beside them."""

    method: Literal["full", "lora"] = knob("full", "train the weights, or low-rank adapters beside frozen ones")
    r: Int = knob(16, "rank of the adapters", "rank 0 would train nothing", ge=1)
    lora_alpha: float = knob(32.0, "adapters are scaled by lora_alpha / r", "0 would switch the adapters off", gt=0)
    target_modules: Annotated[Literal["all-linear"] | tuple[Text, ...], BeforeValidator(_targets)] = knob(
        "all-linear", "which weights get adapters: all-linear (all but embedding and head), or names and path patterns"
    )
    use_rslora: bool = knob(False, "scale by lora_alpha / sqrt(r) instead")
    trainable: Strings = knob(
        ("*",), "full: path patterns of the weights that learn", "without one nothing is trained", min_length=1
    )
    init_adapter: str | None = knob(None, "folder of a PEFT adapter to start from")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.method == "lora" and self.trainable != ("*",):
            raise ValueError("tune.trainable is for tune.method=full: with lora the adapters learn, nothing else")
        if self.method == "full" and self.init_adapter is not None:
            raise ValueError("tune.init_adapter is for tune.method=lora: with full there is no adapter to start from")
        if self.target_modules == ():
            raise ValueError("tune.target_modules is empty, allowed: all-linear or at least one name or pattern")
        return self


class Train(Section):
    """How long, in which portions."""

    rounds: Int = knob(
        0, "rounds of sampling (sample.*) and training on what was kept; 0 = data.train as it is", "a count", ge=0
    )
    # Going on costs a round's data alone and keeps DPO on its own samples; from the base errors do not add up (STaR).
    round_start: Literal["last", "base"] = knob("last", "what a round trains: the round before's result, or model.*")
    accumulate: bool = knob(False, "a round also trains on what the rounds before it kept")
    steps: Annotated[Int, Field(ge=1)] | None = knob(None, "optimizer steps", "a run has a step")
    epochs: Annotated[float, Field(gt=0)] | None = knob(
        None, "passes over the data; 1 when steps is not given either", "a run has a step"
    )
    batch_size: Int = knob(
        8, "sequences per optimizer step, over all devices; grpo: prompts", "a batch holds a sequence", ge=1
    )
    batch_warmup_steps: Int = knob(0, "steps over which the batch grows to batch_size", "a count of steps", ge=0)
    batch_warmup_start: Int = knob(1, "sequences in the first batch of such a warmup", "a batch holds one", ge=1)
    microbatches: Int = knob(1, "parts a batch is cut into to save memory; the result is the same", "a count", ge=1)
    microbatch_rows: Int = knob(
        1, "grpo: rows of data.max_length tokens that a device computes at a time", "a part holds a row", ge=1
    )
    seed: Int = knob(0, "seed of new weights: a model's, adapters', a head's", "seeds are unsigned", ge=0)
    eval_every: Int = knob(0, "steps between evaluations; 0 = off", "a count", ge=0)
    eval_on_start: bool = knob(False, "evaluate before the first step, too")
    eval_batches: Annotated[Int, Field(ge=1)] | None = knob(
        None, "batches of each held-out set that an evaluation takes, its first ones; null: all", "0 would tell nothing"
    )
    compilation_cache: bool = knob(True, "keep compiled programs on disk: the next start is faster")
    keep_memory: bool = knob(
        False, "CPU: what a step frees stays with the process for the next one: faster, and takes 1 to 2 GB more"
    )

    on_bad_step: Literal["error", "skip"] = knob(
        "error", "a step whose loss or gradient norm is not finite or spikes: stop, or leave it out and go on"
    )
    spike_factor: Annotated[float, Field(gt=1)] | None = knob(
        None, "a gradient norm above so many times the running average of good steps is bad, too; null = off",
        "below 1 an ordinary step would be bad",
    )  # fmt: skip
    max_bad_steps: Int = knob(
        10, "skip: so many bad steps in a row restore the last checkpoint's weights; their data is passed over",
        "a count", ge=1,
    )  # fmt: skip
    max_rollbacks: Int = knob(2, "skip: so often in a run; then it stops", "a count", ge=0)
    hang_timeout: Annotated[float, Field(gt=0)] | None = knob(
        None, "seconds without a finished step, after the first, that end the process (evaluations count); null = never"
    )
    xla_flags: Literal["auto", "none"] | tuple[Annotated[str, Field(pattern="^--xla_")], ...] = knob(
        "auto",
        "flags added to XLA_FLAGS: auto (GPU: communication beside products), none, or a list; unknown ones are out",
    )
    heartbeat_timeout: Int = knob(100, "several processes: seconds of silence after which one counts as dead", ge=1)
    join_timeout: Int = knob(300, "several processes: seconds for all of them to come together", ge=1)
    profile_steps: Annotated[tuple[Annotated[Int, Field(ge=1)], ...], BeforeValidator(_several)] | None = knob(
        None, "[first, last]: steps to trace with jax.profiler into the run's profile/; null = none", "two steps"
    )

    @field_validator("xla_flags", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="before")
    @classmethod
    def _default_epochs(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("steps") is None and given.get("epochs") is None:
            return {**given, "epochs": 1}
        return given

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"train.steps is {self.steps} and train.epochs is {self.epochs:g}: give one, set the other to null"
            )
        if self.batch_size % self.microbatches:
            raise ValueError(
                f"train.microbatches is {self.microbatches}, which does not divide train.batch_size {self.batch_size}"
            )
        if self.batch_warmup_start > self.batch_size:
            raise ValueError(
                f"train.batch_warmup_start is {self.batch_warmup_start}, more than train.batch_size {self.batch_size}"
            )
        if (span := self.profile_steps) is not None and (len(span) != 2 or span[0] > span[1]):
            raise ValueError(
                f"train.profile_steps is {list(span)}, allowed: [first, last] with first not above last, or null"
            )
        return self


class Log(Section):
    """What is written and shown while it runs."""

    every: Int = knob(1, "steps between lines of metrics.jsonl", "a count of steps", ge=1)
    tensorboard: bool = knob(True, "also write TensorBoard files")
    samples: str | None = knob(None, "JSONL of held-out prompts, answered before and after training")
    completions: Int = knob(1, "grpo: completions of each rollout that are shown, all are in completions.jsonl", ge=0)
    sample_max_new_tokens: Int = knob(64, "longest answer to such a prompt, in tokens", "an answer has a token", ge=1)
    norms: bool = knob(False, "also norms of gradient, update and weights, by group: embed, attention, mlp, ...")
    activations_every: Int = knob(
        0,
        "steps between reports of the size of each layer's activations (a forward pass); 0 = off",
        "a count",
        ge=0,
    )
    preflight: bool = knob(True, "check and show the first batch, the memory and the step-0 loss before training")


class Export(Section):
    """The Hugging Face folder at the end."""

    enabled: bool = knob(True, "write export/ when training is done")
    merge: bool = knob(False, "lora: write merged weights instead of a PEFT adapter folder")
    dtype: Literal["float32", "bfloat16"] | None = knob(None, "dtype of the exported weights; null = as trained")
    max_shard_size: str = knob(
        "5GB", "largest safetensors file", "a number and KB, MB or GB", pattern=r"^[1-9]\d*[KMG]B$"
    )

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` in bytes (decimal units, as transformers counts)."""
        number, unit = re.findall(r"\d+|[KMG]", self.max_shard_size)
        return int(number) * {"K": 10**3, "M": 10**6, "G": 10**9}[unit]


class Run(Section):
    """A whole run."""

    output: str = knob("runs/run", "run folder; a recipe's default is runs/ and its name", min_length=1)
    model: Model
    mesh: Mesh = Mesh()
    data: Data
    tune: Tune = Tune()
    optim: Optim = Optim()
    objective: Objective = Objective()
    sample: Sample = Sample()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    export: Export = Export()

    @model_validator(mode="after")
    def _check_start(self) -> Self:
        model, lora = self.model, self.tune.method == "lora"
        if model.init == "random" and lora:
            raise ValueError(
                "model.init is random and tune.method is lora: adapters beside frozen noise have nothing to adapt; use "
                "tune.method=full"
            )
        if self.tune.init_adapter is not None and (model.tokenizer is not None or model.resize_vocab):
            raise ValueError(
                "tune.init_adapter is given with model.tokenizer or model.resize_vocab: an adapter fits the vocabulary "
                "that it was trained with; merge it into its model first"
            )
        if model.resize_vocab and lora and (self.train.rounds or (self.export.enabled and not self.export.merge)):
            raise ValueError(
                "model.resize_vocab is true and an adapter folder would be written (tune.method is lora): the model it "
                "names lacks the new rows; set export.merge=true, or export.enabled=false, without train.rounds"
            )
        return self

    @model_validator(mode="after")
    def _check_best(self) -> Self:
        if self.checkpoint.keep_best is not None and not self.train.eval_every:
            raise ValueError(
                f"checkpoint.keep_best is {self.checkpoint.keep_best} and train.eval_every is 0: what is best is told "
                "by evaluations; set train.eval_every and data.eval"
            )
        return self

    @model_validator(mode="after")
    def _check_scores(self) -> Self:
        if not self.objective.type.endswith("reward"):
            return self
        if self.tune.method == "lora" and self.export.enabled and not self.export.merge:
            raise ValueError(
                f"objective.type is {self.objective.type} and export.merge is false: a score head has no place in an "
                "adapter folder; set export.merge=true, or export.enabled=false"
            )
        if self.log.samples is not None:
            raise ValueError(
                f"objective.type is {self.objective.type} and log.samples is given: a reward model answers nothing"
            )
        return self

    @model_validator(mode="after")
    def _check_policy(self) -> Self:
        if self.objective.type != "grpo":
            return self
        if self.sample.num_generations == 1 and self.objective.advantage in COMPARES:
            raise ValueError(
                f"objective.advantage is {self.objective.advantage} and sample.num_generations is 1: a completion is "
                "compared with others of its prompt; sample more, or use reinforce_batch or reinforce_plus_plus"
            )
        if self.sample.temperature == 0:
            raise ValueError(
                "objective.type is grpo and sample.temperature is 0: greedy completions explore nothing, and have no "
                "log-probs at that temperature; set one above 0"
            )
        return self

    @model_validator(mode="after")
    def _check_sampled(self) -> Self:
        if self.objective.type != "grpo" and not self.train.rounds:
            return self
        what = f"train.rounds is {self.train.rounds}" if self.train.rounds else "objective.type is grpo"
        for name in ("mix", "replay"):
            if getattr(self.data, name):
                raise ValueError(f"{what} and data.{name} is given: prompts come from data.train alone")
        if isinstance(self.data.eval, dict):
            raise ValueError(f"{what} and data.eval has sets by name: give its files as one list")
        if self.train.batch_warmup_steps:
            raise ValueError(f"{what} and train.batch_warmup_steps is given: it is for batches of stored examples")
        return self

    @model_validator(mode="after")
    def _check_reference(self) -> Self:
        if self.objective.reference == "adapterless" and self.tune.method != "lora":
            raise ValueError(
                f"objective.reference is adapterless and tune.method is {self.tune.method}: without adapters there is "
                "nothing to detach; use cached"
            )
        if self.objective.reference == "adapterless" and self.train.rounds > 1:
            raise ValueError(
                f"objective.reference is adapterless and train.rounds is {self.train.rounds}: a later round starts "
                "with adapters, so the model without them is not its reference; use cached"
            )
        for name in ("eval_every", "eval_on_start"):
            if self.train.rounds and (given := getattr(self.train, name)):
                raise ValueError(
                    f"train.{name} is {given} and train.rounds is {self.train.rounds}: in rounds data.eval is prompts, "
                    f"answered before the first and after each round; leave train.{name} out"
                )
        return self


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Run.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


def knobs() -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted name with its field, in the order of the schema."""
    for name, field in Run.model_fields.items():
        if name in SECTIONS:
            yield from ((f"{name}.{key}", inner) for key, inner in SECTIONS[name].model_fields.items())
        else:
            yield name, field
