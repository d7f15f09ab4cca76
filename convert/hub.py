"""Hub ids through huggingface_hub's cache: never remote code, never pickle, and a quick no where there is no hub."""

import os
import re
import threading
from pathlib import Path
from typing import Any

from configs.errors import RunError, UsageError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PATIENCE = 3.0  # seconds for the hub to answer at all
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
WANTED = re.compile(
    r"(model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|adapter_model\.safetensors|adapter_config\.json"
    r"|config\.json|generation_config\.json|tokenizer.*\.json|tokenizer\.model|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.json|merges\.txt|chat_template\.(jinja|json))"
)


def is_hub_id(model: str) -> bool:
    """Whether this could be 'org/name'."""
    return HUB_ID.fullmatch(model) is not None


def fetch(repo: str, weights: bool = True) -> Path:
    """The folder of a hub id's safetensors, config and tokenizer: the cached copy if complete, else downloaded.

    Without weights, only of config and tokenizer, as far as there are such.

    Raises RunError when the hub does not answer within 3 seconds, UsageError when it has no such model or only pickles.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, local_files_only=True))
        if _complete(folder) or (not weights and any((folder / name).is_file() for name in VOCABULARIES)):
            return folder
    except (LocalEntryNotFoundError, FileNotFoundError):
        pass
    if constants.HF_HUB_OFFLINE:
        raise RunError(f"'{repo}' is not in the hub cache ({constants.HF_HUB_CACHE}) and HF_HUB_OFFLINE is set")
    files = _list_files(repo)
    wanted = [name for name in files if WANTED.fullmatch(name)]
    if not weights:
        wanted = [name for name in wanted if not name.endswith((".safetensors", ".safetensors.index.json"))]
    elif not any(name in WEIGHTS for name in wanted):
        has = [name for name in files if name.endswith((".bin", ".pt", ".pth", ".gguf", ".safetensors"))]
        raise UsageError(
            f"'{repo}' has no model.safetensors (it has: {', '.join(has[:5]) or 'no weights'}): weights load from "
            "safetensors only, because *.bin and *.pt are pickles that can run code; download a GGUF file yourself"
        )
    try:
        return Path(snapshot_download(repo, allow_patterns=wanted))
    except (HfHubHTTPError, OSError) as error:
        raise RunError(f"'{repo}': the download from {constants.ENDPOINT} failed: {_sentence(error)}") from error


def _complete(folder: Path) -> bool:
    """Whether a cached snapshot holds a config and all its weights (an interrupted download does not)."""
    import json

    if (folder / "adapter_config.json").is_file():
        return (folder / "adapter_model.safetensors").is_file()
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text())["weight_map"].values())
    else:
        shards = {"model.safetensors"}
    tokenizer = any((folder / name).is_file() for name in VOCABULARIES)
    return tokenizer and (folder / "config.json").is_file() and all((folder / name).is_file() for name in shards)


def _list_files(repo: str) -> list[str]:
    """The repository's files. The request runs in a thread: looking a host up may block longer than any timeout."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    answer: dict[str, Any] = {}

    def ask() -> None:
        try:
            siblings = HfApi().model_info(repo, timeout=PATIENCE).siblings or []
            answer["files"] = [s.rfilename for s in siblings]
        except Exception as error:  # handed over to the caller's thread
            answer["error"] = error

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE - 0.2)
    error: Exception | None = answer.get("error")
    if isinstance(error, RepositoryNotFoundError):
        raise UsageError(
            f"'{repo}' is neither a local path nor a model on {constants.ENDPOINT} that may be read "
            f"(private or gated ones need {'a valid ' if os.environ.get('HF_TOKEN') else ''}HF_TOKEN)"
        ) from error
    if isinstance(error, HfHubHTTPError):
        raise RunError(f"'{repo}': {constants.ENDPOINT} answered: {_sentence(error)}") from error
    if "files" not in answer:
        why = _sentence(error) if error else f"no answer within {PATIENCE:g} seconds"
        raise RunError(
            f"'{repo}' is not a local path, is not in the hub cache ({constants.HF_HUB_CACHE}), and the hub "
            f"{constants.ENDPOINT} cannot be reached: {why}"
        ) from error
    return answer["files"]


def _sentence(error: BaseException) -> str:
    """The first line of an error's text."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
