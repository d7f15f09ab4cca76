"""Presets: the architectures that come with purestep, by name."""

from pathlib import Path
from typing import Any

from configs.source import read

MODELS = Path(__file__).resolve().parent / "models"


def presets() -> dict[str, Path]:
    """{name: path}; a file holds the keys of a Hugging Face config.json."""
    return {path.stem: path for path in sorted(MODELS.glob("*.yaml"))}


def read_preset(name: str) -> dict[str, Any]:
    """A preset as a config.json's contents."""
    return read(presets()[name])[0]
