"""Rows to examples: unshifted tokens and, for each, how much its prediction counts. Nothing here knows batches."""

import functools
import os
import threading
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.errors import UsageError
from data.chat import Example, encode_chat, encode_completion
from data.fim import encode_fim
from data.formats import normalise
from data.manifest import check_tokenizer
from data.pack import Piece, shifted
from data.pairs import encode_pair, fit_pair, pairs_of
from data.rewards import encode_reward, encode_steps, fit_reward, fit_steps
from data.sources import Records, open_source
from data.tokenizer import Tokenizer
from data.unpaired import encode_labelled, fit_labelled, fit_mismatched, labelled_of

if TYPE_CHECKING:
    from configs.schema import Data

# why a row gives no example
REASONS = {
    "bad_row": "malformed",
    "too_long": "longer than data.max_length (data.truncation is drop)",
    "too_short": "fewer than two tokens",
    "no_trained_token": "no token carries loss (after truncation to data.max_length)",
    "no_pair": "without a pair (equal answers or scores, or a margin below data.min_margin)",
}
KEPT, UNSEEN = 0, -1
CACHE_BYTES = 2 << 30
PORTION = 1024  # examples that are tokenised together
THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Kind:
    """How a row becomes examples: its form to theirs (one where None), a form to tokens, tokens to what fits a row of a
    batch; the columns besides the usual ones. mismatched: `fit` also takes the completion of the row before."""

    encode: Callable[..., Any]
    fit: Callable[..., tuple[Example | None, str]]
    columns: tuple[str, ...] = ()
    expand: Callable[[Mapping[str, Any], "Data"], list[Any]] | None = None
    mismatched: bool = False


def to_example(record: Mapping[str, Any], tokenizer: Tokenizer, data: "Data", where: str = "row") -> Example | None:
    """The example of a row, cut to data.max_length positions; None when it is dropped. Malformed rows raise
    ValueError naming `where`."""
    try:
        return fit(encode_row(record, tokenizer, data), data)[0]
    except ValueError as error:
        raise type(error)(f"{where}: {error}") from error


def encode_row(record: Mapping[str, Any], tokenizer: Tokenizer, data: "Data", roles: bool = False) -> Example:
    """All tokens of a row, before any truncation; roles as in encode_chat, for conversations."""
    return encode_form(normalise(record, data.format), tokenizer, data, roles)


def encode_form(form: Mapping[str, Any], tokenizer: Tokenizer, data: "Data", roles: bool = False) -> Example:
    """All tokens of a row in one of the forms of one completion."""
    if set(form) <= {"prompt", "tools"}:
        raise UsageError("the row is a prompt without a completion: there is nothing to learn in it")
    if "labels" in form:
        raise UsageError("the row has labelled steps, which only objective.type=process_reward trains on")
    if not {"tokens", "text", "messages", "completion"} & form.keys():
        raise UsageError(f"the row is a preference ({', '.join(form)}), which objective.type=sft does not train on")
    if data.add_eos and not tokenizer.eos_ids and ("text" in form or isinstance(form.get("prompt"), str)):
        raise UsageError("data.add_eos is true, but the tokenizer has no end-of-sequence token: set data.add_eos=false")
    if "tokens" in form:
        return _from_tokens(form, tokenizer)
    if "text" in form:
        if data.fim_rate:
            made = encode_fim(form["text"], tokenizer, data.fim_rate, data.fim_spm_rate, data.seed, data.add_eos)
            if made is not None:
                return made
        return encode_completion(tokenizer, "", form["text"], data.add_eos)
    if "messages" in form:
        return encode_chat(tokenizer, form["messages"], data.train_on, form.get("tools"), roles)
    prompt, completion = form["prompt"], form["completion"]
    if isinstance(prompt, str):
        return encode_completion(tokenizer, prompt, completion, data.add_eos, data.completion_only)
    if data.completion_only:
        prompt = [{**message, "weight": 0} if isinstance(message, Mapping) else message for message in prompt]
    return encode_chat(tokenizer, [*prompt, *completion], data.train_on, form.get("tools"), roles)


