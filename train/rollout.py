"""Learning from one's own samples: prompts -> completions -> rewards -> advantages -> batches of columns.

The policy samples with the weights that it trains with, where they lie; its tokens are trained on as they are.
"""

import base64
import hashlib
import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from configs.errors import RunError, UsageError
from configs.schema import Run
from convert.load import Source, load_params, resolve
from data.pack import Columns, fill_row, pack_window
from data.pairs import join_branches
from data.prompts import Prompt
from data.tokenizer import Tokenizer
from decode.generate import Completion, Stats
from decode.jsonl import dump_row
from decode.load import Model, end_ids
from decode.sampling import SEEDS
from model import lora
from model.tree import join
from sharding.place import place_batch, placer
from sharding.rules import make_rules
from train import advantage
from train.checkpoint import cut_metrics
from train.losses.packed import policy_logprobs
from train.rewards import Rewards, judge_completions, load_rewards, weights_of
from train.sample import as_row, complete, open_prompts
from train.selection import Row, score_of, summarise
from train.setup import Job, Portion
from train.state import State
from train.step import map_pieces

COMPLETIONS = "completions.jsonl"
COLUMNS = ("branches", "sampler_logprobs", "completions")  # besides those of every batch
SHOWN = 200  # characters of a completion on the screen


@dataclass
class Group:
    """A prompt with its completions, as they were judged."""

    prompt: Prompt
    made: list[Completion]
    row: Row  # the same for people and files, with rewards
    scores: list[float]  # NaN: not judged

    @property
    def varied(self) -> bool:
        """Whether some completion is better than another."""
        known = [score for score in self.scores if not np.isnan(score)]
        return len(set(known)) > 1


