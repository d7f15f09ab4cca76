"""The frozen, validated schema of a run, and the YAML recipes. Imports nothing of ours."""

import importlib.util
import pathlib

SIBLINGS = ("configs", "data", "sharding", "model", "convert", "decode", "train")


def check_siblings() -> None:
    """Raise ImportError, naming the file, when one of our top-level packages is shadowed by somebody else's."""
    home = pathlib.Path(__file__).resolve().parent.parent
    for name in SIBLINGS:
        spec = importlib.util.find_spec(name)
        origin = pathlib.Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if origin != home / name / "__init__.py":
            raise ImportError(
                f"purestep's package '{name}' is shadowed by {origin or 'nothing'} (expected {home / name}): "
                "rename that file or run from another folder"
            )
