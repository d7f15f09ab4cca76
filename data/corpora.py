"""Sources by name: the standard library of this Python, a text corpus that every machine has; data sets of the hub."""

import glob
import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from configs.errors import RunError, UsageError
from data.files import Texts

STDLIB = "python_stdlib"
PARTS = ("train", "eval")
HELD_OUT = 20  # one file in so many is in the part eval
LEFT_OUT = ("site-packages", "dist-packages", "lib2to3", "__pycache__")
HUB = "hf://datasets/"


def is_stdlib(given: str) -> bool:
    """Whether it is python_stdlib, or a part of it."""
    return given.partition("?")[0] == STDLIB


def open_stdlib(given: str) -> Texts:
    """The sources of python_stdlib, or of python_stdlib?part=train (19 files of 20) or ?part=eval (the others)."""
    _, _, query = given.partition("?")
    part = query.removeprefix("part=")
    if query and (part not in PARTS or part == query):
        raise UsageError(f"'{given}': allowed are {STDLIB}, {', '.join(f'{STDLIB}?part={one}' for one in PARTS)}")
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py") if path.is_file())
    kept = [name for name in names if not set(name.split("/")) & set(LEFT_OUT)]
    if part:
        kept = [name for name in kept if _part(name) == part]
    paths = [root / name for name in kept if _is_text(root / name)]
    if not paths:
        raise UsageError(f"'{given}': this Python's standard library in {root} has no sources")
    return Texts(Path(given), paths)


def _part(name: str) -> str:
    """By the name alone, so that a file is in the same part on every machine."""
    return PARTS[hashlib.sha256(name.encode()).digest()[0] * HELD_OUT < 256]


def _is_text(path: Path) -> bool:
    """Some of its tests are in other encodings on purpose."""
    try:
        path.read_bytes().decode("utf-8")
    except (UnicodeDecodeError, OSError):
        return False
    return True


def fetch_dataset(given: str, suffixes: Sequence[str]) -> str:
    """The local path of hf://datasets/ORG/NAME[@revision][/path or glob], downloaded into the hub's cache; only files
    with these endings."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    org, _, rest = given.removeprefix(HUB).partition("/")
    name, _, inside = rest.partition("/")
    name, _, revision = name.partition("@")
    inside = inside.strip("/")
    if not org or not name:
        raise UsageError(f"'{given}' must be {HUB}ORG/NAME, perhaps with /path or a pattern behind it")
    endings = [f"{suffix}{more}" for suffix in suffixes for more in ("", ".gz", ".zst")]
    whole = glob.has_magic(inside) or inside.endswith(tuple(endings))
    wanted = [inside] if whole else [f"{inside}/*{end}" if inside else f"*{end}" for end in endings]
    try:
        folder = snapshot_download(
            f"{org}/{name}", repo_type="dataset", revision=revision or None, allow_patterns=wanted, etag_timeout=10
        )
    except RepositoryNotFoundError as error:
        raise UsageError(f"'{given}': {constants.ENDPOINT} has no such data set to read (HF_TOKEN?)") from error
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        raise RunError(f"'{given}' is not in the hub cache ({constants.HF_HUB_CACHE}) and {why}") from error
    except (HfHubHTTPError, OSError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RunError(f"'{given}': the download from {constants.ENDPOINT} failed: {first}") from error
    return str(Path(folder) / inside)
