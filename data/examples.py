"""Rows to examples: unshifted tokens and, for each, how much its prediction counts. Nothing here knows batches."""

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.errors import UsageError
from data.chat import Example, encode_chat, encode_completion
from data.formats import normalise
from data.pack import shifted
from data.pairs import encode_pair, fit_pair
from data.sources import Records, open_source
from data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from configs.schema import Data

# why a row gives no example
REASONS = {
    "bad_row": "malformed",
    "too_long": "longer than data.max_length (data.truncation is drop)",
    "too_short": "fewer than two tokens",
    "no_trained_token": "no token carries loss (after truncation to data.max_length)",
}
KEPT, UNSEEN = 0, -1
CACHE_BYTES = 2 << 30


@dataclass(frozen=True)
class Kind:
    """How a row becomes an example: a form to tokens, tokens to what fits a row; its columns besides the usual ones."""

    encode: Callable[..., Any]
    fit: Callable[..., tuple[Example | None, str]]
    columns: tuple[str, ...] = ()


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
    if "chosen" in form or "chosen_tokens" in form:
        raise UsageError("the row is a preference (chosen, rejected), which objective.type=sft does not train on")
    if set(form) <= {"prompt", "tools"}:
        raise UsageError("the row is a prompt without a completion: there is nothing to learn in it")
    if data.add_eos and not tokenizer.eos_ids and ("text" in form or isinstance(form.get("prompt"), str)):
        raise UsageError("data.add_eos is true, but the tokenizer has no end-of-sequence token: set data.add_eos=false")
    if "tokens" in form:
        return _from_tokens(form, tokenizer)
    if "text" in form:
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
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        raise ValueError("'tokens' must be a list of integers")
    wrong = next((token for token in tokens if not 0 <= token < tokenizer.vocab_size), None)
    if wrong is not None:
        raise ValueError(f"token id {wrong} is outside the tokenizer's vocabulary (0 to {tokenizer.vocab_size - 1})")
    if weights is None:
        weights = [1.0] * len(tokens)
    if not isinstance(weights, list) or len(weights) != len(tokens):
        raise ValueError(f"'weights' must be a list as long as 'tokens' ({len(tokens)})")
    if not all(isinstance(weight, int | float) and 0 <= weight < float("inf") for weight in weights):
        raise ValueError("'weights' must be finite numbers >= 0")
    return {"tokens": np.asarray(tokens, np.int32), "weights": np.asarray(weights, np.float32)}


def fit(example: Example, data: "Data") -> tuple[Example | None, str]:
    """Cut an example to data.max_length predictions (that is, one token more); the second value says what happened:
    '', 'truncated' or a key of REASONS."""
    length, most, happened = len(example["tokens"]), data.max_length + 1, ""
    if length > most:
        if data.truncation == "error":
            raise UsageError(
                f"the example has {length} tokens, data.max_length allows {most} (one more than the positions of a "
                "row): raise it, or set data.truncation to keep_start, keep_end or drop"
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


KINDS = {"lm": Kind(encode_form, fit), "pair": Kind(encode_pair, fit_pair, ("branches",))}


class Examples(Sequence[Example | None]):
    """The examples of a source by row number, tokenised when first asked for and then kept in memory (up to
    CACHE_BYTES). None stands for a dropped row. `data.on_bad_row` decides about malformed ones."""

    def __init__(
        self, records: Records | Sequence[Mapping[str, Any]], tokenizer: Tokenizer, data: "Data", kind: str = "lm"
    ):
        self.records, self.tokenizer, self.data, self.kind = records, tokenizer, data, kind
        size = len(records)
        self.lengths = np.zeros(size, np.int32)  # positions in a row; 0 where dropped
        self.trained = np.zeros(size, np.int32)  # predictions that carry loss
        self.truncated = np.zeros(size, bool)
        self._status = np.full(size, UNSEEN, np.int8)
        self._kept: dict[int, Example] = {}
        self._bytes = 0
        self._lock = threading.Lock()
        self._attached: dict[str, Mapping[int, np.ndarray]] = {}
        self.first_bad = ""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        example = self._kept.get(index)
        if example is None and self._status[index] <= KEPT:
            example = self._make(index)
        if example is None or not self._attached:
            return example
        return {**example, **{name: columns[index] for name, columns in self._attached.items()}}

    def attach(self, name: str, columns: Mapping[int, np.ndarray]) -> None:
        """Give every example one more column, by row number, as long as the others."""
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

    def _make(self, index: int) -> Example | None:
        example, happened = self._encode(index)
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

    def _encode(self, index: int) -> tuple[Example | None, str]:
        where = self._where(index)
        try:
            record = self.records[index]
        except ValueError as error:  # already names file and line
            return self._bad(str(error), error)
        try:
            kind, form = KINDS[self.kind], normalise(record, self.data.format)
            return kind.fit(kind.encode(form, self.tokenizer, self.data), self.data)
        except UsageError as error:  # not the row but the configuration is at fault: no row would do
            raise UsageError(f"{where}: {error}") from error
        except ValueError as error:
            return self._bad(f"{where}: {error}", error)

    def _bad(self, message: str, error: Exception) -> tuple[None, str]:
        if self.data.on_bad_row == "error":
            raise UsageError(f"{message} (data.on_bad_row=skip would count and skip such rows)") from error
        self.first_bad = self.first_bad or message
        return None, "bad_row"

    def _where(self, index: int) -> str:
        return self.records.where(index) if isinstance(self.records, Records) else f"row {index + 1}"

    def roles(self, index: int) -> np.ndarray | None:
        """Whose each token is (indices into chat.ROLES), for a row that is a conversation; for showing only."""
        example = encode_row(self.records[index], self.tokenizer, self.data, roles=True)
        fitted = fit(example, self.data)[0]
        return None if fitted is None else fitted.get("roles")

    def dropped(self) -> Counter[str]:
        """How many of the rows seen so far gave no example, by reason."""
        names = list(REASONS)
        return Counter({names[status - 1]: int((self._status == status).sum()) for status in self._seen_statuses()})

    def _seen_statuses(self) -> list[int]:
        return [int(status) for status in np.unique(self._status) if status > KEPT]

    def scan(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Tokenise all rows, so that lengths and drops are known. Raises UsageError when nothing is left."""
        for index in range(len(self)):
            self.length(index)
            if progress is not None:
                progress(index + 1, len(self))
        self.check_not_empty()

    def check_not_empty(self) -> None:
        """Raise UsageError, with the reasons, when every row has been dropped."""
        if (self._status > KEPT).all():
            reasons = "; ".join(f"{count} {REASONS[name]}" for name, count in self.dropped().items())
            first = f"; the first malformed one: {self.first_bad}" if self.first_bad else ""
            raise UsageError(f"no example is left of {len(self)} rows: {reasons or 'there are none'}{first}")


def open_examples(paths: Any, tokenizer: Tokenizer, data: "Data", kind: str = "lm") -> Examples:
    """Examples of the files at `paths` (data.train or data.eval), with data.chat_template in place."""
    if data.chat_template is not None:
        tokenizer = tokenizer.with_chat_template(data.chat_template)
    return Examples(open_source(paths, data.format), tokenizer, data, kind)
