"""Make preferences.npz: losses and gradients of TRL's DPO, KTO, CPO and ORPO trainers. Needs the extra `parity`.

    python -m tests.golden.make_preferences

The tiny model with an adapter, in float64; the reference is the model without it.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.golden import make_sft, preferences, sft
from tests.parity.test_dpo_parity import CASES, FREE, KTO, paired, rows, theirs, theirs_free, theirs_kto


def main() -> None:
    """Run the oracles and write the file."""
    torch.set_num_threads(2)
    kept: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = sft.make_tiny(Path(scratch) / "tiny")
        adapter = sft.make_adapter(Path(scratch) / "adapter", folder)
        given = make_sft, folder, adapter
        for name, options in CASES.items():
            found = theirs(*given, paired(rows()), torch.float64, beta=preferences.BETA, **options)
            kept |= preferences.digest(*found[:2], name)
        for name, ((method, settings), _) in FREE.items():
            kept |= preferences.digest(*theirs_free(*given, rows(), torch.float64, method, **settings), name)
        for name in KTO:
            kept |= preferences.digest(*theirs_kto(*given, name, torch.float64)[:2], name)
    np.savez_compressed(preferences.FILE, **kept)
    print(f"{preferences.FILE}: {preferences.FILE.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
