"""Knobs of the data: rows in, sequences of tokens out."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from configs.section import Int, Section, Strings, Text, knob
from configs.section import several as _several

Role = Literal["system", "user", "assistant", "tool"]
Share = Annotated[float, Field(ge=0)]
# a key of a mapping is text on the command line
Step = Annotated[int, BeforeValidator(lambda key: int(key) if isinstance(key, str) and key.isdigit() else key)]


def _sets(value: Any) -> Any:
    """Files, or sets of files by name."""
    return value if isinstance(value, Mapping) else _several(value)


class Mixed(Section):
    """One source of a mixture."""

    train: Strings = Field(min_length=1, description="its files, as data.train")
    weight: Share | dict[Step, Share] | None = knob(
        None, "its weight among the sources, or step -> weight from there on; null: as many as it has examples"
    )
    epochs: Annotated[float, Field(gt=0)] | None = knob(None, "passes over it at most; null: any number")


class Replay(Section):
    """What a model was trained on before, mixed in so that it is not forgotten."""

    train: Strings = Field(min_length=1, description="files of the earlier kind, as data.train")
    share: float = knob(0.1, "share of the examples that come from them", "1 would learn nothing new", gt=0, lt=1)


class Data(Section):
    """Rows in, sequences of tokens out."""

    train: Strings = knob(
        (),  # where data.mix says
        "files to train on: JSONL, Parquet, Arrow, ArrayRecord, texts, folders of them, python_stdlib, "
        "hf://datasets/ORG/NAME or reasoning_gym:NAME?option=value; one or a list",
    )
    mix: dict[Text, Mixed] = knob({}, "several sources by name instead of data.train: their files and weights")
    replay: Replay | None = knob(None, "files beside data.train that keep the model from forgetting: train and share")
    mix_by: Literal["examples", "tokens"] = knob("examples", "what the weights of a mixture are shares of")
    mix_schedule: Literal["stages", "linear"] = knob("stages", "weights by step hold, or go straight to the next")
    mix_temperature: float = knob(1.0, "shares are weight ** (1 / this): above 1 favours small sources", gt=0)
    on_exhausted: Literal["error", "drop"] = knob(
        "error", "a source that has had its epochs ends the run or is left out"
    )
    eval: Annotated[tuple[Text, ...] | dict[Text, Strings], BeforeValidator(_sets)] = knob(
        (), "files to evaluate on; several sets by name: {old: FILES, new: FILES}"
    )
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
    packing: Literal["best_fit", "concat", "none"] = knob(
        "best_fit", "several examples in one sequence; all after each other, cut wherever one is full; or one each"
    )
    truncation: Literal["keep_start", "keep_end", "split", "drop", "error"] = knob(
        "keep_start", "what happens to an example longer than max_length; split: it goes on in another sequence"
    )
    document_mask: bool = knob(True, "an example sees itself only; false: also what stands before it in its sequence")
    reset_positions: bool = knob(True, "positions count from 0 in each example; false: through the sequence")
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
    fim_rate: float = knob(0.0, "share of plain texts rearranged to learn filling in the middle", "a share", ge=0, le=1)
    fim_spm_rate: float = knob(0.5, "share of those that begin with the suffix", "a share", ge=0, le=1)
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

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.mix and (self.train or self.replay):
            other = "data.train" if self.train else "data.replay"
            raise ValueError(f"data.mix and {other} are both given: name the files in data.mix only")
        if not self.mix and not self.train:
            raise ValueError("data.train is missing, files to train on: without them there is nothing to learn from")
        return self

    @property
    def sources(self) -> dict[str, Mixed]:
        """What is trained on, by name: a mixture's sources, or one; the first one's passes are the epochs."""
        if self.mix:
            return dict(self.mix)
        if self.replay is None:
            return {"train": Mixed(train=self.train, weight=1.0)}
        share = self.replay.share
        return {
            "train": Mixed(train=self.train, weight=1 - share),
            "replay": Mixed(train=self.replay.train, weight=share),
        }

    @property
    def held_out(self) -> dict[str, tuple[str, ...]]:
        """The files to evaluate on by the set's name, '' where there is but one."""
        if isinstance(self.eval, dict):
            return dict(self.eval)
        return {"": self.eval} if self.eval else {}
