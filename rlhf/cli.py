"""The command line: `rlhf train`, `rlhf validate`, and the commands of `rlhf.serving.commands`.

Here: reading arguments and reporting a recipe's mistakes. Not here: running (`rlhf.runtime.run`), which is imported,
with torch, only once the recipe is known to be valid.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf import __version__
from rlhf.serving import commands

if TYPE_CHECKING:
    from rlhf.recipe.load import Plan
    from rlhf.recipe.schema import Recipe

INVALID_RECIPE = 2  # exit code

_OPTIONS = {"ignore_unknown_options": True}  # `--trainer.lr=1` reaches the recipe's own error report
app = typer.Typer(
    help="Train language models with feedback.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file (.yaml).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values to change: trainer.lr=2e-6")
]


@app.command(context_settings=_OPTIONS)
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Move an earlier run of this name aside and start again.")
    ] = False,
) -> None:
    """Run a recipe. The same command again continues a run that was interrupted."""
    plan = _load(recipe, overrides)
    _exit_if_nothing_can_run(plan, fresh=fresh)
    from rlhf.runtime.run import run_plan

    sys.exit(run_plan(plan, fresh=fresh))


@app.command(context_settings=_OPTIONS)
def validate(
    recipe: RecipePath,
    overrides: Overrides = None,
    show: Annotated[
        bool, typer.Option("--show", help="Print the recipe with every default filled in.")
    ] = False,
) -> None:
    """Check a recipe and what it names, and print what it would run. Loads no model, runs no code of yours."""
    plan = _load(recipe, overrides)
    if show:
        from rlhf.recipe.load import dump_plan

        typer.echo(dump_plan(plan), nl=False)
        return
    typer.echo(f"{recipe} is valid")
    for stage in plan.stages:
        typer.echo(f"  {stage.name}: {_summary(stage.recipe)}")


for _command in (commands.serve, commands.generate, commands.chat):
    app.command()(_command)


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"rlhf {__version__}")
        raise typer.Exit()


def main() -> None:
    app(prog_name="rlhf")


def _exit_if_nothing_can_run(plan: Plan, *, fresh: bool) -> None:
    """Answer from the run directory's files, where they tell that there is nothing to run, or that another run is there."""
    from rlhf.console import Console
    from rlhf.runtime.earlier import finished_message, is_finished, run_directory
    from rlhf.runtime.lock import RunInUseError, check_not_in_use

    try:
        if not fresh and is_finished(plan):
            Console().say(finished_message(run_directory(plan)))
            raise typer.Exit()
        check_not_in_use(run_directory(plan))
    except (ValueError, RunInUseError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


def _load(recipe: str, overrides: list[str] | None) -> Plan:
    from rlhf.recipe.load import RecipeError, load_plan
    from rlhf.recipe.preflight import look_up

    try:
        plan = load_plan(recipe, overrides or (), look_up=look_up)
    except RecipeError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(INVALID_RECIPE) from None
    for warning in plan.warnings:
        typer.echo(f"warning: {warning}", err=True)
    return plan


def _summary(recipe: Recipe) -> str:
    trainer = recipe.trainer
    count, unit = (trainer.steps, "step") if trainer.steps else (trainer.epochs, "epoch")
    length = f"{count} {unit}{'s' if count != 1 else ''}"
    groups = "; ".join(
        f"{name} = {', '.join(group.roles)} on {group.num_processes} {'GPU' if group.gpus else 'process'}"
        + ("es" if group.num_processes > 1 and not group.gpus else "s" if group.gpus > 1 else "")
        for name, group in recipe.groups.items()
    )
    return f"{recipe.method}, {length} of {trainer.prompts_per_step} prompts; {groups}"


if __name__ == "__main__":
    main()
