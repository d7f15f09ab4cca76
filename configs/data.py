"""Knobs of the data: rows in, sequences of tokens out."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from configs.section import Int, Section, Strings, knob
from configs.section import several as _several

Role = Literal["system", "user", "assistant", "tool"]


class Data(Section):
    """Rows in, sequences of tokens out."""

    train: Strings = Field(
        min_length=1,
        description="files to train on: JSONL, Parquet, Arrow, ArrayRecord, texts, folders of them, python_stdlib, "
        "hf://datasets/ORG/NAME or reasoning_gym:NAME?option=value; one or a list",
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
