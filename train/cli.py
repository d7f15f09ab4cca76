"""The command line. Heavy libraries are imported inside the commands: `purestep --help` answers at once."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from configs.errors import RunError, UsageError
from decode.commands import chat, evaluate, generate, score
from train.convert_commands import convert, inspect
from train.data_commands import build, tokenizer_app
from train.plan_command import load_without_data, plan

app = typer.Typer(
    name="purestep",
    help="Train, decode and convert language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a bug shows its plain traceback
    rich_markup_mode="rich",
)
data_app = typer.Typer(help="Look at training data; tokenise it once.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(tokenizer_app, name="tokenizer")
data_app.command("build")(build)

RECIPE_HELP = "YAML file, run folder, or the name of a shipped recipe."

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help=RECIPE_HELP)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe: optim.learning_rate=1e-4")
]


def main() -> None:
    """Run the command line; exit code 0 done, 1 failed, 2 bad usage, 130 interrupted."""
    quiet()
    try:
        app(prog_name="purestep")
    except UsageError as error:
        _fail(error, 2)
    except RunError as error:
        _fail(error, 1)


def _fail(error: Exception, code: int) -> None:
    print(f"purestep: {error}", file=sys.stderr)
    raise SystemExit(code)


def quiet() -> None:
    """Silence the log lines of libraries that a user can do nothing about; their errors still show."""
    for name, value in {
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "true",
    }.items():
        os.environ.setdefault(name, value)
    if without_devices():
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


DEVICES = ("accel*", "vfio/*", "nvidia*", "dxg")  # in /dev


def without_devices() -> bool:
    """Whether the extra `plan` brought compilers whose devices are not there: jax would look for them, and complain."""
    from importlib.util import find_spec

    both = all(find_spec(name) is not None for name in ("libtpu", "jax_cuda13_plugin"))
    return both and not any(path for name in DEVICES for path in Path("/dev").glob(name))


def _version(wanted: bool) -> bool:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"purestep {version('purestep')}")
        except PackageNotFoundError:
            print("purestep (not installed)")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train, decode and convert language models."""


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    show: Annotated[bool, typer.Option("--show", help="Print the resolved config and stop.")] = False,
    sharding: Annotated[
        bool, typer.Option("--show-sharding", help="Print what of each weight lies on a device, and stop.")
    ] = False,
) -> None:
    """Train by a recipe; the same command resumes.

    purestep train sft_lora.yaml data.train=rows.jsonl optim.learning_rate=1e-4
    """
    from configs.load import dump, load

    run = load(recipe, overrides or [])
    if show:
        print(dump(run), end="")
        return
    if sharding:
        from sharding.processes import connect
        from train.show_sharding import show_sharding

        connect()
        show_sharding(run)
        return
    import absl.logging

    absl.logging.set_verbosity(absl.logging.ERROR)  # orbax tells of every file
    if run.train.rounds:
        from train.rounds import train_rounds as train_run
    else:
        from train.loop import train as train_run

    train_run(run)


@app.command()
def sample(recipe: Recipe, overrides: Overrides = None) -> None:
    """Sample completions of data.train's prompts, score them, keep the best as data to train on; resumes.

    purestep sample online_dpo sample.reward=mine.py:score output=runs/preferences
    """
    from configs.load import load

    run = load(recipe, overrides or [])
    from train.sample import sample as sample_run

    sample_run(run)


@app.command()
def plot(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Run folders; several are drawn over each other.")],
    metric: Annotated[
        list[str] | None, typer.Option("--metric", help="A metric to draw; again for more. Default: what is there.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Default: RUN/curves.png.")
    ] = None,
    smooth: Annotated[int, typer.Option(min=1, help="Mean of so many steps.")] = 1,
) -> None:
    """Draw curves of runs to a PNG: loss, evaluations, learning rate, reward.

    purestep plot runs/a runs/b --metric loss --metric eval_loss --output curves.png
    """
    from train.plot import plot as draw

    first = Path(runs[0])
    file = Path(output) if output else (first if first.is_dir() else first.parent) / "curves.png"
    panels = draw([Path(run) for run in runs], file, metric or (), smooth)
    print(f"{file}: {', '.join(panels)}")


@app.command()
def doctor(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="Its mesh and its output folder.")] = None,
    overrides: Overrides = None,
    json: Annotated[bool, typer.Option("--json", help="JSON on standard output instead of text.")] = False,
) -> None:
    """Check versions, devices, memory, disk; measure matrix products and collectives. Exit code 1: something is wrong.

    purestep doctor pretrain_8b_pod mesh.tensor=4
    """
    from pathlib import Path

    run = load_without_data(recipe, overrides or []) if recipe is not None else None
    from train.doctor import as_json, describe, examine

    findings = examine(run.mesh.shape if run else {}, Path(run.output if run else "runs"))
    if json:
        from json import dumps

        print(dumps(as_json(findings)))
    else:
        print(describe(findings))
    if not all(one.ok for one in findings):
        raise typer.Exit(1)


@data_app.command("show")
def data_show(recipe: Recipe, overrides: Overrides = None) -> None:
    """Print the first batch as the model will see it: tokens, roles, which of them carry loss."""
    from configs.load import load

    run = load(recipe, overrides or [])
    from train.preflight import show_data

    show_data(run)


for command in (plan, generate, score, chat, convert, inspect):
    app.command()(command)
app.command("eval")(evaluate)


if __name__ == "__main__":
    main()
