"""``rankonce train``: run a recipe, from a checkpoint or from scratch."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from rankonce.cli.options import TaskFileOption, quiet_transformers
from rankonce.errors import TrainingError


def train(
    recipe: Annotated[str, typer.Argument(help="ml1m, ml-small or examples.")],
    data: Annotated[
        Path,
        typer.Option(exists=True, help="Folder of the dataset; for examples a JSON lines file."),
    ],
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
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the data.", show_default="the recipe's")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(min=0.0, help="The peak.", show_default="the recipe's")
    ] = None,
    max_tokens_per_pass: Annotated[
        int | None,
        typer.Option(min=1, help="Bounds the memory of a pass.", show_default="the recipe's"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of everything.", show_default="the recipe's")
    ] = None,
    task_file: TaskFileOption = None,
) -> None:
    """Fine-tune a ranker at its score rows, many candidates of a member in one sequence.

    rankonce train ml1m --data ml1m/ --out runs/ml1m
    """
    from rankonce.prompts.tasks import load_task
    from rankonce.training.recipes import RECIPES, run_recipe

    if model is not None and size is not None:
        raise typer.BadParameter("is for training from scratch", param_hint="--size")
    quiet_transformers()
    if recipe not in RECIPES:
        raise TrainingError(f"recipe: should be one of {', '.join(RECIPES)}, is {recipe!r}")
    chosen = RECIPES[recipe]()
    given: dict[str, Any] = {
        "epochs": epochs,
        "learning_rate": learning_rate,
        "max_tokens_per_pass": max_tokens_per_pass,
        "seed": seed,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    chosen = replace(chosen, config=replace(chosen.config, **changes), size=size or chosen.size)
    tasks = [load_task(path) for path in task_file or ()]
    run_recipe(chosen, data, out, model=model, tasks=tasks)
    typer.echo(f"model: {out}", err=True)
