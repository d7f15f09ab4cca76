"""PEFT folders in and out, and what is refused by name."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs.errors import UsageError
from convert.adapter import read_adapter, read_adapter_config, write_adapter
from convert.load import load_params, resolve
from convert.tables import rows
from model.transformer import declare
from model.weights import Lora, materialise

RANK = 2


@pytest.fixture
def made(tiny, tmp_path):
    """(base source, our adapter, its folder)."""
    source = resolve(tiny()[0])
    rng, declared, adapter = np.random.default_rng(1), declare(source.arch), {}
    for row in rows(source.arch):
        if row.layout == "linear" and row.stacked:
            shape, n = declared[row.ours].shape, len(row.inputs) + 1
            a, b = (*shape[:n], RANK), (shape[0], RANK, *shape[n:])
            adapter[row.ours] = tuple(rng.standard_normal(s).astype(np.float32) for s in (a, b))
    folder = tmp_path / "adapter"
    write_adapter(folder, adapter, source.arch, base=str(source.path), lora_alpha=5)
    return source, adapter, folder


def change(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_round_trip(made):
    source, adapter, folder = made
    found = read_adapter(folder, source.arch)
    assert found.keys() == adapter.keys()
    for path, pair in adapter.items():
        for ours, theirs in zip(pair, found[path], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_peft_names_and_shapes(made):
    _, _, folder = made
    tensors = load_file(folder / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.{}.{}.lora_{}.weight"
    assert len(tensors) == 3 * 7 * 2
    assert tensors[stem.format(0, "self_attn.q_proj", "A")].shape == (RANK, 24)
    assert tensors[stem.format(0, "self_attn.q_proj", "B")].shape == (48, RANK)
    assert tensors[stem.format(2, "mlp.down_proj", "A")].shape == (RANK, 36)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 5)


def test_merged_weights_are_those_of_the_matrices(made):
    """W + alpha / r B A, computed on PEFT's own matrices."""
    source, _, folder = made
    params = load_params(resolve(folder))
    base = load_file(source.path / "model.safetensors")
    tensors = load_file(folder / "adapter_model.safetensors")
    for row in rows(source.arch):
        if row.layout != "linear":
            continue
        node = params
        for key in row.ours.split("/"):
            node = node[key]
        assert isinstance(node, Lora)
        merged = np.asarray(materialise(node))
        for layer, name in enumerate(row.names(source.arch)):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            delta = tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
            np.testing.assert_allclose(row.to_theirs(merged[layer], source.arch), base[name] + 2.5 * delta, atol=1e-5)


def test_rslora_scale(made):
    _, _, folder = made
    assert read_adapter_config(folder).scale == 2.5
    change(folder, use_rslora=True)
    assert read_adapter_config(folder).scale == pytest.approx(5 / 2**0.5)


@pytest.mark.parametrize(
    "field",
    [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"rank_pattern": {"q_proj": 4}},
     {"alpha_pattern": {"q_proj": 4}}, {"init_lora_weights": "pissa"}, {"peft_type": "IA3"}, {"fan_in_fan_out": True},
     {"task_type": "SEQ_CLS"}, {"trainable_token_indices": [1]}, {"something_new": 3}],
    ids=str,
)  # fmt: skip
def test_unsupported_fields_are_named(made, field):
    _, _, folder = made
    change(folder, **field)
    with pytest.raises(UsageError, match=f"adapter_config.json: {next(iter(field))} = "):
        resolve(folder)


def test_peft_defaults_are_accepted(made):
    _, _, folder = made
    change(folder, init_lora_weights=True, megatron_core="megatron.core", qalora_group_size=16, layers_pattern=None,
           peft_version="0.21.2", revision=None, loftq_config={}, eva_config=None, lora_dropout=0.1)  # fmt: skip
    resolve(folder)


def test_incomplete_and_foreign_tensors(made):
    source, _, folder = made
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    stem = "base_model.model.model.layers.1.self_attn.q_proj"
    save_file({k: v for k, v in tensors.items() if not k.startswith(stem)}, path)
    with pytest.raises(UsageError, match=r"2 missing: .*layers\.1\.self_attn\.q_proj\.lora_A"):
        read_adapter(folder, source.arch)
    save_file(tensors | {"base_model.model.lm_head.lora_A.weight": np.zeros((2, 24), np.float32)}, path)
    with pytest.raises(UsageError, match=r"not adapters of linear layers here: base_model\.model\.lm_head"):
        read_adapter(folder, source.arch)
    save_file(tensors | {f"{stem}.lora_A.weight": np.zeros((3, 24), np.float32)}, path)
    with pytest.raises(UsageError, match=r"1 not of the base's shape and rank 2"):
        read_adapter(folder, source.arch)
    path.rename(folder / "adapter_model.bin")
    with pytest.raises(UsageError, match=r"adapter_model\.bin is pickle"):
        read_adapter(folder, source.arch)


def test_the_base_is_found_beside_the_adapter(made, tmp_path, monkeypatch):
    source, _, folder = made
    change(folder, base_model_name_or_path="../tiny")
    assert resolve(folder).arch == source.arch
    change(folder, base_model_name_or_path="../tiniest")
    with pytest.raises(UsageError, match=r"base_model_name_or_path: MODEL '\.\./tiniest' does not exist"):
        resolve(folder)
    change(folder, base_model_name_or_path=str(folder))
    with pytest.raises(UsageError, match="circle"):
        resolve(folder)


def test_nothing_to_write(made, tmp_path):
    source, adapter, _ = made
    with pytest.raises(ValueError, match="embed/weight"):
        write_adapter(
            tmp_path / "x", {"embed/weight": adapter["layers/attn/q/weight"]}, source.arch, base="b", lora_alpha=1
        )
    with pytest.raises(ValueError, match="nothing"):
        write_adapter(tmp_path / "x", {}, source.arch, base="b", lora_alpha=1)
    assert not (tmp_path / "x").exists()
