"""``rankonce train``: run a recipe, from a checkpoint or from scratch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rankonce.cli.options import TaskFileOption, quiet_transformers
from rankonce.cli.training_options import (
    RunFolderOption,
    StartModelOption,
    check_start,
    size_option,
    takes_adapter,
    tell_model,
)

if TYPE_CHECKING:
    from rankonce.training.adapters import AdapterConfig


@takes_adapter
def train(
    recipe: Annotated[str, typer.Argument(help="ml1m, ml1m-alone, ml-small or multitask.")],
    data: Annotated[Path, typer.Option(exists=True, help="Folder of the dataset.")],
    out: RunFolderOption,
    model: StartModelOption = None,
    size: Annotated[str | None, size_option(default="the recipe's")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of everything.", show_default="the recipe's")
    ] = None,
    stage_settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="STAGE.NAME=VALUE",
            help="Change a setting of a stage, e.g. finetune.epochs=2; may be repeated.",
        ),
    ] = None,
    task_file: TaskFileOption = None,
    adapter: "AdapterConfig | None" = None,
) -> None:
    """Run the stages of a recipe; killed anywhere, it goes on with the same bits.

    rankonce train ml1m --data ml1m/ --out runs/ml1m
    """
    from dataclasses import replace
    from functools import partial

    from rankonce.evaluation.held_out import measure_held_out
    from rankonce.prompts.tasks import load_task
    from rankonce.training.recipes import find_recipe, run_recipe

    check_start(model, size)
    quiet_transformers()
    chosen = find_recipe(recipe)
    if seed is not None:
        chosen = chosen.with_seed(seed)
    chosen = chosen.with_settings(stage_settings or ())
    chosen = replace(chosen, size=size or chosen.size)
    tasks = [load_task(path) for path in task_file or ()]
    run_recipe(
        chosen,
        data,
        out,
        model=model,
        tasks=tasks,
        adapter=adapter,
        evaluate=partial(measure_held_out, tasks=tasks),
    )
    tell_model(out)