@dataclass
class Rollouts:
    """The feed of a policy that learns from its own samples."""

    run: Run
    prompts: list[Prompt]
    held_out: list[Prompt]
    rewards: Rewards
    tokenizer: Tokenizer
    end_ids: tuple[int, ...]
    portion: Portion
    drawn: int = 0  # prompts, over all epochs
    uniform: int = 0  # rollouts in a row without two answers of unlike score
    _pending: list[Columns] = field(default_factory=list)
    _reference: Any = None
    _warned: set[str] = field(default_factory=set)
    _seconds: dict[str, float] = field(default_factory=dict)

    @property
    def evaluates(self) -> bool:
        return bool(self.held_out)

    def steps(self, epochs: float) -> int:
        return max(1, round(epochs * len(self.prompts) / self.run.train.batch_size))

    def show(self, job: Job) -> None:
        """Tell the sizes and the first prompt."""
        sample, lengths = self.run.sample, [len(prompt.tokens) for prompt in self.prompts]
        print_lines(
            f"{len(self.prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, {len(self.held_out)} held out; a "
            f"step: {self.run.train.batch_size} prompts x {sample.num_generations} completions of at most "
            f"{sample.max_new_tokens} tokens, in at most {self.portion.microbatches} parts of {self.portion.rows} x "
            f"{self.run.data.max_length}",
            f"first prompt: {self.tokenizer.decode(self.prompts[0].tokens)[:SHOWN]!r}",
        )

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

    def next(self, job: Job, state: State, step: int, say: Any) -> tuple[Columns, Mapping[str, Any]]:
        if self._pending:
            return self._pending.pop(0), {}
        self._seconds = {}
        groups, told = self._roll(job, state, step)
        batches, more = self._batches(job, state, groups)
        self._keep(step, groups, say)
        iterations = self.run.objective.num_iterations
        self._pending = batches * iterations
        times = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        return self._pending.pop(0), {**told, **more, **times}

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

    def _roll(self, job: Job, state: State, step: int) -> tuple[list[Group], dict[str, Any]]:
        """The groups that a rollout trains on, and what to tell of it."""
        sample, wanted = self.run.sample, self.run.train.batch_size * self.run.objective.steps_per_generation
        stats, made, kept = Stats(), [], []
        for _ in range(sample.max_gen_batches):
            missing = wanted - len(kept)
            # few shapes: all of them, or a power of two
            count = min(wanted, 1 << (missing - 1).bit_length())
            new = self._sample(job, state, self._draw(count), stats)
            made += new
            kept += [group for group in new if group.varied or sample.max_gen_batches == 1]
            if len(kept) >= wanted:
                break
        told = self._tell(made, stats, step)
        if len(kept) < wanted:  # better too few prompts to learn from than none: those without a difference are neutral
            kept += [group for group in made if not group.varied]
        return kept[:wanted], told

    def _sample(self, job: Job, state: State, drawn: list[tuple[int, Prompt]], stats: Stats | None) -> list[Group]:
        prompts = [prompt for _, prompt in drawn]
        seeds = [(self.run.sample.seed + number) % SEEDS for number, _ in drawn]
        with self._timed("rollout"):
            model = self._model(job, state)
            made = complete(model, self.run.sample, prompts, seeds, stats=stats, scaled_logprobs=True)
        with self._timed("reward"):
            judged = judge_completions(self.rewards, prompts, made)
        rows = list(map(as_row, prompts, seeds, made, judged.scores))
        scores = [[np.nan if (s := score_of(one, self.run.sample)) is None else s for one in r["completions"]] for r in rows]
        self._constant = judged.constants()
        return list(map(Group, prompts, made, rows, scores))

    def _model(self, job: Job, state: State) -> Model:
        """The policy, to decode with: the very arrays that are trained. On a CPU the layers' views of them are let go
        afterwards, or the step could not update in place."""
        mesh = job.mesh if job.mesh.size > 1 else None
        compute = replace(job.compute, remat="none")
        return Model(job.arch, compute, job.params(state), self.tokenizer, self.end_ids, mesh, unroll=True)

    def _tell(self, groups: list[Group], stats: Stats, step: int) -> dict[str, Any]:
        """What a rollout was like, by TRL's names."""
        F = weights_of(self.run.sample)
        made = [one for group in groups for one in group.made]
        rewards = {n: np.asarray([_number(c["rewards"][n]) for g in groups for c in g.row["completions"]]) for n in F}
        scores = [np.asarray(group.scores) for group in groups]
        lengths = np.asarray([len(one.tokens) for one in made])
        flat, uniform = np.concatenate(scores), np.mean([not group.varied for group in groups])
        self.uniform = self.uniform + 1 if uniform == 1 else 0
        if self.run.sample.max_uniform and self.uniform >= self.run.sample.max_uniform:
            raise RunError(
                f"step {step}: in {self.uniform} rollouts in a row all completions of each prompt had one score: there "
                "is nothing to learn from (sample.max_uniform); usual causes: a reward that is always the same, a task "
                "too hard or too easy, sample.temperature or sample.num_generations too low"
            )
        tokens = sum(map(len, (one.tokens for one in made)))
        return {
            "reward": _mean(flat),
            "reward_std": _mean(np.asarray([_std(s) for s in scores])),
            **{f"rewards/{name}/mean": _mean(values) for name, values in rewards.items()},
            **{f"rewards/{name}/std": _std(values) for name, values in rewards.items()},
            **{f"rewards/{name}/failed": count for name, count in self.rewards.failed.items()},
            "frac_reward_zero_std": float(uniform),
            "completions/mean_length": float(lengths.mean()),
            "completions/min_length": int(lengths.min()),
            "completions/max_length": int(lengths.max()),
            "completions/clipped_ratio": float(np.mean([one.finish_reason != "stop" for one in made])),
            "rollout/prompts": len(groups),
            "rollout/tokens_per_second": tokens / self._seconds["rollout"],
            "rollout/slots_live": stats.share,
        }

    # Completions to batches.

    def _batches(self, job: Job, state: State, groups: list[Group]) -> tuple[list[Columns], dict[str, Any]]:
        """A batch for each step of one pass over the rollout; advantages may need the log-probs of all of it."""
        size = self.run.train.batch_size
        each = [self.pack(groups[i : i + size]) for i in range(0, len(groups), size)]
        with self._timed("score"):
            each = [{**batch, **self._score(job, state, batch)} for batch in each]
        return self._with_advantages(each, groups)

    def pack(self, groups: Sequence[Group]) -> Columns:
        """The columns of a step: each prompt once, its completions behind it, in as few rows as they need.

        A group too long for a row is cut between completions, its prompt then comes again.
        """
        capacity, masked = self.run.data.max_length, self.run.objective.mask_truncated_completions
        examples: list[Columns] = []
        number = 1  # of a completion in the batch; 0: none
        for group in groups:
            start = len(group.prompt.tokens)
            blank = np.zeros(start, np.float32)
            part: list[Columns] = []
            room = capacity - (start - 1)
            for one in group.made:
                size = len(one.tokens)
                if size > room:
                    examples.append(join_branches(part, start))
                    part, room = [], capacity - (start - 1)
                room -= size
                counts = not (masked and one.finish_reason != "stop")
                part.append(
                    {
                        "tokens": np.asarray([*group.prompt.tokens, *one.tokens], np.int32),
                        "weights": np.concatenate([blank, np.full(size, counts, np.float32)]),
                        "sampler_logprobs": np.concatenate([blank, np.asarray(one.logprobs, np.float32)]),
                        "completions": np.concatenate([blank, np.full(size, number)]).astype(np.int32),
                    }
                )
                number += 1
            examples.append(join_branches(part, start))
        return self._stack(examples)

    def _stack(self, examples: list[Columns]) -> Columns:
        """Examples in as few rows as they need; the parts that are computed one after the other fill up in turn."""
        capacity, (rows, parts) = self.run.data.max_length, (self.portion.rows, self.portion.microbatches)
        packed = pack_window([len(example["tokens"]) for example in examples], capacity, None)
        chosen: list[list[int]] = [[] for _ in range(rows * parts)]
        for i, row in enumerate(packed):
            # step.split_batch takes every parts-th row
            chosen[i // rows + parts * (i % rows)] = row
        pad = self.tokenizer.pad_id or 0
        filled = [fill_row([examples[i] for i in row], capacity, pad, COLUMNS) for row in chosen]
        return {name: np.stack([row[name] for row in filled]) for name in filled[0]}

    def _score(self, job: Job, state: State, batch: Columns) -> Columns:
        """Log-probs of the policy before its first step on these tokens, and of the reference, where they are needed."""
        objective, placed = self.run.objective, place_batch(batch, job.mesh, job.rules)
        found: Columns = {}
        score = partial(self._logprobs(job), batch=placed)
        on_policy = objective.num_iterations * objective.steps_per_generation == 1
        if not on_policy or objective.kl_in_reward:
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

    def _keep(self, step: int, groups: Sequence[Group], say: Say) -> None:
        """Append every completion to completions.jsonl and show a few."""

    def evaluate(self, job: Job, state: State) -> dict[str, Any]:
        """The held-out prompts, answered and scored: mean rewards, pass@k, maj@k."""
        drawn = [(SEEDS // 2 + i, prompt) for i, prompt in enumerate(self.held_out)]
        rows = [group.row for group in self._sample(job, state, drawn, None)]
        return {f"eval_{name}": value for name, value in summarise(rows, self.run.sample).items()}

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
        pass
