"""Every knob of a run: its name, range, default and meaning. Frozen; a run is checked before anything is paid for."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic.fields import FieldInfo

from configs.objective import Objective
from configs.policy import COMPARES
from configs.sample import Sample
from configs.section import Int, Section, Strings, Text, knob
from configs.section import several as _several

AXES = ("data", "fsdp", "tensor", "context", "expert", "stage")
Axis = Literal["data", "fsdp", "tensor", "context", "expert", "stage"]
Role = Literal["system", "user", "assistant", "tool"]


def _targets(value: Any) -> Any:
    return value if value == "all-linear" else _several(value)


def _rules(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: () if axes is None else _several(axes) for key, axes in value.items()}


class Model(Section):
    """The weights to start from, and how they are computed with."""

    source: str = Field(
        min_length=1, description="hub id, local Hugging Face folder, GGUF file, run folder or short name"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = knob(
        "auto", "dtype of activations and matrix products; auto = bfloat16 on GPU and TPU, float32 on CPU"
    )
    param_dtype: Literal["float32", "bfloat16", "float64"] = knob("float32", "dtype the weights are kept in")
    attention: Literal["auto", "reference", "xla", "chunked"] = knob("auto", "attention backend; auto logs its choice")
    remat: Literal["auto", "none", "full", "dots"] = knob(
        "auto", "what backward recomputes: nothing, each block, or all but the matrix products; auto picks"
    )
    scan_unroll: Int = knob(1, "layers per iteration of the scan over layers", "0 layers would be no loop", ge=1)


class Mesh(Section):
    """How many devices along each axis, and which logical axis is cut along which."""

    data: Int = knob(1, "devices with replicated weights and different rows; -1 = the rest")
    fsdp: Int = knob(-1, "devices that share weights and optimizer state and take different rows; -1 = the rest")
    tensor: Int = knob(1, "devices that share each matrix product; -1 = the rest")
    context: Int = knob(1, "devices that share each sequence; -1 = the rest")
    expert: Int = knob(1, "devices that share the experts; -1 = the rest")
    stage: Int = knob(1, "pipeline stages; -1 = the rest")
    preset: Literal["fsdp", "replicated"] = knob("fsdp", "the table logical axis -> mesh axes to start from")
    rules: Annotated[dict[str, tuple[Axis, ...]], BeforeValidator(_rules)] = knob(
        {}, "changes to the preset's table: logical axis -> mesh axis, list of them, or null for replicated"
    )

    @property
    def shape(self) -> dict[str, int]:
        """Axis -> size; one of them may still be -1."""
        return {axis: getattr(self, axis) for axis in AXES}

    @model_validator(mode="after")
    def _check(self) -> Self:
        for axis, size in self.shape.items():
            if size != -1 and size < 1:
                raise ValueError(f"mesh.{axis} is {size}, allowed: 1 or more, or -1 for the rest of the devices")
        open_axes = [f"mesh.{axis}" for axis, size in self.shape.items() if size == -1]
        if len(open_axes) > 1:
            raise ValueError(
                f"{' and '.join(open_axes)} are -1, but one axis takes the rest of the devices: set the others to 1"
            )
        return self


class Data(Section):
    """Rows in, sequences of tokens out."""

    train: Strings = Field(
        min_length=1,
        description="files to train on: JSONL or Parquet, or reasoning_gym:NAME?option=value; one or a list",
    )
    eval: Strings = knob((), "files to evaluate on")
    format: Literal[
        "auto",
        "messages",
        "prompt_completion",
        "text",
        "tokens",
        "alpaca",
        "sharegpt",
        "preference",
        "preference_tokens",
        "completion_tokens",
        "ranked",
        "stepwise",
    ] = knob("auto", "kind of the rows; auto recognises it by the keys of the first one")
    max_length: Int = knob(1024, "tokens per sequence", "one token predicts nothing", ge=2)
    packing: Literal["best_fit", "none"] = knob("best_fit", "several examples in one sequence, or one each")
    truncation: Literal["keep_start", "keep_end", "drop", "error"] = knob(
        "keep_start", "what happens to an example longer than max_length"
    )
    train_on: Annotated[tuple[Role, ...], BeforeValidator(_several)] = knob(
        ("assistant",), "roles whose tokens carry loss", "without a role nothing is trained", min_length=1
    )
    chat_template: str | None = knob(None, "jinja template, as text or file, instead of the tokenizer's own")
    prompt_template: str | None = knob(
        None, "sampling: the user's message, made of a row's columns: 'Solve this: {question}'; null: the row's prompt"
    )
    on_bad_row: Literal["error", "skip"] = knob("error", "a malformed row stops the run, or is counted and skipped")
    shuffle: bool = knob(True, "a new order each epoch; false = the order of the files")
    seed: Int = knob(0, "seed of the order and of packing", "seeds are unsigned", ge=0)
    window: Int = knob(1024, "consecutive examples that are packed together", "a window holds an example", ge=1)
    add_eos: bool = knob(True, "end plain text and completions with the end-of-sequence token")
    share_prompt: bool = knob(True, "pairs, grpo: a prompt is computed once for all its completions")
    pairs: Literal["best_worst", "adjacent", "all"] = knob(
        # all would let a prompt with many answers count many times, with pairs that say the same again
        "best_worst",
        "pairs taken from ranked completions: best and worst, neighbours, or each with each",
    )
    min_margin: float = knob(0.0, "pairs with a smaller margin (difference of scores) are left out", "a margin", ge=0)
    completion_only: bool = knob(True, "prompt/completion rows: loss on the completion only")
    step_separator: str = knob("\n", "process_reward: text behind each step; its last token carries the label")
    prefetch: Int = knob(2, "batches prepared ahead; 0 = in the training thread", "a count of batches", ge=0)


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


class Optim(Section):
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw"] = knob("adamw", "optimizer")
    learning_rate: float = knob(2e-5, "peak learning rate", "a step needs a direction; freeze with tune", gt=0)
    schedule: Literal["constant", "linear", "cosine"] = knob("linear", "shape after warmup")
    warmup_steps: Int = knob(0, "optimizer steps of linear warmup", "a count of steps", ge=0)
    warmup_ratio: float = knob(0.0, "warmup as a share of all steps", "a share", ge=0, le=1)
    final_ratio: float = knob(0.0, "last learning rate / peak, for linear and cosine", "a share", ge=0, le=1)
    weight_decay: float = knob(0.0, "decoupled weight decay (times the learning rate)", "less would grow weights", ge=0)
    decay_patterns: Strings = knob(
        ("*weight*",), "path patterns of the weights that decay; default: matrices and embeddings, not norms or biases"
    )
    b1: float = knob(0.9, "decay of the first moment", "1 would never forget", ge=0, lt=1)
    b2: float = knob(0.999, "decay of the second moment", "1 would never forget", ge=0, lt=1)
    eps: float = knob(1e-8, "added to the root of the second moment", "keeps a zero gradient from dividing by 0", gt=0)
    max_grad_norm: Annotated[float, Field(gt=0)] | None = knob(
        1.0, "clip the global gradient norm to this; null = off", "0 would stop learning: null switches clipping off"
    )
    state_dtype: Literal["float32", "bfloat16"] = knob("float32", "dtype of the first moment")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                f"optim.warmup_steps is {self.warmup_steps} and optim.warmup_ratio is {self.warmup_ratio}: "
                "give one of them, they say the same thing"
            )
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
    microbatches: Int = knob(1, "parts a batch is cut into to save memory; the result is the same", "a count", ge=1)
    microbatch_rows: Int = knob(
        1, "grpo: rows of data.max_length tokens that a device computes at a time", "a part holds a row", ge=1
    )
    seed: Int = knob(0, "seed of new weights (adapters)", "seeds are unsigned", ge=0)
    eval_every: Int = knob(0, "steps between evaluations; 0 = off", "a count", ge=0)
    eval_on_start: bool = knob(False, "evaluate before the first step, too")
    compilation_cache: bool = knob(True, "keep compiled programs on disk: the next start is faster")
    keep_memory: bool = knob(
        False, "CPU: what a step frees stays with the process for the next one: faster, and takes 1 to 2 GB more"
    )

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
        return self


class Checkpoint(Section):
    """Saving, so that the same command resumes."""

    enabled: bool = knob(True, "save at all")
    every: Int = knob(100, "steps between saves", "a count of steps; enabled=false switches saving off", ge=1)
    keep: Int = knob(2, "newest checkpoints kept", "resuming needs one", ge=1)


class Log(Section):
    """What is written and shown while it runs."""

    every: Int = knob(1, "steps between lines of metrics.jsonl", "a count of steps", ge=1)
    tensorboard: bool = knob(True, "also write TensorBoard files")
    samples: str | None = knob(None, "JSONL of held-out prompts, answered before and after training")
    completions: Int = knob(1, "grpo: completions of each rollout that are shown, all are in completions.jsonl", ge=0)
    sample_max_new_tokens: Int = knob(64, "longest answer to such a prompt, in tokens", "an answer has a token", ge=1)
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