def _from_tokens(form: Mapping[str, Any], tokenizer: Tokenizer) -> Example:
    tokens, weights = form["tokens"], form.get("weights")
    if isinstance(tokens, np.ndarray):  # of a shard: no step through its ids in Python
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(f"'tokens' must be one row of integers, got {tokens.dtype}[{tokens.shape}]")
        outside = tokens[(tokens < 0) | (tokens >= tokenizer.vocab_size)]
        wrong = outside[0] if outside.size else None
    elif all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        wrong = next((token for token in tokens if not 0 <= token < tokenizer.vocab_size), None)
    else:
        raise ValueError("'tokens' must be a list of integers")
    if wrong is not None:
        raise ValueError(f"token id {wrong} is outside the tokenizer's vocabulary (0 to {tokenizer.vocab_size - 1})")
    if weights is None:
        return {"tokens": np.asarray(tokens, np.int32), "weights": np.ones(len(tokens), np.float32)}
    if not isinstance(weights, list) or len(weights) != len(tokens):
        raise ValueError(f"'weights' must be a list as long as 'tokens' ({len(tokens)})")
    if not all(isinstance(weight, int | float) and 0 <= weight < float("inf") for weight in weights):
        raise ValueError("'weights' must be finite numbers >= 0")
    return {"tokens": np.asarray(tokens, np.int32), "weights": np.asarray(weights, np.float32)}


def fit(example: Example, data: "Data") -> tuple[Example | None, str]:
    """Cut an example to data.max_length predictions (that is, one token more); the second value says what happened:
    '', 'truncated' or a key of REASONS."""
    length, most, happened = len(example["tokens"]), data.max_length + 1, ""
    if length > most and data.truncation != "split" and data.packing != "concat":
        if data.truncation == "error":
            raise UsageError(
                f"the example has {length} tokens, data.max_length allows {most} (one more than the positions of a "
                "row): raise it, or set data.truncation to keep_start, keep_end, split or drop"
            )
        if data.truncation == "drop":
            return None, "too_long"
        cut = slice(0, most) if data.truncation == "keep_start" else slice(length - most, length)
        example, happened = {name: column[cut] for name, column in example.items()}, "truncated"
    if length < 2:
        return None, "too_short"
    if not example["weights"][1:].any():
        return None, "no_trained_token"
    return example, happened


LABELLED = ("branches", "desirable")
KINDS = {
    "lm": Kind(encode_form, fit),
    "pair": Kind(encode_pair, fit_pair, ("branches", "margins"), pairs_of),
    "unpaired": Kind(encode_labelled, fit_mismatched, LABELLED, labelled_of, mismatched=True),
    "unpaired_plain": Kind(encode_labelled, fit_labelled, LABELLED, labelled_of),
    "reward": Kind(encode_reward, fit_reward, ("branches", "margins"), pairs_of),
    "steps": Kind(encode_steps, fit_steps, ("labels",)),
}


