"""Tokenise once: sources to ArrayRecord shards and a manifest, by several processes, resumable."""

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from configs.data import Data
from configs.errors import RunError, UsageError
from data.array_record import encode_tokens, import_array_record
from data.chat import encode_document
from data.examples import encode_form
from data.files import File
from data.formats import normalise
from data.manifest import MANIFEST, UNFINISHED, fingerprint
from data.sources import Records, open_source
from data.tokenizer import Tokenizer, load_tokenizer

FORMAT = 1
TOKENIZER, LOCK = "tokenizer", ".lock"
SHARDS, SHARD_BYTES = 16, 1 << 28  # at least so many; of source bytes
# a build goes on, or is the same, when these are
SAME = ("purestep", "tokenizer", "settings", "sources", "rows")
COUNTED = ("documents", "tokens", "empty", "malformed")


@dataclass(frozen=True)
class Settings:
    """What the shards depend on besides the sources and the tokenizer; shards None: by the sources' size."""

    add_eos: bool = True
    on_bad_row: Literal["error", "skip"] = "error"
    shards: int | None = None


def build(
    files: list[str],
    tokenizer: Tokenizer,
    name: str,
    output: Path,
    settings: Settings,
    workers: int = 1,
    command: str = "purestep data build",
    advance: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Tokenise the documents of `files`, in their order, into a folder of shards; returns its manifest. What an earlier
    call has finished stays. `advance` is told of the shards' rows and tokens; `command` stands in messages."""
    if settings.add_eos and not tokenizer.eos_ids:
        raise UsageError(f"tokenizer '{name}' has no end-of-sequence token to end documents with: use --no-add-eos")
    records = open_source(files)
    for file in records.files:
        _check_kind(file)
    sources = [_describe(file) for file in records.files]
    wanted = settings.shards or max(SHARDS, -(-sum(one["bytes"] for one in sources) // SHARD_BYTES))
    plan = {
        "purestep": FORMAT,
        "command": command,
        "tokenizer": {"name": name, "hash": fingerprint(tokenizer)},
        "settings": {**asdict(settings), "shards": min(wanted, len(records))},
        "sources": sources,
        "rows": len(records),
    }
    output.mkdir(parents=True, exist_ok=True)
    with _locked(output):
        if done := _begin(output, plan):
            return done
        shutil.rmtree(output / TOKENIZER, ignore_errors=True)
        tokenizer.save(output / TOKENIZER)
        if fingerprint(load_tokenizer(output / TOKENIZER)) != plan["tokenizer"]["hash"]:
            raise RunError(f"tokenizer '{name}' makes other ids once it is saved to {output / TOKENIZER}")
        shards = _run(records, output, plan, workers, advance)
        return _finish(output, plan, shards)


def _check_kind(file: File) -> None:
    try:
        row = file.read(0) if len(file) else {"text": ""}
        form = normalise(row) if isinstance(row, dict) else {"text": ""}
    except ValueError:
        return  # malformed: settings.on_bad_row decides when its turn comes
    if not {"text", "tokens"} & form.keys() or "weights" in form:
        raise UsageError(
            f"{file.where(0)}: `data build` takes rows of text (or of tokens without weights), this one has "
            f"{', '.join(row)}: conversations and pairs are tokenised when a run starts"
        )


def _describe(file: File) -> dict[str, Any]:
    """A source by its content. Files read as one count as one."""
    size, whole = 0, hashlib.sha256()
    for path in file.marked:
        with path.open("rb") as handle:
            whole.update(hashlib.file_digest(handle, "sha256").digest())
        size += path.stat().st_size
    return {"path": str(file.path), "files": len(file.marked), "bytes": size, "sha256": whole.hexdigest()}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with open(folder / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"another process builds '{folder}' at this moment") from error
        yield


def _begin(output: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest when everything is done already; else the plan is written, where it is not yet."""
    for name in (MANIFEST, UNFINISHED):
        if not (output / name).is_file():
            continue
        try:
            before = json.loads((output / name).read_text(encoding="utf-8"))
            changed = [key for key in SAME if before[key] != plan[key]]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{output / name} is no manifest of this command: choose another --output") from error
        if changed:
            raise UsageError(
                f"--output '{output}' holds {'a' if name == MANIFEST else 'an unfinished'} build with other "
                f"{', '.join(changed)} (made by: {before['command']}): choose another folder, or delete it"
            )
        return before if name == MANIFEST else None
    others = [path.name for path in output.iterdir() if path.name != LOCK]
    if others:
        raise UsageError(f"--output '{output}' is not empty ({', '.join(sorted(others)[:3])}): choose a new folder")
    _write(output / UNFINISHED, plan)
    return None


def _run(records: Records, output: Path, plan: Any, workers: int, advance: Any) -> list[dict[str, Any]]:
    count, settings = plan["settings"]["shards"], Settings(**plan["settings"])
    cuts = [len(records) * i // count for i in range(count + 1)]
    names = [f"shard-{i:05}-of-{count:05}.array_record" for i in range(count)]
    todo = [i for i in range(count) if _finished(output, names[i]) is None]
    begin = records, output, settings

    def tell(i: int) -> None:
        shard = _finished(output, names[i])
        if advance is not None and shard is not None:
            advance(cuts[i + 1] - cuts[i], shard["tokens"])

    for i in set(range(count)) - set(todo):
        tell(i)
    if workers == 1 or len(todo) < 2:
        job = Job(*begin, load_tokenizer(output / TOKENIZER))
        for i in todo:
            job.write(names[i], cuts[i], cuts[i + 1])
            tell(i)
    elif todo:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(todo)), spawn, _start, begin) as pool:
            started = {pool.submit(_write_shard, names[i], cuts[i], cuts[i + 1]): i for i in todo}
            try:
                for future in as_completed(started):
                    future.result()
                    tell(started[future])
            except BrokenProcessPool as error:
                raise RunError(
                    f"a worker died (memory?): {plan['command']} goes on from the shards that are done; --workers says "
                    "how many work at a time"
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)
    return [shard for name in names if (shard := _finished(output, name)) is not None]


def _finished(output: Path, name: str) -> dict[str, Any] | None:
    """The counts of a shard; only a whole one has its name."""
    beside = output / f"{name}.json"
    if not (output / name).is_file() or not beside.is_file():
        return None
    shard = json.loads(beside.read_text(encoding="utf-8"))
    return shard if shard["bytes"] == (output / name).stat().st_size else None


@dataclass(frozen=True)
class Job:
    """What every shard of a build needs."""

    records: Records
    output: Path
    settings: Settings
    tokenizer: Tokenizer

    def write(self, name: str, begin: int, end: int) -> None:
        """The shard of the rows from begin to end: written beside, renamed when whole."""
        data = Data(train=("-",), add_eos=self.settings.add_eos)
        beside = self.output / f".{name}"
        counts: dict[str, int] = dict.fromkeys(COUNTED, 0)
        writer = import_array_record().ArrayRecordWriter(str(beside), "group_size:1")
        try:
            for index in range(begin, end):
                tokens, why = self._encode(index, data)
                if tokens is None:
                    counts[why] += 1
                    continue
                writer.write(encode_tokens(tokens))
                counts["documents"] += 1
                counts["tokens"] += len(tokens)
        finally:
            writer.close()
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        shard = {"name": name, "rows": end - begin, **counts, "bytes": beside.stat().st_size}
        _write(self.output / f"{name}.json", shard)
        beside.replace(self.output / name)

    def _encode(self, index: int, data: Data) -> tuple[Any, str]:
        try:
            form = normalise(self.records[index])
            if not len(form.get("text", form.get("tokens", "?"))):
                return None, "empty"
            if not {"text", "tokens"} & form.keys():
                raise ValueError(f"neither text nor tokens but {', '.join(form)}")
            if "text" in form:
                return encode_document(self.tokenizer, form["text"], self.settings.add_eos), ""
            return encode_form(form, self.tokenizer, data)["tokens"], ""
        except ValueError as error:
            if self.settings.on_bad_row == "skip" and not isinstance(error, UsageError):
                return None, "malformed"
            where = self.records.where(index)
            said = str(error) if str(error).startswith(where) else f"{where}: {error}"
            raise UsageError(f"{said} (--on-bad-row skip would count and skip such rows)") from error


_JOBS: list[Job] = []  # of a worker process


def _start(records: Records, output: Path, settings: Settings) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are what runs in parallel
    _JOBS.append(Job(records, output, settings, load_tokenizer(output / TOKENIZER)))


def _write_shard(name: str, begin: int, end: int) -> None:
    _JOBS[-1].write(name, begin, end)


def _finish(output: Path, plan: Mapping[str, Any], shards: list[dict[str, Any]]) -> dict[str, Any]:
    totals = {key: sum(shard[key] for shard in shards) for key in COUNTED}
    if not totals["documents"]:
        raise UsageError(f"no document is left of {plan['rows']} rows: {totals['empty']} are empty, the rest malformed")
    manifest = {**plan, **totals, "shards": shards}
    _write(output / MANIFEST, manifest)
    for path in (output / UNFINISHED, *(output / f"{shard['name']}.json" for shard in shards)):
        path.unlink(missing_ok=True)
    for path in output.glob(".shard-*"):  # of a killed worker
        path.unlink()
    return manifest


def _write(path: Path, value: Mapping[str, Any]) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)
