"""`purestep plan`: what a recipe's step needs on hardware that is not there, or what a compute budget buys."""

from typing import Annotated

import typer

from configs.errors import UsageError

BUDGET, TARGET = "A compute budget", "A recipe on a target"


def plan(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="YAML file, run folder, or a shipped recipe's name.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe: mesh.tensor=4")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="CHIP:SHAPE", help="As v5p:4x4x4, h200:2x8, cpu:8.", rich_help_panel=TARGET),
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Find what fits and is fastest.", rich_help_panel=TARGET)
    ] = False,
    decode: Annotated[
        str | None,
        typer.Option(metavar="ROWSxLENGTH", help="Plan a decoding step of such a cache.", rich_help_panel=TARGET),
    ] = None,
    tokens: Annotated[
        float | None, typer.Option(min=1, help="Tokens to train on: time and cost.", rich_help_panel=TARGET)
    ] = None,
    price: Annotated[
        float | None, typer.Option(min=0, help="Of a chip-hour, in any money.", rich_help_panel=TARGET)
    ] = None,
    compute_budget: Annotated[
        str | None,
        typer.Option(metavar="FLOPS", help="As 1e21, or 8xH100:24h (m, h, d).", rich_help_panel=BUDGET),
    ] = None,
    tokens_per_parameter: Annotated[
        float, typer.Option(min=1e-3, help="Tokens for each parameter.", rich_help_panel=BUDGET)
    ] = 20.0,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens in an optimizer step.", rich_help_panel=BUDGET)
    ] = 524288,
    peak_flops: Annotated[
        float | None,
        typer.Option(min=1.0, help="FLOP/s of all devices together at best: tells the time.", rich_help_panel=BUDGET),
    ] = None,
    mfu: Annotated[
        float, typer.Option(min=1e-4, max=1.0, help="Share of the peak that is reached.", rich_help_panel=BUDGET)
    ] = 0.4,
    json: Annotated[bool, typer.Option("--json", help="JSON on standard output instead of text.")] = False,
) -> None:
    """Plan a recipe for hardware that is not there: memory, collectives, time; or how to spend a compute budget.

    purestep plan pretrain_8b_pod --target v5p:4x4x4

    purestep plan --compute-budget 1e21 --peak-flops 8e15
    """
    if compute_budget is None and target is None:
        raise UsageError(
            "plan needs RECIPE --target, as `purestep plan pretrain_8b_pod --target v5p:4x4x4`, or --compute-budget, "
            "as `purestep plan --compute-budget 1e21`"
        )
    if compute_budget is not None:
        if target is not None or recipe is not None:
            raise UsageError("--compute-budget plans no recipe: leave out RECIPE and --target, or --compute-budget")
        _budget(compute_budget, tokens_per_parameter, batch_tokens, peak_flops, mfu, json)
    else:
        if recipe is None:
            raise UsageError(f"--target {target} plans a RECIPE: a file, a run folder or a shipped recipe's name")
        _recipe(recipe, overrides or [], str(target), search, decode, tokens, price, json)


def _budget(
    budget: str, tokens_per_parameter: float, batch_tokens: int, peak_flops: float | None, mfu: float, json: bool
) -> None:
    from train.plan import describe, propose, read_budget

    made = propose(read_budget(budget, mfu), tokens_per_parameter, batch_tokens, peak_flops, mfu)
    if json:
        from json import dumps

        print(dumps(made))
    else:
        print(describe(made))


def _recipe(
    recipe: str,
    overrides: list[str],
    text: str,
    search: bool,
    decode: str | None,
    tokens: float | None,
    price: float | None,
    json: bool,
) -> None:
    from train.planner.targets import parse_target, set_environment

    target = parse_target(text)
    run = load_without_data(recipe, overrides)
    set_environment(target)  # before jax starts
    from rich.console import Console

    from train.planner.plan import dumps, make_plan
    from train.planner.report import show

    made = make_plan(run, target, tokens, price, search, decode)
    if json:
        print(dumps(made))
    else:
        show(made, Console())


def load_without_data(recipe: str, overrides: list[str]):
    """The recipe, for what reads no data: that which it does not name is stood in for."""
    from configs.load import load

    given = {text.partition("=")[0].strip() for text in overrides}
    if "data.train" in given:
        return load(recipe, overrides)
    try:
        return load(recipe, overrides)
    except UsageError as error:
        if "data.train" not in str(error):
            raise
    return load(recipe, [*overrides, "data.train=unread"])
