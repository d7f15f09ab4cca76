"""Decoding strategies in plain Python and NumPy, float64, slow, one prompt at a time: what the jitted ones must equal.

A model is a callable `logits(tokens) -> [V]`: the logits that follow `tokens` (prompt and new ones). `process(tokens,
scores) -> scores` is the chain of logits processors. Beam search follows transformers 5 (checked by
tests/parity/test_beam_parity.py), diverse beam search and contrastive search follow transformers 4.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

Row = np.ndarray  # f[V]
Logits = Callable[[list[int]], Row]
Process = Callable[[list[int], Row], Row]


def log_softmax(logits: Row) -> Row:
    """In float64."""
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max()
    return logits - np.log(np.exp(logits).sum())


def _as_it_is(tokens: list[int], scores: Row) -> Row:
    return scores


# ---- one sequence at a time


def decode_loop(
    choose: Callable[[list[int]], int],
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    stop: Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
) -> tuple[list[int], str]:
    """The new tokens, whatever ended them included, and why they ended: "stop" or "length".

    A stop string ends a sequence with the token that completes it in the text of the new tokens.
    """
    new: list[int] = []
    while len(new) < max_new_tokens:
        new.append(choose([*prompt, *new]))
        if new[-1] in stop_ids:
            return new, "stop"
        if stop and decode is not None and any(text in decode(new) for text in stop):
            return new, "stop"
    return new, "length"


def greedy(logits: Logits, process: Process = _as_it_is) -> Callable[[list[int]], int]:
    """Choose the likeliest token, the first of equals."""
    return lambda tokens: int(np.argmax(process(tokens, np.asarray(logits(tokens), np.float64))))


def contrastive(
    logits: Logits, hidden: Callable[[list[int]], np.ndarray], *, top_k: int, penalty_alpha: float
) -> Callable[[list[int]], int]:
    """Contrastive search (arXiv 2202.06417): hidden(tokens) -> [T, D], the states that the head reads.

    Of the top_k likeliest tokens v the one with the largest (1 - alpha) p(v) - alpha max_j cos(h_v, h_j), where h_v is
    the state at v's own position after reading it, and j runs over everything before it, prompt included.
    """

    def choose(tokens: list[int]) -> int:
        logprobs = log_softmax(logits(tokens))
        best, choice = -np.inf, -1
        for v in np.argsort(-logprobs, kind="stable")[:top_k].tolist():
            states = np.asarray(hidden([*tokens, v]), np.float64)
            states /= np.linalg.norm(states, axis=1, keepdims=True)
            value = (1 - penalty_alpha) * np.exp(logprobs[v]) - penalty_alpha * (states[:-1] @ states[-1]).max()
            if value > best:
                best, choice = value, v
        return choice

    return choose


# ---- beams


@dataclass
class Found:
    """The beams, best first, and how much the log-probs may move before a decision that led to them could turn."""

    tokens: list[list[int]]
    scores: list[float]
    margin: float
    stopped: list[bool]  # ended by a stop id (else by max_new_tokens)
    sums: list[float]  # scores before the length penalty


@dataclass
class _Group:
    """num_beams / num_beam_groups beams that compete with each other."""

    running: list[tuple[float, tuple[int, ...]]] = field(default_factory=lambda: [(0.0, ())])  # best first
    finished: list[tuple[float, tuple[int, ...], float]] = field(default_factory=list)  # score, tokens, sum; best first
    open: bool = True


def beam_search(
    logits: Logits,
    prompt: Sequence[int],
    *,
    num_beams: int,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    num_beam_groups: int = 1,
    diversity_penalty: float = 0.0,
    process: Process = _as_it_is,
) -> Found:
    """Beam search; with num_beam_groups > 1 diverse beam search (arXiv 1610.02424, Hamming diversity).

    Scores are sums of processed log-probs (processors see log-probs, and nothing is normalised again) divided by
    length ** length_penalty, the length being that of the new tokens, the end-of-sequence token included.

    A step ranks all continuations of a group's beams. Those that stop and are among the best num_beams become
    finished; the best num_beams that go on are the next beams. The group keeps its num_beams best finished ones, and
    is closed once it has that many and either early_stopping is True, or the best beam's score, over its present length
    (over max_new_tokens if early_stopping is "never" and the penalty rewards length), is no better than the worst of
    them. With max_new_tokens reached everything stops.

    Groups choose one after the other at each step: a token costs diversity_penalty for each beam of an earlier group
    that has just gone on with it. The cost stays in the beam's sum, thus in its score. A closed group costs nobody
    anything. Results of all groups are ranked together.
    """
    size, rest = divmod(num_beams, num_beam_groups)
    assert rest == 0
    groups = [_Group() for _ in range(num_beam_groups)]
    margin = _Margin()
    for length in range(1, max_new_tokens + 1):
        taken: list[int] = []
        for group in groups:
            if not group.open:
                continue
            table = [process([*prompt, *new], log_softmax(logits([*prompt, *new]))) for _, new in group.running]
            scores = np.stack(table)
            scores = scores - diversity_penalty * np.bincount(taken, minlength=scores.shape[1])[None]
            _step(group, scores, size, length, max_new_tokens, eos_ids, length_penalty, early_stopping, margin)
            taken += [new[-1] for _, new in group.running]
        if not any(group.open for group in groups):
            break
    found = sorted((f for group in groups for f in group.finished), key=lambda f: -f[0])
    for a, b in pairwise(found):
        margin.between(a[0], len(a[1]), b[0], len(b[1]), length_penalty)
    return Found(
        [list(new) for _, new, _ in found],
        [score for score, _, _ in found],
        margin.smallest,
        [new[-1] in eos_ids for _, new, _ in found],
        [total for _, _, total in found],
    )


class _Margin:
    """The smallest gap that decided something, in units of summed log-probs."""

    smallest = np.inf

    def see(self, gap: float) -> None:
        self.smallest = min(self.smallest, abs(float(gap)))

    def between(self, a: float, length_a: int, b: float, length_b: int, length_penalty: float) -> None:
        """Two scores of sequences of these lengths."""
        self.see((a - b) * min(length_a**length_penalty, length_b**length_penalty))


def _step(
    group: _Group,
    scores: np.ndarray,
    size: int,
    length: int,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    length_penalty: float,
    early_stopping: bool | str,
    margin: _Margin,
) -> None:
    """One step of an open group; scores [beams, V], `length` new tokens after it."""
    totals = (np.asarray([total for total, _ in group.running])[:, None] + scores).ravel()
    wanted = (len(eos_ids) + 2) * size  # enough that `size` + 1 of them go on
    near = np.flatnonzero(totals >= np.partition(totals, -min(wanted, totals.size))[-min(wanted, totals.size)])
    order = near[np.argsort(-totals[near], kind="stable")][:wanted]
    ranked = [
        (float(totals[i]), (*group.running[i // scores.shape[1]][1], int(i % scores.shape[1])))
        for i in order
        if totals[i] > -np.inf
    ]
    last = length == max_new_tokens
    ends = [new[-1] in eos_ids for _, new in ranked]
    stops = [last or end for end in ends]

    going = [candidate for candidate, end in zip(ranked, ends, strict=True) if not end]
    group.running = going[:size]
    if len(going) > size:
        margin.see(going[size - 1][0] - going[size][0])
    for rank, stop in enumerate(stops):  # in or out of the best `size`?
        if stop and len(ranked) > size:
            margin.see(ranked[rank][0] - ranked[size if rank < size else size - 1][0])

    fresh = [
        (total / length**length_penalty, new, total)
        for (total, new), stop in zip(ranked[:size], stops, strict=False)
        if stop
    ]
    merged = sorted([*group.finished, *fresh], key=lambda f: -f[0])  # stable: an equal that came before wins
    group.finished = merged[:size]
    for dropped in merged[size:]:
        margin.between(merged[size - 1][0], len(merged[size - 1][1]), dropped[0], len(dropped[1]), length_penalty)

    if last:
        group.open = False
    elif len(group.finished) == size:
        if early_stopping is True:
            group.open = False
        else:
            reach = max_new_tokens if early_stopping == "never" and length_penalty > 0 else length
            possible, worst = group.running[0][0] / reach**length_penalty, group.finished[-1]
            margin.between(possible, reach, worst[0], len(worst[1]), length_penalty)
            group.open = possible > worst[0]
