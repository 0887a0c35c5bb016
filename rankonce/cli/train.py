"""``rankonce train``: run a recipe, from a checkpoint or from scratch."""

from pathlib import Path
from typing import Annotated

import typer

from rankonce.cli.options import TaskFileOption, is_first_process, quiet_transformers
from rankonce.errors import TrainingError


def train(
    recipe: Annotated[str, typer.Argument(help="ml1m or ml-small.")],
    data: Annotated[Path, typer.Option(exists=True, help="Folder of the dataset.")],
    out: Annotated[
        Path,
        typer.Option(file_okay=False, help="Folder of the model; a run found there goes on."),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|ID", help="Checkpoint to start from.", show_default="from scratch"
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Size from scratch: 1m to 150m.", show_default="the recipe's"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of everything.", show_default="the recipe's")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="STAGE.NAME=VALUE",
            help="Change a setting of a stage, e.g. finetune.epochs=2; may be repeated.",
        ),
    ] = None,
    task_file: TaskFileOption = None,
) -> None:
    """Run the stages of a recipe; killed anywhere, it goes on with the same bits.

    rankonce train ml1m --data ml1m/ --out runs/ml1m
    """
    from dataclasses import replace

    from rankonce.prompts.tasks import load_task
    from rankonce.training.recipes import RECIPES, run_recipe

    if model is not None and size is not None:
        raise typer.BadParameter("is for training from scratch", param_hint="--size")
    quiet_transformers()
    if recipe not in RECIPES:
        raise TrainingError(f"recipe: should be one of {', '.join(RECIPES)}, is {recipe!r}")
    chosen = RECIPES[recipe]()
    if seed is not None:
        chosen = chosen.with_seed(seed)
    chosen = replace(chosen.with_settings(settings or ()), size=size or chosen.size)
    tasks = [load_task(path) for path in task_file or ()]
    run_recipe(chosen, data, out, model=model, tasks=tasks)
    if is_first_process():
        typer.echo(f"model: {out}", err=True)
