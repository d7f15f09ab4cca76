"""Hub ids without a hub: quick, clear, and never a pickle."""

import socket
import time

import pytest
from huggingface_hub import constants

from configs.errors import RunError, UsageError
from convert import hub
from convert.load import resolve


@pytest.fixture
def online(tmp_path, monkeypatch):
    """As if online, with an empty cache of our own."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(cache, repo, files):
    """A snapshot as huggingface_hub lays it out."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("a" * 40)
    snapshot = root / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for name, content in files.items():
        (snapshot / name).write_bytes(content)
    return snapshot


def test_a_silent_hub_costs_three_seconds(online, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, never answers
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        start = time.monotonic()
        with pytest.raises(RunError, match="cannot be reached") as error:
            resolve("some-org/some-model")
        assert time.monotonic() - start < 3.2
        assert endpoint in str(error.value)


def test_a_refusing_hub(online, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    with pytest.raises(RunError, match=r"'some-org/some-model' is not a local path.*cannot be reached"):
        resolve("some-org/some-model")


def test_offline(online, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match="HF_HUB_OFFLINE"):
        resolve("some-org/some-model")


def test_a_complete_cached_copy_needs_no_hub(online, monkeypatch, tiny):
    monkeypatch.setattr(hub, "_list_files", lambda repo: pytest.fail("asked the hub"))
    folder, _ = tiny()
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    cached(online, "some-org/some-model", files | {"tokenizer.json": b"{}"})
    assert resolve("some-org/some-model").arch == resolve(folder).arch


def test_an_interrupted_download_is_taken_up_again(online, monkeypatch, tiny):
    asked = []
    monkeypatch.setattr(hub, "_list_files", lambda repo: asked.append(repo) or ["pytorch_model.bin", "config.json"])
    cached(online, "some-org/some-model", {"config.json": b"{}", "tokenizer.json": b"{}"})
    with pytest.raises(UsageError, match=r"pytorch_model\.bin.*pickles"):
        resolve("some-org/some-model")
    assert asked == ["some-org/some-model"]


def test_only_what_is_wanted_is_downloaded():
    taken = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"]
    taken += ["config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja"]
    left = ["pytorch_model.bin", "modeling_x.py", "consolidated.safetensors", "onnx/model.onnx", "original/config.json"]
    assert [name for name in taken + left if hub.WANTED.fullmatch(name)] == taken


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("a/b", True), ("a/b/c", False), ("../b", False), ("a", False), ("./a", False), ("/a/b", False)],
)
def test_what_a_hub_id_looks_like(name, is_one):
    assert hub.is_hub_id(name) == is_one
