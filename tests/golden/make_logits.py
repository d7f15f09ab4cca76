"""Make logits.npz: what transformers' logits processors make of random logits and rows. Needs the extra `parity`.

python tests/golden/make_logits.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import transformers
from transformers.generation import logits_process

from tests.golden.logits import CASES, FILE, draw

LENGTHS = (1, 5, 12)  # a row of one token; nothing but the prompt; seven new tokens: the last but one of "forced_eos"


def theirs(name: str, logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """transformers' result."""
    _, kind, arguments = CASES[name]
    processor = getattr(logits_process, kind)(**arguments)
    return processor(torch.from_numpy(tokens).long(), torch.from_numpy(logits)).numpy()


def main() -> None:
    """Write the file."""
    out: dict[str, np.ndarray] = {"transformers": np.asarray(transformers.__version__)}
    for length in LENGTHS:
        logits, tokens = draw(length, length)
        out |= {f"logits/{length}": logits, f"tokens/{length}": tokens}
        out |= {f"{name}/{length}": theirs(name, logits.copy(), tokens[:, :length]) for name in CASES}
    np.savez_compressed(FILE, **out)
    print(FILE, FILE.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
