"""Bad input, from the command line to the exit code: one clear sentence, and nothing left behind."""

import json
import sys
import time

import pytest

from tests.train import tiny
from train import cli

ROW = {"messages": [{"role": "user", "content": "name"}, {"role": "assistant", "content": "yes"}]}


@pytest.fixture
def refuse(tmp_path, tiny_model, chats, monkeypatch, capsys):
    """refuse(*overrides, model=, data=) -> (exit code, what follows "purestep: ") of a run that must not begin."""

    def run(*more, model=tiny_model, data=chats, output="run", left=False, recipe="sft"):
        arguments = tiny.overrides(tmp_path / output, model, data, "log.preflight=true", *more)
        monkeypatch.setattr(sys, "argv", ["purestep", "train", recipe, *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        assert out == ""
        before, found, said = err.rpartition("purestep: ")
        assert found, err
        assert "Traceback" not in before
        assert left or not (tmp_path / output).exists(), "a run that never began has left something behind"
        return stopped.value.code, said.strip()

    return run


@pytest.fixture
def write(tmp_path):
    """write(*lines) -> a JSONL file; a line may be an object or text."""

    def make(*lines):
        path = tmp_path / "bad.jsonl"
        path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
        return path

    return make


# Models


def test_wrong_path(refuse, tiny_model):
    code, said = refuse(model=tiny_model.with_name("tinny"))
    assert code == 2
    assert said.startswith(f"MODEL '{tiny_model.with_name('tinny')}' does not exist; nearest: {tiny_model}.")


def test_a_hub_id_without_a_network(start, tmp_path, chats):
    """Nobody answers at this address (reserved for documentation); the hub itself is asked for 3 seconds at most."""
    began = time.monotonic()
    process = start("sft", *tiny.overrides(tmp_path / "run", "nobody/nothing-at-all", chats),
                    HF_HUB_OFFLINE=None, HF_ENDPOINT="http://192.0.2.1", HF_HOME=str(tmp_path / "hub"))  # fmt: skip
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1, error
    assert error.startswith("purestep: 'nobody/nothing-at-all' is not a local path, is not in the hub cache")
    assert "http://192.0.2.1 cannot be reached" in error
    assert len(error.splitlines()) == 1
    assert time.monotonic() - began < 30  # with the imports, on a busy machine
    assert not (tmp_path / "run").exists()


def test_missing_tensors(refuse, tmp_path):
    gone = "model.layers.1.mlp.up_proj.weight"
    code, said = refuse(model=tiny.make_model(tmp_path / "models" / "torn", drop=(gone,)))
    assert code == 2
    assert gone in said
    assert "1 missing" in said


def test_unknown_architecture(refuse, tmp_path):
    code, said = refuse(model=tiny.make_model(tmp_path / "models" / "mamba", model_type="mamba"))
    assert code == 2
    assert "mamba" in said
    assert "llama" in said, "what is supported"


def test_a_tokenizer_without_a_chat_template(refuse, tmp_path):
    code, said = refuse(model=tiny.make_model(tmp_path / "models" / "plain", template=None))
    assert code == 2
    assert "chat template" in said
    assert "data.chat_template" in said, "what to do"


def test_a_tokenizer_of_another_model(refuse, tmp_path):
    code, said = refuse(model=tiny.make_model(tmp_path / "models" / "small", vocab_size=64))
    assert code == 2
    assert "they do not belong together" in said


# Data


@pytest.mark.parametrize("line", ['{"messages": [', '{"messages": 3}', '{"colour": "red"}', "[1, 2]"])
def test_a_malformed_row_is_named_by_file_and_line(refuse, write, line):
    path = write(ROW, "", *[ROW] * 30, line, ROW)
    code, said = refuse(data=path)
    assert code == 2
    assert said.startswith(f"{path}:33: ")
    assert "data.on_bad_row=skip" in said


def test_a_broken_first_row_is_named_too(refuse, write):
    path = write('{"messages": [', ROW)
    code, said = refuse(data=path)
    assert code == 2
    assert said.startswith(f"{path}:1: ")


def test_nothing_left_after_filtering(refuse, write):
    code, said = refuse(data=write({"messages": ROW["messages"][:1]}, {"messages": ROW["messages"][:1]}))
    assert code == 2
    assert said == "no example is left of 2 rows: 2 no token carries loss (after truncation to data.max_length)"


def test_an_empty_file(refuse, write):
    path = write("")
    assert refuse(data=path) == (2, f"no rows in {path}: the data is empty")


def test_a_missing_file(refuse, chats):
    code, said = refuse(data=chats.with_name("row.jsonl"))
    assert code == 2
    assert said == f"data file '{chats.with_name('row.jsonl')}' does not exist; did you mean '{chats}'?"


def test_too_long_a_conversation(refuse, write):
    long = {"messages": [ROW["messages"][0], {"role": "assistant", "content": "yes " * 50}]}
    path = write(ROW, long)
    code, said = refuse("data.truncation=error", data=path)
    assert code == 2
    assert said.startswith(f"{path}:2: the example has ")
    assert "data.max_length allows 49" in said


LONG = "yes " * 50  # beyond data.max_length


@pytest.mark.parametrize(
    ("chosen", "rejected", "whose"),
    [(LONG, "no", "a chosen"), ("yes", LONG, "a rejected"), (LONG, f"no {LONG}", "a chosen")],
)
def test_both_completions_of_pairs_must_end_their_turn(refuse, write, chosen, rejected, whose):
    data = write(*[{"prompt": ROW["messages"][:1], "chosen": chosen, "rejected": rejected}] * 3)
    code, said = refuse(data=data, recipe="dpo")
    assert code == 2
    assert said.startswith(f"no trained token of {whose} completion is an end of turn ('<|im_end|>')")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ROW["messages"][0], {"role": "assistant", "content": LONG}]},
        {"prompt": ROW["messages"][:1], "completion": LONG},
    ],
)
def test_an_answer_must_end_its_turn(refuse, write, row):
    code, said = refuse(data=write(row))
    assert code == 2
    assert said.startswith("no trained token is an end of turn ('<|im_end|>')")


