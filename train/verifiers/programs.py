"""Rewards that run something: a completion's code against tests, an environment's own verifier."""

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any

from pydantic import Field

from configs.errors import UsageError
from train.sandbox import MIB, Isolation, Limits, refusal, run
from train.verifiers.answers import Column, Positive
from train.verifiers.extract import answer_of, block_of, reference_of, text_of

TESTS = ("tests", "test_list", "test", "input_output")
# The mark is read before the program's code runs, and no program can guess it: who ends early has passed nothing.
_HARNESS = """\
import json, os, sys
def run(write):
    job = json.load(sys.stdin)
    space = {"__name__": "__main__"}
    exec(compile(job["code"], "answer.py", "exec"), space)
    for number, test in enumerate(job["tests"]):
        try:
            exec(compile(test, "test.py", "exec"), space)
        except Exception:
            continue
        write(1, f"\\n{job['mark']} {number}\\n".encode())
run(os.write)
"""


def code(
    completions: Sequence[Any],
    *,
    column: Column = TESTS,
    partial: bool = True,
    sandbox: Isolation = "namespaces",
    timeout: Positive = 10.0,
    memory: Annotated[int, Field(ge=32)] = 512,
    **columns: Any,
) -> list[float | None]:
    """The share of its tests that a completion's code passes; partial false: 1 where all are.

    The code is the last fenced block of Python. Tests of a row: Python texts, each with asserts, one or a list; or
    {input, output} objects, compared line by line with what is printed; or {inputs: [...], outputs: [...]}; or one of
    these as JSON. timeout: seconds for all tests of a completion. memory: MiB of a process.
    """
    if sandbox == "namespaces" and (reason := refusal()):
        raise UsageError(
            f"sample.reward 'code' is refused: the kernel allows no sandbox here ({reason}). Allow namespaces, or "
            "write sample.reward_options: {code: {sandbox: none}}, programs then run with limits alone: they can read "
            "your files and reach the network"
        )
    scores: list[float | None] = []
    for completion, given in zip(completions, reference_of(columns, column, len(completions)), strict=True):
        tests = None if given is None else read_tests(given)
        if not tests:
            scores.append(None)
            continue
        source = block_of(text_of(completion), "py")
        passed = _count(source, tests, Limits(seconds=timeout, memory=memory * MIB), sandbox)
        scores.append(passed / len(tests) if partial else float(passed == len(tests)))
    return scores


def read_tests(given: Any) -> list[str] | list[tuple[str, str]]:
    """Tests in one of two forms: Python texts, or (input, output) pairs."""
    if isinstance(given, str) and given.lstrip()[:1] in ("[", "{"):
        try:
            given = json.loads(given)
        except json.JSONDecodeError:
            pass  # Python that begins so
    if isinstance(given, str):
        given = [given]
    if isinstance(given, Mapping) and {"inputs", "outputs"} <= given.keys():
        given = [{"input": a, "output": b} for a, b in zip(given["inputs"], given["outputs"], strict=True)]
    if isinstance(given, list) and all(isinstance(one, str) for one in given):
        return given
    if isinstance(given, list) and all(isinstance(one, Mapping) and {"input", "output"} <= one.keys() for one in given):
        return [(_lines(one["input"]), _lines(one["output"])) for one in given]
    raise ValueError(f"tests are Python texts or {{input, output}} objects, got {str(given)[:80]}")


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _count(source: str, tests: Sequence[Any], limits: Limits, sandbox: Isolation) -> int:
    """How many tests are passed, in the time that there is for all."""
    if isinstance(tests[0], str):
        mark = secrets.token_hex()
        job = json.dumps({"code": source, "tests": tests, "mark": mark})
        said = run(_HARNESS, job, limits, sandbox).stdout.split("\n")
        return len({number for number in range(len(tests)) if f"{mark} {number}" in said})
    end, passed = time.monotonic() + limits.seconds, 0
    for given, due in tests:
        left = end - time.monotonic()
        if left <= 0:
            break
        ended = run(source, given, Limits(seconds=left, memory=limits.memory), sandbox)
        passed += ended.ok and _printed(ended.stdout) == _printed(due)
    return passed


def _printed(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def reasoning_gym(
    completions: Sequence[Any],
    environment: Sequence[str | None],
    item: Sequence[int | None],
    *,
    timeout: Positive = 10.0,
    **columns: Any,
) -> list[float | None]:
    """What the environment that made the prompt (data.train: reasoning_gym:NAME) says of the answer, 0 to 1."""
    scores: list[float | None] = []
    for completion, name, number in zip(completions, environment, item, strict=True):
        if name is None or number is None:
            scores.append(None)
            continue
        made, entry = _entry(name, number)
        text = text_of(completion)
        found = answer_of(text)
        scores.append(float(made.score_answer(text.strip() if found is None else found, entry)))
    return scores


@cache
def _made(name: str) -> Any:
    from data.environments import open_environment

    return open_environment(name)


@cache
def _entry(name: str, number: int) -> tuple[Any, Any]:
    return _made(name), _made(name)[number]
