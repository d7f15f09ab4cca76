"""What a compute budget buys: parameters, tokens, steps, time. Pure functions, each with its source."""

import re
from dataclasses import dataclass

from configs.errors import UsageError

# Well-known sizes to hold a proposal against: parameters with embeddings, of models whose layout we can load.
SIZES = {
    "smollm2-135m": 135e6,
    "smollm2-360m": 362e6,
    "qwen2.5-0.5b": 494e6,
    "llama-3.2-1b": 1.24e9,
    "smollm2-1.7b": 1.71e9,
    "llama-3.2-3b": 3.21e9,
    "llama-3.1-8b": 8.03e9,
    "qwen2.5-14b": 14.8e9,
    "qwen2.5-32b": 32.8e9,
    "llama-3.1-70b": 70.6e9,
    "llama-3.1-405b": 406e9,
}


@dataclass(frozen=True)
class Law:
    """loss = e + a / N^alpha + b / D^beta in nats a token, of N parameters and D tokens (arXiv 2203.15556, eq. 10)."""

    e: float
    a: float
    b: float
    alpha: float
    beta: float


BESIROGLU = Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658)  # arXiv 2404.10102: approach 3 of 2203.15556, fitted anew


def train_flops(parameters: float, tokens: float) -> float:
    """C = 6 N D (arXiv 2001.08361): two FLOPs a weight and token forward, four backward; attention is not counted."""
    return 6 * parameters * tokens


def split_by_ratio(flops: float, tokens_per_parameter: float = 20.0) -> tuple[float, float]:
    """(N, D) with 6 N D = flops and D = ratio x N; about 20 by approaches 1 and 2 of arXiv 2203.15556."""
    parameters = (flops / (6 * tokens_per_parameter)) ** 0.5
    return parameters, tokens_per_parameter * parameters


def predict_loss(parameters: float, tokens: float, law: Law = BESIROGLU) -> float:
    """The law's loss."""
    return law.e + law.a / parameters**law.alpha + law.b / tokens**law.beta


def split_by_law(flops: float, law: Law = BESIROGLU) -> tuple[float, float]:
    """(N, D) with 6 N D = flops and the law's least loss: arXiv 2203.15556, eq. 4."""
    both = law.alpha + law.beta
    scale = (law.alpha * law.a / (law.beta * law.b)) ** (1 / both)
    return scale * (flops / 6) ** (law.beta / both), (flops / 6) ** (law.alpha / both) / scale


def nearest_sizes(parameters: float, count: int = 2) -> list[str]:
    """The names of the known sizes that are nearest by ratio, the nearest first."""
    return sorted(SIZES, key=lambda name: max(SIZES[name] / parameters, parameters / SIZES[name]))[:count]


PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}  # dense bfloat16, the vendors' data sheets
SECONDS = {"m": 60, "h": 3600, "d": 86400}


def read_budget(text: str, mfu: float) -> float:
    """FLOPs of '1e21', or of devices for a time at an MFU: '8xH100:24h'."""
    if found := re.fullmatch(r"(\d+)x(\w+):(\d+(?:\.\d+)?)([mhd])", text.strip()):
        count, device, amount, unit = found.groups()
        if device.upper() not in PEAKS:
            raise UsageError(
                f"--compute-budget: device {device} is not known; known: {', '.join(PEAKS)}, or give FLOPs"
            )
        flops = int(count) * PEAKS[device.upper()] * float(amount) * SECONDS[unit] * mfu
    else:
        try:
            flops = float(text)
        except ValueError:
            flops = 0.0
    if not 1e6 <= flops < 1e40:
        raise UsageError(
            f"--compute-budget is {text!r}, allowed: a number of FLOPs from 1e6 on, as 1e21, or 8xH100:24h (m, h, d)"
        )
    return flops


def propose(
    flops: float, tokens_per_parameter: float, batch_tokens: int, peak_flops: float | None = None, mfu: float = 0.4
) -> dict[str, dict[str, object]]:
    """{way of splitting: parameters, tokens, steps, predicted loss, nearest sizes, seconds if a peak is given}."""
    splits = {
        f"{tokens_per_parameter:g} tokens a parameter (arXiv 2203.15556)": split_by_ratio(flops, tokens_per_parameter),
        "parametric law (arXiv 2404.10102)": split_by_law(flops),
    }
    return {
        name: {
            "flops": flops,
            "parameters": n,
            "tokens": d,
            "tokens_per_parameter": d / n,
            "batch_tokens": batch_tokens,
            "steps": max(1, round(d / batch_tokens)),
            "predicted_loss": predict_loss(n, d),
            "nearest": {size: SIZES[size] for size in nearest_sizes(n)},
            "seconds": None if peak_flops is None else flops / (peak_flops * mfu),
        }
        for name, (n, d) in splits.items()
    }


def describe(proposal: dict[str, dict[str, object]]) -> str:
    """The proposal for people."""
    lines = []
    for name, row in proposal.items():
        sizes = ", ".join(f"{size} ({shorten(n)})" for size, n in row["nearest"].items())  # type: ignore[attr-defined]
        lines += [
            f"{name}:",
            f"  parameters  {shorten(row['parameters'])}; nearest known sizes: {sizes}",
            f"  tokens      {shorten(row['tokens'])} ({row['tokens_per_parameter']:.1f} a parameter)",
            f"  steps       {row['steps']:,} of {row['batch_tokens']:,} tokens",
            f"  loss        {row['predicted_loss']:.3f} nats a token by the parametric law, on its authors' data",
        ]
        if isinstance(seconds := row["seconds"], float):
            lines.append(f"  time        {seconds / 3600:.1f} h")
    return "\n".join(lines)


def shorten(number: object) -> str:
    """1234567890 as 1.23 B."""
    value = float(str(number))
    for unit, size in {"T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3}.items():
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"
