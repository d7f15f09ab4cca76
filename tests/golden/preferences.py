"""What the goldens of preference losses are about, besides tests/parity/test_dpo_parity.py. No torch here."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("preferences.npz")
BETA = 0.3
PROJECTIONS = 16  # kept of each gradient, besides its norm


def digest(loss: float, grads: dict[str, np.ndarray], case: str) -> dict[str, np.ndarray]:
    """What a golden keeps: the loss, and of each gradient (sorted by name) its norm and projections."""
    table = np.stack([_sketch(name, grads[name]) for name in sorted(grads)])
    return {f"{case}/loss": np.asarray(loss), f"{case}/grads": table, "names": np.asarray(sorted(grads))}


def compare(golden: Any, case: str, loss: float, grads: dict[str, np.ndarray]) -> dict[str, float]:
    """The loss's relative difference; for each gradient norm(difference) / norm, estimated from the projections."""
    assert golden["names"].tolist() == sorted(grads)
    found = {"loss": abs(loss / float(golden[f"{case}/loss"]) - 1)}
    for name, want in zip(sorted(grads), golden[f"{case}/grads"], strict=True):
        apart = _sketch(name, grads[name]) - want
        found[name] = max(abs(apart[0]), float(np.sqrt((apart[1:] ** 2).mean()))) / want[0]
    return found


def _sketch(name: str, grad: np.ndarray) -> np.ndarray:
    """Norm, and products with vectors of independent standard normals: their mean square estimates the squared norm."""
    flat = np.asarray(grad, np.float64).ravel()
    drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal((PROJECTIONS, flat.size))
    return np.concatenate([[np.linalg.norm(flat)], drawn @ flat])