def test_rows_longer_than_the_models_context(refuse):
    code, said = refuse("data.max_length=65")
    assert (code, said) == (2, "data.max_length 65 is beyond the model's context of 64 tokens")


# Devices and settings


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["mesh.data=3", "mesh.fsdp=1"], ["mesh: data=3 needs 3 devices, there are 8"]),
        (["mesh.tensor=8", "mesh.fsdp=1"], ["layers/attn/k/weight", "'kv_heads' of 2", "tensor=8", "kv_heads: null"]),
        (["mesh.rules={mlp: fsdp}"], ["layers/mlp/down/weight: 'mlp' and 'embed' both want mesh axis 'fsdp'"]),
        (["mesh.rules={colour: fsdp}"], ["mesh.rules.colour: unknown logical axis"]),
        (["train.batch_size=12"], ["train.batch_size 12", "does not divide over 8 devices"]),
        (["mesh.context=8", "mesh.fsdp=1", "data.max_length=40"], ["data.max_length 40 is not a multiple of 2 x"]),
        (["mesh.stage=8", "mesh.fsdp=1"], ["mesh.stage=8 does not divide the model's 2 layers; it may be 2"]),
        (["mesh.stage=2", "mesh.pipeline_microbatches=3"], ["pipeline_microbatches is 3", "that divide the rows: 2"]),
        (["mesh.dcn={data: 2}", "mesh.data=2"], ["there is but one slice (or host)", "leave it out"]),
        (["mesh=auto", "mesh.tensor=3"], ["mesh: auto with tensor=3: no mesh of 8 devices has these axes"]),
        (["mesh=auto", "mesh.fsdp=1", "mesh.tensor=4"], ["kv heads (2) over tensor"]),
        (["train.microbatches=2"], ["train.batch_size 8 in 2 micro-batches of 4 rows", "8 devices"]),
        (["train.eval_every=5"], ["train.eval_every is 5, but data.eval is empty"]),
        (["tune.trainable=['*kernel*']"], ["tune.trainable: pattern '*kernel*' matches no weight"]),
        (["optim.decay_patterns=['*kernel*']"], ["optim.decay_patterns: pattern '*kernel*' matches no weight"]),
        (["tune.method=lora", "tune.target_modules=[wq]"], ["tune.target_modules: 'wq' is unknown"]),
        (["tune.method=lora", "tune.init_adapter=nowhere"], ["nowhere"]),
        (["log.samples=nowhere.jsonl"], ["log.samples: nowhere.jsonl does not exist"]),
        (["model.dtype=float64"], ["float64 needs JAX_ENABLE_X64=1"]),
        (["optim.learning_rates=1"], ["optim.learning_rates", "optim.learning_rate"]),
        (["optim.learning_rate=-1"], ["optim.learning_rate"]),
    ],
)
def test_settings(refuse, more, parts):
    code, said = refuse(*more)
    assert code == 2
    assert len(said.splitlines()) <= 2, said
    for part in parts:
        assert part in said, said


def test_the_output_is_a_file(refuse, tmp_path):
    (tmp_path / "run").write_text("mine")
    code, said = refuse(left=True)
    assert (code, said) == (
        2,
        f"output={tmp_path / 'run'}: {tmp_path / 'run'} is a file, a folder is to be written there",
    )
    assert (tmp_path / "run").read_text() == "mine"


def test_what_lies_in_export_is_not_ours(refuse, tmp_path):
    """Found before training, not after it."""
    (tmp_path / "run" / "export").mkdir(parents=True)
    (tmp_path / "run" / "export" / "thesis.txt").write_text("mine")
    code, said = refuse(left=True)
    assert code == 2
    assert "export exists and is no model folder: it is not overwritten" in said
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["export"]
