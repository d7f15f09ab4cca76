"""Folders of tokenised shards: what they were made of, and whether they are still that."""

import hashlib
import json
from pathlib import Path
from typing import Any

from configs.errors import UsageError
from data.array_record import ArrayRecords
from data.tokenizer import Tokenizer

MANIFEST, UNFINISHED = "manifest.json", "unfinished.json"
# what tokenizers treat differently: words, digits, spaces, scripts, marks, code
PROBE = (
    "The  naïve co-op's 2,048 tests\tRAN…\r\n\n    if x != 'ß':  # 你好，世界！ Привет שלום 🙂 e\u0301\n"
    "<|x|> ﬁn\u00a0— 3.14e-10"
)


class Shard(ArrayRecords):
    """A shard that a manifest tells of."""

    def __init__(self, path: Path, tokenizer: str, made_by: str):
        super().__init__(path)
        self.tokenizer, self.made_by = tokenizer, made_by


def fingerprint(tokenizer: Tokenizer) -> str:
    """Equal for tokenizers with the same tokens, which make the same ids of a text and end it alike."""
    tokens = [tokenizer.decode([index]) for index in range(tokenizer.vocab_size)]
    said = [tokens, sorted(tokenizer.special_tokens.items()), tokenizer.encode(PROBE, True), tokenizer.eos_ids[:1]]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def check_tokenizer(records: Any, tokenizer: Tokenizer) -> None:
    """Raise UsageError when shards among the files of `records` were made with another tokenizer."""
    shards = [file for file in getattr(records, "files", ()) if isinstance(file, Shard)]
    if not shards:
        return
    mine = fingerprint(tokenizer)
    other = next((shard for shard in shards if shard.tokenizer != mine), None)
    if other is not None:
        raise UsageError(
            f"{other.path.parent} was tokenised with '{other.made_by}' (hash {other.tokenizer[:12]}), the model's "
            f"tokenizer is another (hash {mine[:12]}): its ids would mean other texts. Build the data again with it"
        )


def shards_of(folder: Path) -> list[Path] | None:
    """The shards of a folder that `purestep data build` made, in order; None for another folder."""
    manifest = read_manifest(folder)
    return None if manifest is None else [folder / shard["name"] for shard in manifest["shards"]]


def open_shard(path: Path) -> ArrayRecords:
    """An ArrayRecord file; where a manifest lies beside it, as that one says or not at all."""
    manifest = read_manifest(path.parent)
    told = [shard for shard in manifest["shards"] if shard["name"] == path.name] if manifest else []
    if manifest is None or not told:
        return ArrayRecords(path)
    if not path.is_file():
        raise UsageError(f"{path} is missing, which {MANIFEST} names: copy it again, or {_again(manifest)}")
    shard = Shard(path, manifest["tokenizer"]["hash"], manifest["tokenizer"]["name"])
    for what, found, expected in (
        ("bytes", path.stat().st_size, told[0]["bytes"]),
        ("documents", len(shard), told[0]["documents"]),
    ):
        if found != expected:
            raise UsageError(
                f"{path} has {found} {what}, {MANIFEST} says {expected}: it has changed since it was built; copy it "
                f"again, or delete the folder and {_again(manifest)}"
            )
    return shard


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished build; UsageError for an unfinished one, None where there is none of ours."""
    for name in (MANIFEST, UNFINISHED):
        path = folder / name
        if not path.is_file():
            continue
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(read, dict) or "purestep" not in read:
            continue
        if name == UNFINISHED:
            raise UsageError(f"'{folder}' is an unfinished build: {_again(read)}; it goes on where it stopped")
        return read
    return None


def _again(manifest: dict[str, Any]) -> str:
    return f"run again: {manifest['command']}"
