"""Learning from one's own samples: prompts -> completions -> rewards -> advantages -> batches of columns.

The policy samples with the weights that it trains with, where they lie; its tokens are trained on as they are.
"""

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from configs.errors import RunError, UsageError
from configs.schema import Run
from convert.load import Source, load_params, load_tokenizer, resolve
from data.pack import Columns
from data.prompts import Prompt
from data.tokenizer import Tokenizer
from decode.generate import Stats
from decode.jsonl import dump_row
from decode.load import Model, end_ids
from decode.sampling import SEEDS
from model import lora
from model.tree import join
from sharding.place import place_batch, placer
from sharding.rules import Rules
from train.advantage import reward_metrics
from train.feed import Say
from train.groups import Group, number_of, pack, pack_arrays, places_of, portion_of, unpack_arrays
from train.losses.packed import policy_logprobs
from train.metrics import cut_metrics
from train.rewards import Judged, Rewards, Score, judge_completions, load_rewards, weights_of
from train.sample import as_row, complete, open_prompts
from train.selection import Row, score_of, summarise
from train.setup import Job, Portion
from train.state import State
from train.step import map_pieces
from train.verifiers.extract import text_of

COMPLETIONS = "completions.jsonl"
PATIENCE = 10  # rollouts
SHOWN = 200  # characters of a completion on the screen


