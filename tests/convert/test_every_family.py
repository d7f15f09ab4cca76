"""Every family through `purestep convert` and `inspect`: streamed, or leaf by leaf from our tree, the same bytes."""

import json

import pytest
from safetensors.numpy import load_file, save_file

from convert import conversion
from convert.conversion import convert
from convert.held import hold
from convert.hf import outgoing
from convert.inspection import inspect, render
from convert.load import resolve
from tests.golden import families


@pytest.mark.parametrize("family", families.CONFIGS)
def test_a_family(family, tmp_path, monkeypatch):
    config = families.CONFIGS[family]
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    source = resolve(folder)
    given = {name: value.astype("float32") for name, value in families.tensors(config).items()}
    save_file(given, folder / "model.safetensors")
    told = inspect(str(folder))
    assert not told["problems"]
    assert told["parameters"]["total"] == sum(value.size for value in given.values())
    json.dumps(told)
    assert config["model_type"] in render(told)
    convert(source, tmp_path / "streamed", verify=True)
    held = lambda source, dtype: list(outgoing(hold(source), source.arch, dtype))  # noqa: E731
    monkeypatch.setattr(conversion, "tensors_of", held)  # as of a run
    convert(source, tmp_path / "held", verify=True)
    for name in ("streamed", "held"):
        found = load_file(tmp_path / name / "model.safetensors")
        assert found.keys() == given.keys()
        for key, value in given.items():
            assert found[key].tobytes() == value.tobytes(), (name, key)
