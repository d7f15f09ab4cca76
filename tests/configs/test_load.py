"""Recipes in, runs out: inheritance, overrides, paths, round trips."""

import os
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UsageError
from configs.load import diff, dump, flatten, load
from configs.schema import Run
from configs.source import COMMAND_LINE, Place, parse, show, write

SMALLEST = "model: {source: m}\ndata: {train: rows.jsonl}\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of recipes, which is not the working directory."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "recipes"


def put(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_smallest(folder):
    run = load(put(folder, "mine.yaml", SMALLEST))
    assert (run.model.source, run.data.train, run.output) == ("m", ("rows.jsonl",), "runs/mine")
    assert load(folder / "mine.yaml", ["output=elsewhere"]).output == "elsewhere"


def test_numbers_are_yaml_1_2(folder):
    path = put(folder, "a.yaml", SMALLEST + "optim: {learning_rate: 1e-4, eps: 1E-9, b1: .5}\ntrain: {steps: 1e3}\n")
    run = load(path, ["optim.weight_decay=5e-2", "data.seed=1_000"])
    assert (run.optim.learning_rate, run.optim.eps, run.optim.b1) == (1e-4, 1e-9, 0.5)
    assert (run.optim.weight_decay, run.train.steps, run.data.seed) == (0.05, 1000, 1000)


def test_overrides(folder):
    path = put(folder, "a.yaml", SMALLEST + "optim: {b1: 0.8, b2: 0.9}\n")
    run = load(
        path,
        [
            "optim.b1=0.7",
            "data.train=[x.jsonl, y.jsonl]",
            "mesh.rules.embed=null",
            "mesh.rules.mlp=[tensor, fsdp]",
            "tune={method: lora, r: 4}",
            "tune.target_modules=q_proj",
            "optim.max_grad_norm=",
        ],
    )
    assert (run.optim.b1, run.optim.b2, run.optim.max_grad_norm) == (0.7, 0.9, None)
    assert run.data.train == ("x.jsonl", "y.jsonl")
    assert run.mesh.rules == {"embed": (), "mlp": ("tensor", "fsdp")}
    assert (run.tune.method, run.tune.r, run.tune.target_modules) == ("lora", 4, ("q_proj",))
    assert load(path, ["optim.b1=0.1", "optim.b1=0.2"]).optim.b1 == 0.2


def test_inheritance(folder):
    put(folder, "low.yaml", SMALLEST + "optim: {b1: 0.1, b2: 0.2}\ntrain: {batch_size: 2}\n")
    put(folder, "deep/side.yaml", "optim: {b2: 0.3}\n")
    put(folder, "deep/mid.yaml", "base: ../low.yaml\noptim: {eps: 1e-3}\n")
    run = load(put(folder, "top.yaml", "base: [deep/mid.yaml, deep/side.yaml]\noptim:\ntrain: {batch_size: 4}\n"))
    assert (run.optim.b1, run.optim.b2, run.optim.eps, run.train.batch_size) == (0.1, 0.3, 1e-3, 4)
    assert run.output == "runs/top"


def test_mesh_auto(folder):
    """One word in a recipe or on the command line; axes that are given beside it, or below, stay."""
    put(folder, "base.yaml", SMALLEST + "mesh: {tensor: 2, preset: replicated}\n")
    run = load(put(folder, "child.yaml", "base: base.yaml\nmesh: auto\n"), ["mesh.stage=2"])
    assert (run.mesh.auto, run.mesh.tensor, run.mesh.stage, run.mesh.preset) == (True, 2, 2, "replicated")
    assert load(folder / "base.yaml", ["mesh=auto"]).mesh.auto
    assert not load(folder / "child.yaml", ["mesh.auto=false"]).mesh.auto
    assert load(put(folder, "dumped.yaml", dump(run))) == run.model_copy(update={"output": "runs/child"})


def test_a_shipped_recipe_is_a_base(folder):
    run = load(put(folder, "mine.yaml", "base: sft_lora\n" + SMALLEST))
    assert run.tune.method == "lora"


def test_the_last_word_on_one_quantity_wins(folder):
    path = put(folder, "a.yaml", SMALLEST + "train: {epochs: 3}\noptim: {warmup_ratio: 0.1}\n")
    run = load(path, ["train.steps=5", "optim.warmup_steps=2"])
    assert (run.train.steps, run.train.epochs) == (5, None)
    assert (run.optim.warmup_steps, run.optim.warmup_ratio) == (2, 0)
    with pytest.raises(UsageError, match=r"train\.steps is 5 and train\.epochs is 2"):
        load(path, ["train.steps=5", "train.epochs=2"])


def test_paths(folder):
    for name in (
        "recipes/here.jsonl",
        "recipes/both.jsonl",
        "work/both.jsonl",
        "work/there.jsonl",
        "recipes/part-0.jsonl",
    ):
        (folder.parent / name).touch()
    names = "[here.jsonl, both.jsonl, there.jsonl, nowhere.jsonl, part-*.jsonl]"
    path = put(folder, "a.yaml", f"model: {{source: m}}\ndata: {{train: {names}, chat_template: '{{{{ x }}}}'}}\n")
    put(folder, "b/c.yaml", "base: ../a.yaml\n")
    expected = (
        str(folder / "here.jsonl"),
        str(folder / "both.jsonl"),
        str(folder.parent / "work" / "there.jsonl"),
        "nowhere.jsonl",
        str(folder / "part-*.jsonl"),
    )
    assert load(path).data.train == expected
    assert load(folder / "b/c.yaml").data.train == expected, "inherited paths belong to the file that says them"
    assert load(path).data.chat_template == "{{ x }}"
    assert load(path, ["data.train=both.jsonl"]).data.train == (os.path.abspath("both.jsonl"),)


def test_dump_is_a_recipe_and_a_run_folder_is_one(folder):
    run = load(
        put(folder, "a.yaml", SMALLEST),
        ["mesh.rules={embed: null, mlp: tensor}", "train.steps=3", "export.dtype=bfloat16"],
    )
    put(folder, "run/config.yaml", dump(run))
    assert load(folder / "run/config.yaml") == run == load(folder / "run")
    assert "base:" not in dump(run)


def test_diff(folder):
    path = put(folder, "a.yaml", SMALLEST)
    assert diff(load(path), load(path)) == []
    assert diff(load(path), load(path, ["optim.learning_rate=1e-4", "train.steps=2"])) == [
        "optim.learning_rate: 2.0e-05 -> 0.0001",
        "train.steps: null -> 2",
        "train.epochs: 1.0 -> null",
    ]


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    source=TEXT,
    train=st.lists(TEXT, min_size=1, max_size=3),
    lr=st.floats(1e-300, 1e300),
    rule=st.text(string.ascii_letters, min_size=1),
)
def test_round_trip_of_any_values(tmp_path_factory, source, train, lr, rule):
    given_run = Run.model_validate(
        {
            "model": {"source": source},
            "data": {"train": [f"/nowhere/{name}" for name in train]},
            "optim": {"learning_rate": lr},
            "mesh": {"rules": {rule: ["tensor"]}},
        }
    )
    path = put(tmp_path_factory.mktemp("round"), "config.yaml", dump(given_run))
    assert load(path) == given_run


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | TEXT
        | st.sampled_from(["1e4", "no", "1:30", "~", "0x1"]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
        max_leaves=8,
    )
)
def test_yaml_round_trip(value):
    assert parse(write(value), Place("x"))[0] == value
    assert len(show(value)) <= 80


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=30) | st.text("[]{}:,-&*!#'\"|>%@ \n\tab1", max_size=30))
def test_any_text_is_read_or_refused(text):
    for origin in (Place("x.yaml"), COMMAND_LINE):
        refused = None
        try:
            parse(text, origin)
        except UsageError as error:
            refused = str(error)
        assert refused is None or refused.startswith(str(origin))


def test_flatten_covers_every_knob(folder):
    run = load(put(folder, "a.yaml", SMALLEST))
    assert set(flatten(run)) == {
        name for name in Path(__file__).with_name("knobs.txt").read_text().split("\n")[1:] if name
    }
