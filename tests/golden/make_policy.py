"""Make policy.npz: losses, advantages and gradients of TRL's GRPO and RLOO trainers. Needs the extra `parity`.

    python -m tests.golden.make_policy

The tiny model, every parameter of it, in float64; the samples were written by what it was before, the reference is a
third one.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.golden import make_sft, policy, preferences
from tests.parity.test_policy_parity import theirs


def main() -> None:
    """Run the oracles and write the file."""
    torch.set_num_threads(2)
    kept: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folders = policy.make_policies(Path(scratch))
        for case in policy.CASES:
            loss, grads, _, inputs = theirs(make_sft, folders, case, torch.float64, policy.samples())
            kept |= preferences.digest(loss, grads, case)
            kept[f"{case}/advantages"] = inputs["advantages"].numpy()
    np.savez_compressed(policy.FILE, **kept)
    print(f"{policy.FILE}: {policy.FILE.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
