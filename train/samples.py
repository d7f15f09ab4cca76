"""The model's answers to held-out prompts, before and after training."""

import json
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from configs.errors import UsageError
from data.tokenizer import Tokenizer
from decode.generate import Sampling, generate
from decode.load import Model
from train.setup import Job
from train.state import State


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Rows {"messages": [...], "expect"?: text} of a JSONL file."""
    if not path.is_file():
        raise UsageError(f"log.samples: {path} does not exist")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("messages"), list) or not row["messages"]:
            raise UsageError(f'{path}:{number}: a row is {{"messages": [...], "expect": text (optional)}}')
        rows.append(row)
    return rows


def answer(job: Job, state: State, tokenizer: Tokenizer, when: str, record: Path) -> None:
    """Print greedy answers to log.samples, and keep them in `record` under `when` ("before" or "after")."""
    rows = read_samples(Path(job.run.log.samples or ""))
    model = Model(job.arch, job.compute, job.params(state), tokenizer, tokenizer.eos_ids, job.mesh)
    sampling = Sampling(max_new_tokens=job.run.log.sample_max_new_tokens)
    texts = [completion.text.strip() for completion in generate(model, [row["messages"] for row in rows], sampling)]
    if jax.process_index() != 0:
        return
    console = Console(stderr=True, highlight=False)
    console.print(f"answers {when} training", style="bold")
    for row, text in zip(rows, texts, strict=True):
        met = row.get("expect") is not None and row["expect"].lower() in text.lower()
        mark = "[green]+[/green]" if met else "[red]-[/red]" if row.get("expect") else " "
        console.print(mark, end=" ")
        console.print(f"{row['messages'][-1]['content']}  ->  {text}", markup=False)
    expected = [row for row in rows if row.get("expect")]
    if expected:
        pairs = [(row["expect"], text) for row, text in zip(rows, texts, strict=True) if row.get("expect")]
        hits = sum(expect.lower() in text.lower() for expect, text in pairs)
        console.print(f"{hits} of {len(expected)} contain what was expected")
    kept = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    kept[when] = [{**row, "answer": text} for row, text in zip(rows, texts, strict=True)]
    beside = record.with_suffix(".tmp")
    beside.write_text(json.dumps(kept, ensure_ascii=False, indent=1), encoding="utf-8")
    beside.replace(record)
