"""The schema: frozen names, described knobs, sound defaults, relations between knobs."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pydantic
import pytest

from configs.errors import RunError, UsageError
from configs.explain import ELSEWHERE, FIELDS, allowed
from configs.schema import SECTIONS, Run, knobs

HERE = Path(__file__).parent
SMALLEST = {"model": {"source": "m"}, "data": {"train": "rows.jsonl"}}


def make(**sections) -> Run:
    return Run.model_validate({**SMALLEST, **sections})


def test_knobs_are_the_frozen_list():
    frozen = [line for line in (HERE / "knobs.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert [name for name, _ in knobs()] == frozen


def test_every_knob_says_what_it_means_and_takes():
    for name, field in knobs():
        assert field.description, name
        words = allowed(field)
        assert words, name
        assert "<" not in words, f"{name}: {words}"
    assert all(section.__doc__ for section in SECTIONS.values())
    assert set(ELSEWHERE.values()) <= set(FIELDS)


def test_defaults():
    run = make()
    assert (run.train.steps, run.train.epochs) == (None, 1)
    assert run.data.train == ("rows.jsonl",)
    assert run.mesh.shape == {"data": 1, "fsdp": -1, "tensor": 1, "context": 1, "expert": 1, "stage": 1}
    assert run.export.max_shard_bytes == 5 * 10**9
    assert make(train={"steps": 5}).train.epochs is None


def test_frozen_and_copyable():
    run = make(mesh={"rules": {"embed": "fsdp", "vocab": None, "mlp": ["tensor", "fsdp"]}})
    assert run.mesh.rules == {"embed": ("fsdp",), "vocab": (), "mlp": ("tensor", "fsdp")}
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        run.optim.learning_rate = 1.0  # pyright: ignore[reportAttributeAccessIssue]
    assert pickle.loads(pickle.dumps(run)) == run == copy.deepcopy(run)


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("train", {"steps": 2, "epochs": 3}, "give one"),
        ("train", {"batch_size": 8, "microbatches": 3}, "does not divide"),
        ("optim", {"warmup_steps": 2, "warmup_ratio": 0.1}, "give one"),
        ("mesh", {"data": -1}, "set the others to 1"),
        ("mesh", {"data": 0}, "1 or more"),
        ("tune", {"method": "lora", "trainable": ["*norm*"]}, "tune.method=full"),
        ("tune", {"init_adapter": "folder"}, "tune.method=lora"),
        ("tune", {"target_modules": []}, "at least one"),
        ("optim", {"learning_rate": float("inf")}, "finite"),
        ("optim", {"learning_rate": True}, "valid number"),
        ("train", {"steps": "3"}, "valid integer"),
        ("train", {"stepz": 3}, "Extra inputs"),
        ("export", {"max_shard_size": "0GB"}, "pattern"),
    ],
)
def test_refused(section, values, words):
    with pytest.raises(pydantic.ValidationError, match=words):
        make(**{section: values})


def test_errors_are_what_callers_expect():
    assert issubclass(UsageError, ValueError)
    assert issubclass(RunError, RuntimeError)


def test_import_is_light():
    """Measured as modules, not seconds: a busy machine must not fail the suite."""
    code = (
        "import sys, configs.load; print(*(m for m in ('jax', 'numpy', 'transformers', 'torch') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE.parents[1], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
