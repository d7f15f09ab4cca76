"""Rewards that compare the answer with a reference: equal text, numbers, mathematics, patterns, JSON."""

import json as parser
import logging
import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from configs.errors import UsageError
from train.verifiers.extract import Where, answer_of, block_of, numbers_of, reference_of, text_of, values_of

REFERENCE = ("answer", "solution")
Column = str | Sequence[str]
Positive = Annotated[float, Field(gt=0)]


def exact(
    completions: Sequence[Any],
    *,
    extract: Where = "auto",
    ignore_case: bool = False,
    column: Column = REFERENCE,
    **columns: Any,
) -> list[float | None]:
    """1 where the answer (without one, the whole text) is the reference's, spaces at the ends apart."""
    scores: list[float | None] = []
    for completion, reference in zip(completions, reference_of(columns, column, len(completions)), strict=True):
        said, due = (_answer(text, extract) for text in (text_of(completion), str(reference)))
        if ignore_case:
            said, due = said.casefold(), due.casefold()
        scores.append(None if reference is None else float(said == due))
    return scores


def _answer(text: str, extract: Where = "auto") -> str:
    found = answer_of(text, extract)
    return text.strip() if found is None else found


def numeric(
    completions: Sequence[Any],
    *,
    tolerance: Annotated[float, Field(ge=0)] = 1e-6,
    extract: Where = "auto",
    column: Column = REFERENCE,
    **columns: Any,
) -> list[float | None]:
    """1 where the last number of the answer is the reference's, to a tolerance (relative above 1, absolute below).

    Thousands separators, fractions and percent are read: 12% is 0.12, or 12 where the other says so.
    """
    scores: list[float | None] = []
    for completion, reference in zip(completions, reference_of(columns, column, len(completions)), strict=True):
        due = _number(str(reference)) if reference is not None else []
        said = _number(text_of(completion), extract)
        near = any(abs(a - b) <= tolerance * max(1.0, abs(b)) for a in said for b in due)
        scores.append(float(near) if due else None)
    return scores


def _number(text: str, extract: Where = "auto") -> list[float]:
    found = numbers_of(_answer(text, extract))
    return values_of(found[-1]) if found else []


def math(
    completions: Sequence[Any],
    *,
    column: Column = REFERENCE,
    timeout: Positive = 5.0,
    **columns: Any,
) -> list[float | None]:
    """1 where the answer is mathematically the reference's (math-verify); None where the reference cannot be read.

    An answer may be in a tag, boxed, behind "####", or where math-verify finds it in the end of the text.
    """
    try:
        import math_verify  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError(
            f"sample.reward 'math' needs math-verify ({error}): pip install 'purestep[rl]'; "
            "the reward 'numeric' needs nothing"
        ) from error
    parse: Any = math_verify.parse  # typed without the None that it takes
    verify: Any = math_verify.verify
    # its own time limits are signals and warn when they are off; here a row has its own process
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def read(text: str) -> Any:
        found = answer_of(text)
        # the end is where an answer is, and long texts cost it minutes
        said = text[-2000:] if found is None else f"\\boxed{{{found.strip('$')[:2000]}}}"
        return parse(said, parsing_timeout=None)

    scores: list[float | None] = []
    for completion, reference in zip(completions, reference_of(columns, column, len(completions)), strict=True):
        due = "" if reference is None else str(reference)
        gold = read(due if answer_of(due) is not None else f"\\boxed{{{due}}}") if due.strip() else []
        scores.append(float(verify(gold, read(text_of(completion)), timeout_seconds=None)) if gold else None)
    return scores


def regex(
    completions: Sequence[Any],
    *,
    pattern: str | Sequence[str | None],
    extract: Where = "all",
    full: bool = False,
    timeout: Positive = 2.0,
    **columns: Any,
) -> list[float | None]:
    """1 where the pattern (an option, or a column of patterns) is found in the text; `full`: where it is all of it."""
    patterns = [pattern] * len(completions) if isinstance(pattern, str) else pattern
    if isinstance(pattern, str):
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(f"sample.reward_options.regex.pattern is no regular expression: {error}") from None
    scores: list[float | None] = []
    for completion, one in zip(completions, patterns, strict=True):
        said = answer_of(text_of(completion), extract) or ""
        found = one is not None and (re.fullmatch if full else re.search)(one, said)
        scores.append(None if one is None else float(bool(found)))
    return scores


def json(
    completions: Sequence[Any],
    *,
    schema: dict[str, Any] | None = None,
    required: Sequence[str] = (),
    timeout: Positive = 2.0,
    **columns: Any,
) -> list[float]:
    """1 where the text, or its last fenced block, is JSON: with the required keys, and of the schema (jsonschema)."""
    check = _schema(schema)
    return [float(_is_json(block_of(text_of(one), "json"), required, check)) for one in completions]


def _schema(schema: dict[str, Any] | None) -> Any:
    if schema is None:
        return lambda value: True
    try:
        import jsonschema.validators
    except ImportError as error:
        raise UsageError(
            "sample.reward_options.json.schema needs jsonschema: pip install 'purestep[rl]', or give required keys"
        ) from error
    validator = jsonschema.validators.validator_for(schema)
    try:
        validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise UsageError(f"sample.reward_options.json.schema is no JSON schema: {error.message}") from None
    return validator(schema).is_valid


def _is_json(text: str, required: Sequence[str], check: Any) -> bool:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        value = parser.loads(text, parse_constant=refuse)
        return all(isinstance(value, dict) and key in value for key in required) and check(value)
    except (ValueError, RecursionError):
        return False