@dataclass
class Rollouts:
    """The feed of a policy that learns from its own samples."""

    run: Run
    prompts: list[Prompt]
    held_out: list[Prompt]
    rewards: Rewards
    tokens: Tokenizer
    end_ids: tuple[int, ...]
    portion: Portion
    drawn: int = 0  # prompts, over all epochs
    uniform: int = 0  # rollouts in a row without two answers of unlike score
    _pending: list[Columns] = field(default_factory=list)
    _reference: Any = None
    _seconds: dict[str, float] = field(default_factory=dict)
    _scorer: Any = None
    _begun: bool = False  # whether completions.jsonl has been written to
    _constant: dict[str, int] = field(default_factory=dict)  # rollouts in a row in which a reward gave one score

    @property
    def tokenizer(self) -> Tokenizer:
        return self.tokens

    @property
    def evaluates(self) -> bool:
        return bool(self.held_out)

    @property
    def _on_policy(self) -> bool:
        """Whether samples are learnt from in one step, with the weights that made them."""
        return self.run.objective.num_iterations * self.run.objective.steps_per_generation == 1

    def steps(self, epochs: float) -> int:
        return max(1, round(epochs * len(self.prompts) / self.run.train.batch_size))

    def show(self, job: Job) -> None:
        """Tell the sizes and the first prompt."""
        sample, lengths = self.run.sample, [len(prompt.tokens) for prompt in self.prompts]
        lines = (
            f"{len(self.prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, {len(self.held_out)} held out; a "
            f"step: {self.run.train.batch_size} prompts x {sample.num_generations} completions of at most "
            f"{sample.max_new_tokens} tokens, in at most {self.portion.microbatches} parts of {self.portion.rows} x "
            f"{self.run.data.max_length}",
            f"first prompt: {self.tokens.decode(self.prompts[0].tokens)[:SHOWN]!r}",
        )
        print(*lines, sep="\n", file=sys.stderr)

    def begin(self, job: Job, state: State) -> None:
        """Keep the reference, if the loss compares with one: the trainable weights as they are now, or a MODEL."""
        objective = self.run.objective
        if not objective.needs_reference:
            return
        if objective.reference == "model":
            source = resolve(objective.reference_model or "")
            place = placer(lora.sharding_of(source.arch, job.mesh, job.rules))
            self._reference = load_params(source, place, jnp.dtype(self.run.model.param_dtype))
        elif objective.reference == "cached":
            self._reference = jax.tree.map(jnp.copy, state.params)

    def next(self, job: Job, state: State, step: int, say: Say) -> tuple[Columns, Mapping[str, Any]]:
        if self._pending:
            return self._pending.pop(0), {}
        self._seconds = {}
        groups, left, told = self._roll(job, state, step, say)
        self._pending = self._batches(job, state, groups) * self.run.objective.num_iterations
        self._keep(step, [group.row for group in (*groups, *left)])
        self._show(step, groups, say)
        self._check_uniform(step)
        times = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        return self._pending.pop(0), {**told, **times}

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began

    # Prompts to completions with rewards.

    def _draw(self, count: int) -> list[tuple[int, Prompt]]:
        """The next prompts, each with its number over all epochs, which is its seed."""
        size, numbers = len(self.prompts), range(self.drawn, self.drawn + count)
        self.drawn += count
        return [(number, self.prompts[self._order(number // size)[number % size]]) for number in numbers]

    def _order(self, epoch: int) -> list[int]:
        size = len(self.prompts)
        if not self.run.data.shuffle:
            return list(range(size))
        return np.random.default_rng((self.run.data.seed, epoch)).permutation(size).tolist()

    def _roll(self, job: Job, state: State, step: int, say: Say) -> tuple[list[Group], list[Group], dict[str, Any]]:
        """The groups that a rollout trains on, those that it does not, and what to tell of them all."""
        sample, wanted = self.run.sample, self.run.train.batch_size * self.run.objective.steps_per_generation
        stats, kept, left, amiss = Stats(), [], [], Counter[str]()
        for _ in range(sample.max_gen_batches):
            missing = wanted - len(kept)
            # few shapes: all of them, or a power of two
            count = min(wanted, 1 << (missing - 1).bit_length())
            new, judged = self._sample(job, state, self._draw(count), stats, step)
            for what, counts in (("failed", judged.failed), ("late", judged.late)):
                amiss.update({f"rewards/{name}/{what}": count for name, count in counts.items()})
            for group in new:
                (kept if group.varied or sample.max_gen_batches == 1 else left).append(group)
            if len(kept) >= wanted:
                break
        told = {**self._tell([*kept, *left], stats), **amiss}
        self._warn_of_constants(told, say)
        # better too few prompts to learn from than none: those without a difference are neutral
        several = [*kept, *left]
        return several[:wanted], several[wanted:], told

    def _warn_of_constants(self, told: Mapping[str, Any], say: Say) -> None:
        """Name a reward that tells no completion from another, once it has lasted."""
        for name in self.rewards.each:
            self._constant[name] = self._constant.get(name, 0) + 1 if told.get(f"rewards/{name}/std") == 0 else 0
            if self._constant[name] == PATIENCE:
                say(f"reward '{name}': one score for all completions of {PATIENCE} rollouts in a row")

    def _sample(
        self, job: Job, state: State, drawn: list[tuple[int, Prompt]], stats: Stats | None, step: int
    ) -> tuple[list[Group], Judged]:
        prompts = [prompt for _, prompt in drawn]
        seeds = [(self.run.sample.seed + number) % SEEDS for number, _ in drawn]
        with self._timed("rollout"):
            model = self._model(job, state)
            made = complete(model, self.run.sample, prompts, seeds, stats=stats, scaled_logprobs=True)
        with self._timed("reward"):
            try:
                judged = judge_completions(self.rewards, prompts, made)
            except RunError:  # they have cost much
                nothing: list[list[dict[str, Score]]] = [[{} for _ in several] for several in made]
                self._keep(step, list(map(as_row, prompts, seeds, made, nothing)))
                raise
        rows = list(map(as_row, prompts, seeds, made, judged.scores))
        for row in rows:
            for one in row["completions"]:
                one["reward"] = score_of(one, self.run.sample)
        return list(map(Group, prompts, made, rows)), judged

    def _model(self, job: Job, state: State) -> Model:
        """The policy, to decode with: the very arrays that are trained. On a CPU the layers' views of them are let go
        afterwards, or the step could not update in place."""
        mesh = job.mesh if job.mesh.size > 1 else None
        compute = replace(job.compute, remat="none")
        return Model(job.arch, compute, job.params(state), self.tokens, self.end_ids, mesh, unroll=True)

    def _check_uniform(self, step: int) -> None:
        """Stop where nothing is learnt any more, if that was asked for."""
        if self.run.sample.max_uniform and self.uniform >= self.run.sample.max_uniform:
            raise RunError(
                f"step {step}: in {self.uniform} rollouts in a row all completions of each prompt had one score: there "
                "is nothing to learn from (sample.max_uniform); usual causes: a reward that is always the same, a task "
                "too hard or too easy, sample.temperature or sample.num_generations too low"
            )

    def _tell(self, groups: list[Group], stats: Stats) -> dict[str, Any]:
        """What a rollout was like, by TRL's names."""
        made = [one for group in groups for one in group.made]
        lengths = np.asarray([len(one.tokens) for one in made])
        self.uniform = 0 if any(group.varied for group in groups) else self.uniform + 1
        return {
            **reward_metrics(*self._rewards(groups)),
            "completions/mean_length": float(lengths.mean()),
            "completions/min_length": int(lengths.min()),
            "completions/max_length": int(lengths.max()),
            "completions/clipped_ratio": float(np.mean([one.finish_reason != "stop" for one in made])),
            "rollout/prompts": len(groups),
            "rollout/tokens_per_second": int(lengths.sum()) / self._seconds["rollout"],
            "rollout/slots_live": stats.share,
        }

    def _rewards(self, groups: Sequence[Group]) -> tuple[np.ndarray, dict[str, float], np.ndarray]:
        """Rewards of all completions [N, F], NaN where not judged, their weights by name, and the group of each row."""
        made = [one for group in groups for one in group.row["completions"]]
        rewards = np.asarray([[number_of(score) for score in one["rewards"].values()] for one in made])
        weights, penalty = weights_of(self.run.sample), self.run.sample.missing_eos_penalty
        if penalty:  # one more, of those that are judged at all
            late = [one["finish_reason"] != "stop" for one in made]
            rewards = np.column_stack([rewards, np.where(np.isnan(rewards).all(1), np.nan, late)])
            weights = {**weights, "missing_eos": -penalty}
        return rewards, weights, np.repeat(np.arange(len(groups)), [len(group.made) for group in groups])

    # Completions to batches.

    def _batches(self, job: Job, state: State, groups: list[Group]) -> list[Columns]:
        """A batch for each step of one pass over the rollout, whose advantages are made of all of it at once."""
        size, objective = self.run.train.batch_size, self.run.objective
        if not objective.kl_in_reward:
            self._set_advantages(job, groups, None)
        cut = partial(pack, run=self.run, portion=self.portion, pad_id=self.tokens.pad_id or 0)
        parts = [groups[i : i + size] for i in range(0, len(groups), size)]
        batches = [cut(part) for part in parts]
        with self._timed("score"):
            batches = [{**batch, **self._score(job, state, batch)} for batch in batches]
        if objective.kl_in_reward:
            ratios = [b["old_logprobs"] - b["ref_logprobs"] for b in batches]
            each = zip(ratios, batches, strict=True)
            self._set_advantages(
                job, groups, [x.reshape(-1)[at] for x, b in each for at in places_of(b["completions"])]
            )
        return [self._with_advantages(batch, part) for batch, part in zip(batches, parts, strict=True)]

    def _set_advantages(self, job: Job, groups: list[Group], ratios: list[np.ndarray] | None) -> None:
        """The advantages of a rollout's completions; the rows for people and files get their means."""
        rewards, weights, number = self._rewards(groups)
        lengths = [len(one.tokens) for group in groups for one in group.made]
        counted = [x for group in groups for x in group.counted(self.run.objective.mask_truncated_completions)]
        make = job.recipe.advantages
        assert make is not None
        made = iter(make(rewards, list(weights.values()), number, lengths, ratios, np.asarray(counted)))
        for group in groups:
            group.advantages = [next(made) for _ in group.made]
            for one, values in zip(group.row["completions"], group.advantages, strict=True):
                one["advantage"] = float(np.mean(values))

    def _with_advantages(self, batch: Columns, groups: list[Group]) -> Columns:
        """The columns of a step, those that only advantages were made of left out."""
        column = np.zeros(batch["tokens"].size, np.float32)
        known = (one for group in groups for one in group.advantages or ())
        for at, values in zip(places_of(batch["completions"]), known, strict=True):
            column[at] = values
        # on policy the ratio is exactly 1: old log-probs, if there are any, were for the rewards
        left = ("completions", "old_logprobs") if self._on_policy else ("completions",)
        kept = {name: x for name, x in batch.items() if name not in left}
        return {**kept, "advantages": column.reshape(batch["tokens"].shape)}

    def _score(self, job: Job, state: State, batch: Columns) -> Columns:
        """Log-probs of the policy before its first step on these tokens, and of the reference, where needed."""
        objective, placed = self.run.objective, place_batch(batch, job.mesh, job.rules)
        found: Columns = {}
        score = partial(self._logprobs(job), batch=placed)
        if not self._on_policy or objective.kl_in_reward:
            found["old_logprobs"] = np.asarray(score(job.params(state)))
        if objective.needs_reference:
            found["ref_logprobs"] = np.asarray(score(self._reference_params(job, state)))
        return found

    def _logprobs(self, job: Job) -> Any:
        if self._scorer is None:
            logprobs = partial(
                policy_logprobs, arch=job.arch, compute=job.compute, chunk=self.run.objective.loss_chunk,
                temperature=self.run.sample.temperature,
            )  # fmt: skip

            def score(params: Any, batch: Any) -> Float[Array, "B T"]:
                made = map_pieces(
                    lambda piece: {"logprobs": logprobs(params, piece, where=piece["branches"] > 0)},
                    batch, self.portion.microbatches,
                )  # fmt: skip
                return made["logprobs"]

            self._scorer = jax.jit(score)
        return self._scorer

    def _reference_params(self, job: Job, state: State) -> Any:
        match self.run.objective.reference:
            case "adapterless":
                return lora.detach(job.params(state))
            case "moving":
                return join(state.carried["reference"], job.frozen)
            case "model":
                return self._reference
        return join(self._reference, job.frozen)

    # Files.

    def _keep(self, step: int, rows: Sequence[Row]) -> None:
        """Append completions with all that is known of them to completions.jsonl, from which those are cut that a run
        before has left of this step: it ended without a checkpoint of it."""
        if not self._begun:
            cut_metrics(Path(self.run.output) / COMPLETIONS, step - 1)
            self._begun = True
        with open(Path(self.run.output) / COMPLETIONS, "a", encoding="utf-8") as file:
            file.write("".join(dump_row({"step": step, **row}) + "\n" for row in rows))

    def _show(self, step: int, groups: Sequence[Group], say: Say) -> None:
        """Tell a few completions."""
        count = self.run.log.completions
        several = [(group, one) for group in groups for one in group.row["completions"]]
        for group, one in several[:: max(1, len(several) // max(1, count))][:count]:
            asked, said = (" ".join(text_of(x).split())[-SHOWN:] for x in (group.row["prompt"], one["text"]))
            say(f"step {step}: {asked!r} -> {said!r}: reward {one['reward']:.3g}, advantage {one['advantage']:.3g}")

    def evaluate(self, job: Job, state: State) -> dict[str, Any]:
        """The held-out prompts, answered and scored: mean rewards, pass@k, maj@k."""
        drawn = [(SEEDS // 2 + i, prompt) for i, prompt in enumerate(self.held_out)]
        groups, _ = self._sample(job, state, drawn, None, int(state.step))
        found = summarise([group.row for group in groups], self.run.sample)
        return {f"eval_{name}": value for name, value in found.items()}

    def marks(self) -> dict[str, Any]:
        """The prompts with all that rewards read of them."""
        said = json.dumps([[p.tokens, p.columns] for p in self.prompts], sort_keys=True, default=str)
        return {"prompts": hashlib.sha256(said.encode()).hexdigest(), "count": len(self.prompts)}

    def position(self) -> dict[str, Any]:
        """Prompts drawn, and the batches of a rollout that are still to be trained on: its weights are gone."""
        return {"drawn": self.drawn, "uniform": self.uniform, "pending": [pack_arrays(one) for one in self._pending]}

    def restore(self, position: dict[str, Any], step: int) -> None:
        self.drawn, self.uniform = position["drawn"], position["uniform"]
        self._pending = [unpack_arrays(one) for one in position["pending"]]
        cut_metrics(Path(self.run.output) / COMPLETIONS, step)

    def close(self) -> None:
        """Nothing is held open."""


def open_rollouts(run: Run, source: Source, mesh: Mesh, rules: Rules) -> Rollouts:
    """Read and check prompts and rewards; what cannot work is refused."""
    kept = run.data.held_out.get("", ())
    prompts, held_out = (open_prompts(run, paths) if paths else [] for paths in (run.data.train, kept))
    prompts = fitting(run, prompts)
    rewards = load_rewards(run.sample, [*prompts, *held_out])
    tokenizer = load_tokenizer(source)
    if run.data.chat_template is not None:
        tokenizer = tokenizer.with_chat_template(run.data.chat_template)
    ends = end_ids(source, tokenizer)
    portion = portion_of(run, max(len(prompt.tokens) for prompt in prompts), mesh, rules)
    return Rollouts(run, prompts, held_out, rewards, tokenizer, ends, portion)


def fitting(run: Run, prompts: list[Prompt]) -> list[Prompt]:
    """The prompts that leave room for a completion in a row; the others are refused, or dropped and counted."""
    room = run.data.max_length + 1 - run.sample.max_new_tokens
    kept = [prompt for prompt in prompts if len(prompt.tokens) <= room]
    if len(kept) == len(prompts):
        return prompts
    long, dropped = next(prompt for prompt in prompts if len(prompt.tokens) > room), len(prompts) - len(kept)
    said = (
        f"{long.where}: the prompt has {len(long.tokens)} tokens, which with sample.max_new_tokens "
        f"{run.sample.max_new_tokens} do not fit a row of data.max_length {run.data.max_length}"
    )
    if run.data.truncation != "drop":
        raise UsageError(f"{said}: raise it, or leave out {dropped} prompts with data.truncation=drop")
    if not kept:
        raise UsageError(f"no prompt is left: {said}")
    print(f"{dropped} prompts are dropped (data.truncation): {said}", file=sys.stderr)
    return kept
