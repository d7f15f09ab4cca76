"""Writes collectives.json: which collectives the compiled step of a small model runs on devices that are not there.

    python -m tests.golden.collectives        (with the extra plan; seconds a case)

A change of these numbers is to be looked at: it is traffic that a release adds or saves.
"""

import json
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from tests.train.tiny import ROOT, make_model

FILE = ROOT / "tests" / "golden" / "collectives.json"
SHAPE = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
COMMON = ("data.max_length=256", "train.batch_size=64", "data.train=unread", "train.steps=10")
CASES: dict[str, tuple[str, str, tuple[str, ...]]] = {  # recipe, target, changes
    "fsdp": ("pretrain", "v5e:4x4", ()),
    "replicated": ("pretrain", "v5e:2x2", ("mesh.preset=replicated", "mesh.data=4", "mesh.fsdp=1")),
    "fsdp and tensor": ("pretrain", "v5p:4x4x4", ("mesh.tensor=4", "train.microbatches=2")),
    "dpo with adapters": ("dpo", "v5e:2x4", ("tune.method=lora", "objective.reference=adapterless")),
    "gpu": ("pretrain", "h100:2x8", ("mesh.data=2", "mesh.fsdp=8")),
}


def model_in(folder: Path) -> Path:
    """The small model, made once in a folder."""
    if not (folder / "model").exists():
        make_model(folder / "model", **SHAPE)
    return folder / "model"


def plan_case(name: str, folder: Path) -> dict:
    """The plan of a case; folder: where the model is made, once."""
    from configs.load import load
    from train.planner.plan import make_plan
    from train.planner.targets import parse_target

    recipe, text, changes = CASES[name]
    return make_plan(load(recipe, [f"model.source={model_in(folder)}", *COMMON, *changes]), parse_target(text))


def summary(plan: dict) -> dict[str, int]:
    """{'all-gather over fsdp': how often in a step}."""
    counts = Counter()
    for one in plan["collectives"]:
        counts[f"{one['kind']} over {' x '.join(one['axes'])}"] += one["count"]
    return dict(sorted(counts.items()))


def release() -> str:
    """The compiler's release: another one may choose otherwise."""
    return ".".join(version("jax").split(".")[:2])


def main() -> None:
    """Compile all cases, keep what other releases did."""
    from train.planner.targets import parse_target, set_environment

    set_environment(parse_target("v5e:4x4"))
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        made = {}
        for name in CASES:
            plan = plan_case(name, Path(folder))
            made[name] = summary(plan)
            print(name, f"{plan['compile_seconds']:.1f} s", plan["excess"], file=sys.stderr)
    FILE.write_text(json.dumps({**known, release(): made}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
