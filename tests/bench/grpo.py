"""GRPO of SmolLM2-135M against TRL's GRPOTrainer with its own generate: prompts, samples and lengths the same.

    python -m tests.bench.grpo [--peer PYTHON] [--rounds 5] [--case short,long] [key=value ...]

float32, full fine-tuning, one update a rollout; completions never end early. `short`: 2 prompts of 45 tokens x 4 x
32 tokens; `long`: 2 prompts four times as long as completions x 8 x 32. Seconds by phase: `elsewhere` is the share of
time outside sampling and update. `separate`: the update's time with each completion behind a prompt of its own, over
that with shared ones. One JSON line. Goals: 2.5 x TRL's, 4 x on `long`, elsewhere below 0.05, separate 2 on `long`.
"""

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

from tests.bench import rows
from tests.bench.duel import Worker, against, export, median, rounds, summary

WORDS = "the red house by the river has seven windows and a green door that nobody has opened since last summer".split()
# prompts, generations, new tokens, words before the question, tokens of a row
CASES = {"short": (2, 4, 32, 0, 352), "long": (2, 8, 32, 75, 392)}


def prompts(words: int) -> list[dict]:
    """Chat prompts, all of a length."""
    said = [" ".join(WORDS[(i + n) % len(WORDS)] for n in range(words)) for i in range(16)]
    return [
        {"prompt": [{"role": "user", "content": f"{text} What is {i % 8 + 2} + {i % 7 + 2}?".strip()}]}
        for i, text in enumerate(said)
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", default="short,long")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = export(Path(folder))
        found = {name: compare(args, model, folder, *CASES[name]) for name in args.case.split(",")}
        print(json.dumps({"bench": "grpo", **found}))


def compare(
    args: argparse.Namespace, model: str, folder: str, count: int, generations: int, new: int, words: int, length: int
) -> dict:
    """All measurements of one case."""
    path = rows.write(f"{folder}/prompts.jsonl", prompts(words))
    sizes = [
        f"train.batch_size={count}", f"sample.num_generations={generations}", f"sample.max_new_tokens={new}",
        f"data.max_length={length}", "optim.learning_rate=1e-6", *args.overrides,
    ]  # fmt: skip
    start = partial(Worker, sys.executable, "stack_ours", "rollouts", model, path, *sizes)
    workers = {"grpo": start(), "separate": start("data.share_prompt=false")}
    try:
        if args.peer:
            workers["trl"] = Worker(
                args.peer, "stack_torch", "trl_grpo", model, path, *map(str, (count, generations, new))
            )
        taken = rounds(workers, args.rounds)
        gemms = {name: [worker.ask("gemm") for _ in range(5)] for name, worker in workers.items()}
        memory = {name: round(worker.ask("memory")["peak_gib"], 2) for name, worker in workers.items()}
        result = {k: v for w in workers.values() for k, v in w.hello.items()}
    finally:
        for worker in workers.values():
            worker.close()
    for name, steps in taken.items():
        phases = {key: median(s[key] for s in steps) for key in steps[0] if key.startswith("time/")}
        result[name] = summary(steps) | phases | {"peak_gib": memory[name]}
    ours = taken["grpo"]
    both = zip(taken["separate"], ours, strict=True)
    result["separate"]["update"] = median(s["time/update"] / o["time/update"] for s, o in both)
    result["grpo"]["slots_live"] = median(s["slots_live"] for s in ours)
    result["grpo"]["elsewhere"] = median(1 - (s["time/rollout"] + s["time/update"]) / s["seconds"] for s in ours)
    result["grpo"]["positions"] = ours[0]["positions"]
    if args.peer:
        blas = median(g["seconds"] for g in gemms["trl"]) / median(g["seconds"] for g in gemms["grpo"])
        result["trl"] |= against(ours, taken["trl"]) | {"gemm_ratio": round(blas, 2)}
    return result


if __name__ == "__main__":
    main()
