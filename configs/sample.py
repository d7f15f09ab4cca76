"""The section `sample`: how completions are made by a model, scored, and which are kept."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from configs.section import Int, Section, Strings, knob, several

JUDGE_PROMPT = """\
Grade the answer to the question below from 0 (useless) to 10 (perfect): is it correct, helpful and clear?

Question: {prompt}

Answer: {completion}

Reply with the grade alone."""


class Sample(Section):
    """Completions of data.train's prompts by the model, how they are scored, and which are kept."""

    num_generations: Int = knob(4, "completions of each prompt", "a prompt has a completion", ge=1)
    max_new_tokens: Int = knob(256, "longest completion, in tokens", "a completion has a token", ge=1)
    temperature: float = knob(1.0, "of sampling; 0 is greedy, with num_generations 1", "", ge=0)
    top_p: float = knob(1.0, "sample from the likeliest tokens that reach this probability; 1 = off", "", gt=0, le=1)
    top_k: Int = knob(0, "sample from so many likeliest tokens; 0 = off", "a count", ge=0)
    min_p: float = knob(0.0, "least share of the likeliest token's probability; 0 = off", "a share", ge=0, le=1)
    max_gen_batches: Int = knob(
        1,
        "grpo: times that prompts are drawn until so many have answers of unlike score (DAPO); 1 = take all",
        "",
        ge=1,
    )
    max_uniform: Int = knob(
        0,
        "grpo: stop after so many rollouts in which no prompt has answers of unlike score; 0 = go on",
        "a count",
        ge=0,
    )
    seed: Int = knob(0, "prompt number i samples with seed + i", "seeds are unsigned", ge=0, lt=2**32)
    batch_size: Int = knob(32, "completions in the making at a time", "a batch holds a completion", ge=1)
    reward: Strings = knob(
        (), "what scores a completion: module:function (or file.py:function), a built-in's name, or a reward MODEL"
    )
    reward_weights: Annotated[tuple[float, ...], BeforeValidator(several)] = knob(
        (), "a weight for each of reward, then one for judge; none: 1"
    )
    reward_options: dict[str, dict[str, Any]] = knob(
        {}, "options of rewards, by their short names: {format: {tags: [a, b]}}"
    )
    reward_timeout: float | None = knob(
        120.0,
        "seconds that a call of a function of yours may take; null: called in this process, and never stopped",
        gt=0,
    )
    reward_workers: Int = knob(0, "processes that verify completions; 0 = one for each CPU core", "a count", ge=0)
    on_reward_error: Literal["stop", "skip"] = knob(
        "stop", "a reward that raises, hangs or gives no number stops the run, or its completions count as not judged"
    )
    on_missing_column: Literal["skip", "error"] = knob(
        "skip", "a row without the column that a reward needs (the reference answer) is not judged by it, or refused"
    )
    missing_eos_penalty: float = knob(0.0, "subtracted from the score of a completion that never ends", "", ge=0)
    judge: str | None = knob(None, "chat MODEL that grades completions, as one more reward", min_length=1)
    judge_prompt: str = knob(JUDGE_PROMPT, "what the judge is asked, with {prompt} and {completion}")
    judge_pattern: str = knob(
        r"\d+(?:\.\d+)?", "regular expression that reads the grade (its group 1, if any) in the judge's reply"
    )
    judge_max_new_tokens: Int = knob(16, "longest reply of the judge, in tokens", "a reply has a token", ge=1)
    keep: Literal["pairs", "all_pairs", "best", "all"] = knob(
        "pairs", "best against worst, every two of unlike score, the keep_n best, or all"
    )
    keep_n: Int = knob(1, "best: completions kept of a prompt, at most", "a prompt keeps a completion", ge=1)
    min_margin: float = knob(0.0, "pairs: least difference of the scores (equal ones never pair)", "", ge=0)
    threshold: float | None = knob(None, "least score of what is kept, or chosen of a pair; it also counts as a pass")
    min_pass_rate: float = knob(0.0, "least share of a prompt's completions that pass; fewer: too hard", "", ge=0, le=1)
    max_pass_rate: float = knob(1.0, "greatest such share; more: too easy", "", ge=0, le=1)
    finished_only: bool = knob(False, "leave out completions that never end")
    min_tokens: Int = knob(0, "shortest completion that is kept", "a count", ge=0)
    max_tokens: Annotated[Int, Field(ge=1)] | None = knob(None, "longest; null = any", "a completion has a token")
    min_perplexity: float = knob(1.0, "least perplexity under the sampling model", "it is never below 1", ge=1)
    max_perplexity: Annotated[float, Field(ge=1)] | None = knob(None, "greatest; null = any", "it is never below 1")
    max_similarity: float = knob(
        1.0, "leave out what shares more of its word pairs (Jaccard) with a better completion; 1 = off", "", ge=0, le=1
    )

    @property
    def makes_pairs(self) -> bool:
        """Whether preferences are kept, or completions."""
        return self.keep in ("pairs", "all_pairs")

    @model_validator(mode="after")
    def _check(self) -> Self:
        scorers = len(self.reward) + (self.judge is not None)
        if self.reward_weights and len(self.reward_weights) != scorers:
            raise ValueError(
                f"sample.reward_weights has {len(self.reward_weights)} numbers for {scorers} of sample.reward and "
                "sample.judge: give one for each, or none"
            )
        if self.makes_pairs and self.num_generations == 1:
            raise ValueError(
                f"sample.keep is {self.keep} and sample.num_generations is 1: a pair needs two completions of a prompt"
            )
        if self.temperature == 0 and self.num_generations > 1:
            raise ValueError(
                f"sample.temperature is 0 and sample.num_generations is {self.num_generations}: greedy completions of "
                "a prompt are all the same; set a temperature"
            )
        if self.keep_n > 1 and self.keep != "best":
            raise ValueError(f"sample.keep_n is {self.keep_n} and sample.keep is {self.keep}: keep_n is for keep=best")
        if self.threshold is None and (self.min_pass_rate, self.max_pass_rate) != (0, 1):
            raise ValueError(
                "sample.min_pass_rate or sample.max_pass_rate is given and sample.threshold is not: it says from which "
                "score a completion passes"
            )
        for what in ("pass_rate", "tokens", "perplexity"):
            least, most = f"min_{what}", f"max_{what}"
            low, high = getattr(self, least), getattr(self, most)
            if high is not None and low > high:
                raise ValueError(f"sample.{least} is {low:g} and sample.{most} is {high:g}: nothing lies between")
        if missing := [name for name in ("{prompt}", "{completion}") if name not in self.judge_prompt]:
            raise ValueError(f"sample.judge_prompt has no {missing[0]}: the judge would not see it")
        try:
            re.compile(self.judge_pattern)
        except re.error as error:
            raise ValueError(f"sample.judge_pattern is no regular expression: {error}") from None
        return self
