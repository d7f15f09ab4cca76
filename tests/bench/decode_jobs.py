"""What the decoding benchmark asks of every stack: the same weights, prompts and numbers of new tokens."""

import numpy as np

PROMPT, NEW = 64, 32
# name -> (prompts, beams, sampled)
JOBS = {
    "greedy_1": (1, 1, False),
    "greedy_8": (8, 1, False),
    "sample_8": (8, 1, True),
    "beam4_1": (1, 4, False),
    "beam4_8": (8, 4, False),
}
VOCAB = 49152


def prompts(count: int) -> list[list[int]]:
    """Random tokens: what they are makes no difference to the time."""
    return np.random.default_rng(count).integers(100, VOCAB - 100, (count, PROMPT)).tolist()
