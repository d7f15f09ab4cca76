"""Many prompts over fixed slots: a finished row's slot is taken by the next one; a prompt's n samples read it once."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from configs.errors import RunError
from decode.load import Model
from decode.prompts import bucket, pad_right
from decode.results import Cut, Teller, find_stop
from decode.rows import NEVER, Prompts, State, advance, empty, finish, place, read_prompts
from decode.rule import Rule
from decode.speculate import Guess, advance_guessing
from sharding.platform import platform

PREFILL_TOKENS = 8192  # prompts are read in batches of at most so many tokens (a longer one alone)
PACE = 8  # steps between two looks at the text, where somebody must look


@dataclass(frozen=True)
class Row:
    """One sequence wanted: which prompt it goes on from, and what ends its text."""

    prompt: int
    negative: int | None = None  # the prompt that guidance leads away from
    stops: tuple[str, ...] = ()


@dataclass
class Finished:
    """One sequence made."""

    tokens: list[int]
    logprobs: list[float]
    top_ids: np.ndarray
    top_values: np.ndarray
    reason: Literal["stop", "length", "timeout"]
    cut: Cut | None
    seconds: float


@dataclass
class Stats:
    """How busy the slots were."""

    slots: int = 0
    steps: int = 0  # of the jitted loop, each over all slots
    live: int = 0  # rows at work, summed over the steps
    prompts: int = 0  # prompts read
    waited: tuple[int, int] = (0, 0)  # steps and live while rows waited for a slot
    seconds: dict[str, float] = field(default_factory=lambda: {"prefill": 0.0, "decode": 0.0})

    @property
    def share(self) -> float:
        """Share of slots at work."""
        return self.live / (self.steps * self.slots) if self.steps else 1.0

    @property
    def share_waited(self) -> float:
        """Share of slots at work while rows waited for one: without the end, when fewer rows than slots are left."""
        steps, live = self.waited
        return live / (steps * self.slots) if steps else 1.0


def run(
    model: Model,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Row],
    rule: Rule,
    *,
    slots: int | None = None,
    cache_dtype: Any = None,
    timeout: float | None = None,
    hear: Callable[[int, str], None] | None = None,
    progress: Callable[[int], None] = lambda rows: None,
    pace: int | None = None,
    stats: Stats | None = None,
    guess: Guess | None = None,
    draft: Model | None = None,
) -> list[Finished]:
    """Generate every row. rule: one row of arrays for each of `rows`; rows of one prompt should stand together.

    slots: rows at a time (None: all). hear(row, piece): text as it comes, every `pace` steps. timeout, in seconds: rows
    not done by then end with what they have. guess: speculative decoding, the same tokens in fewer steps; draft: its
    model. A row's tokens depend on its own prompt, rule and seed alone.
    """
    if not rows:
        return []
    engine = Engine(
        model, prompts, rows, rule, min(slots or len(rows), len(rows)), cache_dtype, stats or Stats(), guess, draft
    )
    deadline = None if timeout is None else engine.start + timeout
    watched = hear is not None or deadline is not None or any(row.stops for row in rows)
    pace = pace or PACE
    tellers = {}
    if hear is not None:
        tellers = {i: Teller(model.tokenizer, row.stops) for i, row in enumerate(rows)}
    known = [0] * len(rows)  # tokens of each row in whose text no stop string is
    with on(model):
        while engine.waiting or engine.at_work:
            late = deadline is not None and time.perf_counter() > deadline
            if late:
                progress(engine.give_up())
                break
            engine.fill()
            engine.go(pace if watched else None)
            ended = engine.ended()
            looked = engine.look(ended if not watched else set(engine.at_work))
            stopped = set()
            for row, (tokens, at_end) in looked.items():
                cut = find_stop(model.tokenizer, tokens[:-1] if at_end else tokens, rows[row].stops, known[row])
                known[row] = len(tokens)
                if cut is not None:
                    engine.cuts[row] = cut
                    stopped.add(row)
                elif row in tellers and not at_end and row not in ended:
                    _tell(hear, row, tellers[row].more(tokens))
            for row in ended | stopped:
                done = engine.collect(row)
                if row in tellers:
                    shown = done.tokens[:-1] if looked[row][1] else done.tokens
                    whole = model.tokenizer.decode(shown, skip_special=True) if done.cut is None else done.cut.text
                    _tell(hear, row, tellers[row].rest(whole))
            engine.free(stopped - ended)
            progress(len(ended | stopped))
    engine.count()
    return [engine.results[i] for i in range(len(rows))]


def _tell(hear: Callable[[int, str], None] | None, row: int, piece: str) -> None:
    if piece and hear is not None:
        hear(row, piece)


class Engine:
    """The host side of a run: which row is in which slot."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[Row],
        rule: Rule,
        slots: int,
        cache_dtype: Any,
        stats: Stats,
        guess: Guess | None,
        draft: Model | None,
    ) -> None:
        self.start = time.perf_counter()
        self.model = model = model.ready(-(-len(rows) // slots) * int(rule.limit.max()))
        self.prompts, self.rows, self.rule, self.stats = prompts, rows, rule, stats
        self.guess, self.draft = guess, None
        if draft is not None and guess is not None:
            self.draft = draft = replace(draft, unroll=model.compute.apart).ready(0)
            self.guess = replace(guess, draft=(draft.arch, draft.compute))
        self.dtype = jnp.dtype(cache_dtype or model.compute.dtype)
        # long prompts first: those read together are of like length
        self.waiting = sorted(range(len(rows)), key=lambda i: (-len(prompts[rows[i].prompt]), rows[i].prompt, i))
        self.at_work: dict[int, int] = {}  # row -> slot
        self.slots: int = slots
        self.each = self._rows_per_prompt()
        self.results: dict[int, Finished] = {}
        self.cuts: dict[int, Cut] = {}
        self.kept: tuple[dict[int, int], Prompts, Prompts | None, np.ndarray, np.ndarray] | None = None
        context = model.arch.max_position
        longest = max(len(prompts[i]) for row in rows for i in (row.prompt, row.negative) if i is not None)
        self.prompt_slots = min(bucket(longest), context)
        sizes = (slots // self.each if self.each > 1 else 0, self.prompt_slots, bucket(int(rule.limit.max())))
        with on(model):
            first = rule.rows(np.zeros(slots, np.int64))
            draft_arch = None if draft is None else draft.arch
            self.state: State = empty(model.arch, model.compute, first, *sizes, self.dtype, draft_arch)
        stats.slots = slots

    def _rows_per_prompt(self) -> int:
        """How many rows share one prompt in the cache: all its samples, when every row starts at once."""
        counts = {}
        for row in self.rows:
            counts[row.prompt] = counts.get(row.prompt, 0) + 1
        alike = set(counts.values())
        together = len(alike) == 1 and self.slots == len(self.rows) and self.rule.guidance is None
        return alike.pop() if together else 1

    def fill(self) -> None:
        """Start waiting rows in the free slots."""
        if not self.waiting:
            return
        free = sorted(set(range(self.slots)) - set(self.at_work.values()))
        taken, self.waiting = self.waiting[: len(free)], self.waiting[len(free) :]
        if not taken:
            return
        began = time.perf_counter()
        where = dict(zip(taken, free, strict=False))
        self.at_work |= where
        if self.kept is not None:  # the samples of a prompt that did not all fit last time
            names = self.kept[0]
            self._place([i for i in taken if names.keys() >= self._needs(i)], where)
            taken = [i for i in taken if not names.keys() >= self._needs(i)]
        for some in self._batches(taken):
            self._read(sorted(set().union(*map(self._needs, some)), key=lambda p: -len(self.prompts[p])))
            self._place(some, where)
        if platform() == "cpu":
            jax.block_until_ready(self.state.done)
        if not self.waiting:
            self.stats.waited = int(self.state.steps), int(self.state.live)
        self.stats.seconds["prefill"] += time.perf_counter() - began

    def _needs(self, row: int) -> set[int]:
        """The prompts that a row must have read."""
        wanted = self.rows[row]
        return {wanted.prompt} if wanted.negative is None else {wanted.prompt, wanted.negative}

    def _batches(self, rows: list[int]) -> list[list[int]]:
        """Rows whose prompts are read together: at first as they are, later by powers of two, so few shapes."""
        prompts = list(dict.fromkeys(self.rows[i].prompt for i in rows))
        if not prompts:
            return []
        most = max(1, PREFILL_TOKENS // bucket(len(self.prompts[prompts[0]])))
        fresh, groups, at = self.kept is None, [], 0
        while at < len(prompts):
            left = min(most, len(prompts) - at)
            size = left if fresh else 1 << (left.bit_length() - 1)
            chosen = set(prompts[at : at + size])
            groups.append([i for i in rows if self.rows[i].prompt in chosen])
            at += size
        return groups

    def _read(self, prompts: list[int]) -> None:
        """Read these prompts together."""
        some = [self.prompts[i] for i in prompts]
        tokens, segments = pad_right(some, min(bucket(max(map(len, some))), self.prompt_slots))
        m = self.model
        done, drafted = read_prompts(m.arch, m.compute, m.params, tokens, segments, self.dtype), None
        if (d := self.draft) is not None:
            drafted = read_prompts(d.arch, d.compute, d.params, tokens, segments, self.dtype)
        self.kept = ({p: i for i, p in enumerate(prompts)}, done, drafted, tokens, segments.sum(1).astype(np.int32))
        self.stats.prompts += len(prompts)

    def _place(self, rows: list[int], where: dict[int, int]) -> None:
        """Start rows whose prompts were just read."""
        if not rows:
            return
        assert self.kept is not None
        names, prompts, drafted, tokens, lengths = self.kept
        size = self.slots if len(rows) == self.slots else 1 << (len(rows) - 1).bit_length()
        pad, guided = size - len(rows), self.rule.guidance is not None
        slots, first = [where[i] for i in rows], [names[self.rows[i].prompt] for i in rows]
        shared = zip(first, slots, strict=True) if self.each > 1 else ()
        pairs = list(dict.fromkeys((n, slot // self.each) for n, slot in shared))
        prompt_of = first + [0] * pad
        if guided:
            away = [names[n] if (n := self.rows[i].negative) is not None else names[self.rows[i].prompt] for i in rows]
            prompt_of += away + [0] * pad
        index = lambda values: np.asarray(list(values), np.int32)  # noqa: E731
        source, slot = (index(pair[side] for pair in pairs) for side in (0, 1))
        self.state = place(
            self.model.arch, self.model.params, self.state, prompts, tokens, lengths, source, slot, index(prompt_of),
            index(slots + [self.slots] * pad), self.rule.rows(np.asarray(rows + rows[:1] * pad)), drafted,
        )  # fmt: skip

    def go(self, steps: int | None) -> None:
        """Decode until somebody must look: a slot is free for a waiting row, or so many steps are made."""
        began = time.perf_counter()
        idle = self.slots - len(self.at_work)
        enough = idle + max(1, self.slots // 16) if self.waiting else self.slots
        m, most = self.model, np.int32(steps or self.state.context.tokens.shape[1])
        enough = np.int32(min(enough, self.slots))
        if self.guess is None:
            self.state = advance(m.arch, m.compute, m.params, self.state, most, enough)
        else:
            draft = None if self.draft is None else self.draft.params
            self.state = advance_guessing(
                m.arch, m.compute, m.params, draft, self.state, most, enough, self.guess
            )  # fmt: skip
        jax.block_until_ready(self.state.done)
        self.stats.seconds["decode"] += time.perf_counter() - began

    def ended(self) -> set[int]:
        """Rows at work that are done."""
        done, failed = np.asarray(self.state.done), np.asarray(self.state.failed)
        for row, slot in self.at_work.items():
            if failed[slot] != NEVER:
                raise RunError(
                    f"row {row + 1} (prompt {self.rows[row].prompt + 1}): the logits of new token {failed[slot] + 1} "
                    "are not finite: the weights or a logits processor are broken, or the processors leave no token"
                )
        return {row for row, slot in self.at_work.items() if done[slot]}

    def look(self, rows: set[int]) -> dict[int, tuple[list[int], bool]]:
        """The new tokens of rows at work, and whether the last is one that ended the row."""
        if not rows:
            return {}
        context, told = self.state.context, self.state.told
        tokens, begin, end = jax.device_get((context.tokens, context.prompt_length, context.length))
        self.told = jax.device_get((told.logprobs, told.ids, told.values))
        seen = {}
        for row in rows:
            slot = self.at_work[row]
            new = tokens[slot, begin[slot] : end[slot]].tolist()
            seen[row] = (new, bool(new) and new[-1] in self.rule.stop_ids[row])
        self.seen = seen
        return seen

    def collect(self, row: int) -> Finished:
        """The result of a row; its slot is free afterwards."""
        slot, (tokens, ended), cut = self.at_work.pop(row), self.seen[row], self.cuts.pop(row, None)
        tokens = tokens if cut is None else tokens[: cut.tokens]
        (logprobs, ids, values), n = self.told, len(tokens)
        reason = "stop" if ended or cut is not None else "length"
        self.results[row] = Finished(
            tokens, logprobs[slot, :n].tolist(), ids[slot, :n], values[slot, :n], reason, cut,
            time.perf_counter() - self.start,
        )  # fmt: skip
        return self.results[row]

    def free(self, rows: set[int]) -> None:
        """Rows that a stop string ended are done on the device too."""
        if rows:
            busy = np.zeros(self.slots, bool)
            busy[list(self.at_work.values())] = True
            self.state = finish(self.state, ~busy)

    def give_up(self) -> int:
        """End all rows as they are: the time is up."""
        late = set(self.at_work)
        self.look(late)
        for row in late:
            self.results[row] = replace(self.collect(row), reason="timeout")
        blank = np.zeros((0, self.rule.logprobs))
        for row in self.waiting:
            self.results[row] = Finished([], [], blank, blank, "timeout", None, time.perf_counter() - self.start)
        waiting, self.waiting = len(self.waiting), []
        return len(late) + waiting

    def count(self) -> None:
        """Put the device's counters into the statistics."""
        self.stats.steps += int(self.state.steps)
        self.stats.live += int(self.state.live)


def on(model: Model) -> AbstractContextManager[Any]:
    """Compute where the weights lie."""
    return nullcontext() if model.mesh is None else jax.set_mesh(model.mesh)
