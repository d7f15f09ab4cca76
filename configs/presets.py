"""Presets: the architectures that come with purestep, by name."""

from pathlib import Path
from typing import Any

from configs.source import read

MODELS = Path(__file__).resolve().parent / "models"


def presets() -> dict[str, Path]:
    """{name: path}, the smallest first; a file holds the keys of a Hugging Face config.json."""
    size = lambda path: float(path.stem[:-1]) * {"m": 1e6, "b": 1e9}[path.stem[-1]]  # noqa: E731
    return {path.stem: path for path in sorted(MODELS.glob("*.yaml"), key=size)}


def read_preset(name: str) -> dict[str, Any]:
    """A preset as a config.json's contents."""
    return read(presets()[name])[0]