class Examples(Sequence[Example | None]):
    """The examples of a source, in its order, tokenised when first asked for and then kept in memory (up to
    CACHE_BYTES). None stands for a dropped one. `data.on_bad_row` decides about malformed rows."""

    def __init__(
        self, records: Records | Sequence[Mapping[str, Any]], tokenizer: Tokenizer, data: "Data", kind: str = "lm"
    ):
        check_tokenizer(records, tokenizer)
        self.records, self.tokenizer, self.data, self.kind = records, tokenizer, data, kind
        if kind != "lm":
            for name, only in (("packing", "concat"), ("truncation", "split"), ("document_mask", False)):
                if getattr(data, name) == only:
                    raise UsageError(
                        f"data.{name}={str(only).lower()} cuts or joins texts: objective.type=sft alone can"
                    )
        # where the examples of each row begin; a malformed row counts as one, which says so when it is asked for
        self._starts: Sequence[int] = range(len(records) + 1)
        if KINDS[kind].expand is not None:
            self._starts = array("q", [0, *accumulate(self._count(record) for record in range(len(records)))])
        size = self._starts[-1]
        self._encoded = functools.lru_cache(maxsize=16)(self._encode)  # a mismatched completion has just been needed
        self.lengths = np.zeros(size, np.int32)  # positions in a row; 0 where dropped
        self.trained = np.zeros(size, np.int32)  # predictions that carry loss
        self.truncated = np.zeros(size, bool)
        self._status = np.full(size, UNSEEN, np.int8)
        self._kept: dict[int, Example] = {}
        self._bytes = 0
        self._lock, self._alone = threading.Lock(), threading.Lock()
        self._attached: dict[str, Mapping[int, np.ndarray]] = {}
        self._bad: tuple[int, str] | None = None  # the first malformed row so far
        self.known_bytes: dict[int | None, int] = {}  # of so many batches (train/evaluate.py)

    def __len__(self) -> int:
        return self._starts[-1]

    def _find(self, index: int) -> tuple[int, int]:
        """The row of an example, and which of the row's examples it is."""
        record = bisect_right(self._starts, index) - 1
        return record, index - self._starts[record]

    def first_of(self, row: int) -> int:
        """The first example of a row (of the row behind the last: how many there are)."""
        return self._starts[row]

    def record(self, index: int) -> Mapping[str, Any]:
        """The row that an example is made of."""
        return self.records[self._find(index)[0]]

    def __getitem__(self, index: Any) -> Any:
        example = self._kept.get(index)
        if example is None and self._status[index] <= KEPT:
            example = self._make(index)
        if example is None or not self._attached:
            return example
        return {**example, **{name: columns[index] for name, columns in self._attached.items()}}

    def attach(self, name: str, columns: Mapping[int, np.ndarray]) -> None:
        """Give every example one more column, by its number, as long as the others."""
        self._attached[name] = columns

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns besides those that every example has."""
        return (*KINDS[self.kind].columns, *self._attached)

    def length(self, index: int) -> int:
        """Positions that the example takes in a row; 0 when it is dropped."""
        if self._status[index] == UNSEEN:
            self._make(index)
        return int(self.lengths[index])

    def prepare(self, indices: Sequence[int]) -> None:
        """Tokenise examples that have not been, on all cores: tokenizers let go of Python's lock."""
        unseen = [index for index in indices if self._status[index] == UNSEEN]
        if len(unseen) > THREADS > 1:
            with ThreadPoolExecutor(THREADS) as pool:
                for _ in pool.map(self.length, unseen):  # the first error of the order is raised
                    pass

    def _make(self, index: int) -> Example | None:
        example, happened = self._fit(index)
        with self._lock:
            self._status[index] = KEPT if example is not None else 1 + list(REASONS).index(happened)
            self.truncated[index] = happened == "truncated"
            if example is None:
                return None
            columns = shifted(example)
            self.lengths[index] = len(columns["tokens"])
            self.trained[index] = np.count_nonzero(columns["weights"])
            size = sum(column.nbytes for column in example.values())
            if self._bytes + size <= CACHE_BYTES and index not in self._kept:
                self._kept[index] = example
                self._bytes += size
            return example

    def _forms(self, row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        form, expand = normalise(row, self.data.format), KINDS[self.kind].expand
        return [form] if expand is None else expand(form, self.data)

    def _count(self, record: int) -> int:
        try:
            return len(self._forms(self.records[record]))
        except ValueError:
            return 1

    def _fit(self, index: int) -> tuple[Example | None, str]:
        record, part = self._find(index)
        example = self._encode_or_skip(record, part)
        if example is None:
            return None, "bad_row"
        if KINDS[self.kind].mismatched:
            example = example, self._mismatched(record, part)
        try:
            return KINDS[self.kind].fit(example, self.data)
        except UsageError as error:
            raise UsageError(f"{self._where(record)}: {error}") from error

    def _encode(self, record: int, part: int) -> Any:
        """All tokens of an example, before any truncation. Errors name file and line."""
        row = self.records[record]  # names them itself
        try:
            form = self._forms(row)[part]
            # templates are rendered by one thread at a time
            with nullcontext() if "text" in form else self._alone:
                return KINDS[self.kind].encode(form, self.tokenizer, self.data)
        except ValueError as error:
            named = UsageError if isinstance(error, UsageError) else ValueError
            raise named(f"{self._where(record)}: {error}") from error

    def _encode_or_skip(self, record: int, part: int) -> Any:
        try:
            return self._encoded(record, part)
        except UsageError:  # not the row but the configuration is at fault: no row would do
            raise
        except ValueError as error:
            if self.data.on_bad_row == "error":
                raise UsageError(f"{error} (data.on_bad_row=skip would count and skip such rows)") from error
            with self._alone:
                self._bad = min(self._bad or (record, str(error)), (record, str(error)))
            return None

    def _mismatched(self, record: int, part: int) -> Any:
        """The example of the row before (before the first comes the last) that is usable: of as many, the same one."""
        for before in range(record - 1, record - len(self.records), -1):
            other = before % len(self.records)
            parts = self._starts[other + 1] - self._starts[other]
            if parts and (example := self._encode_or_skip(other, part % parts)) is not None:
                return example
        raise UsageError("the objective compares each row with the completion of another, but only one row is usable")

    def _where(self, record: int) -> str:
        return self.records.where(record) if isinstance(self.records, Records) else f"row {record + 1}"

    def bytes_of(self, pieces: Iterable[Piece]) -> int:
        """UTF-8 bytes of the text that carries loss in pieces of examples; special tokens have none."""
        found = 0
        for number, start, stop in pieces:
            # a piece's tokens are those after its first: nothing, or another piece, predicts that one
            inside = slice(start + 1, stop + int(self.data.document_mask))
            if not self.data.document_mask and start == 0:
                inside = slice(0, stop)
            example = self[number]
            ids = example["tokens"][inside][example["weights"][inside] > 0].tolist()
            found += len(self.tokenizer.decode(ids, skip_special=True).encode("utf-8", "surrogatepass"))
        return found

    def roles(self, index: int) -> np.ndarray | None:
        """Whose each token is (indices into chat.ROLES), for a row that is a conversation; for showing only."""
        if self.kind != "lm":
            return None
        example = encode_row(self.records[index], self.tokenizer, self.data, roles=True)
        fitted = fit(example, self.data)[0]
        return None if fitted is None else fitted.get("roles")

    @property
    def first_bad(self) -> str:
        """What is wrong with the first malformed row seen; '' where none is."""
        return self._bad[1] if self._bad else ""

    def dropped(self) -> Counter[str]:
        """How many of the examples seen so far were none, by reason; no_pair counts rows."""
        names = list(REASONS)
        found = {names[status - 1]: int((self._status == status).sum()) for status in self._seen_statuses()}
        without = sum(one == after for one, after in pairwise(self._starts)) if KINDS[self.kind].expand else 0
        return Counter(found | ({"no_pair": without} if without else {}))

    def _seen_statuses(self) -> list[int]:
        return [int(status) for status in np.unique(self._status) if status > KEPT]

    def scan(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Tokenise all rows, so that lengths and drops are known. Raises UsageError when nothing is left."""
        for index in range(len(self)):
            if index % PORTION == 0:
                self.prepare(range(index, min(index + PORTION, len(self))))
            self.length(index)
            if progress is not None:
                progress(index + 1, len(self))
        self.check_not_empty()

    def check_not_empty(self) -> None:
        """Raise UsageError, with the reasons, when every row has been dropped."""
        if (self._status > KEPT).all():
            reasons = "; ".join(f"{count} {REASONS[name]}" for name, count in self.dropped().items())
            first = f"; the first malformed one: {self.first_bad}" if self.first_bad else ""
            raise UsageError(f"no example is left of {len(self.records)} rows: {reasons or 'there are none'}{first}")


def open_examples(paths: Any, tokenizer: Tokenizer, data: "Data", kind: str = "lm") -> Examples:
    """Examples of the files at `paths`, with data.chat_template in place."""
    if data.chat_template is not None:
        tokenizer = tokenizer.with_chat_template(data.chat_template)
    return Examples(open_source(paths, data.format), tokenizer, data, kind)
