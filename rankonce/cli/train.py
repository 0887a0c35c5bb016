"""``rankonce train``: run a recipe, from a checkpoint or from scratch."""

from pathlib import Path
from typing import Annotated

import typer

from rankonce.cli.options import TaskFileOption, is_first_process, quiet_transformers
from rankonce.cli.training_options import (
    AdapterNameOption,
    LoraAlphaOption,
    LoraDropoutOption,
    LoraRankOption,
    LoraTargetOption,
    QloraOption,
    RunFolderOption,
    StartModelOption,
    check_start,
    read_adapter_config,
    size_option,
)
from rankonce.errors import TrainingError


def train(
    recipe: Annotated[str, typer.Argument(help="ml1m, ml1m-alone or ml-small.")],
    data: Annotated[Path, typer.Option(exists=True, help="Folder of the dataset.")],
    out: RunFolderOption,
    model: StartModelOption = None,
    size: Annotated[str | None, size_option(default="the recipe's")] = None,
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
    lora_rank: LoraRankOption = None,
    lora_alpha: LoraAlphaOption = None,
    lora_dropout: LoraDropoutOption = None,
    lora_target: LoraTargetOption = None,
    qlora: QloraOption = False,
    adapter_name: AdapterNameOption = None,
) -> None:
    """Run the stages of a recipe; killed anywhere, it goes on with the same bits.

    rankonce train ml1m --data ml1m/ --out runs/ml1m
    """
    from dataclasses import replace
    from functools import partial

    from rankonce.evaluation.held_out import measure_held_out
    from rankonce.prompts.tasks import load_task
    from rankonce.training.recipes import RECIPES, run_recipe

    check_start(model, size)
    adapter = read_adapter_config(
        lora_rank,
        alpha=lora_alpha,
        dropout=lora_dropout,
        targets=lora_target,
        qlora=qlora,
        name=adapter_name,
    )
    quiet_transformers()
    if recipe not in RECIPES:
        raise TrainingError(f"recipe: should be one of {', '.join(RECIPES)}, is {recipe!r}")
    chosen = RECIPES[recipe]()
    if seed is not None:
        chosen = chosen.with_seed(seed)
    chosen = chosen.with_settings(settings or ())
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
    if is_first_process():
        typer.echo(f"model: {out}", err=True)
