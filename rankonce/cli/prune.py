"""``rankonce prune``: a checkpoint of smaller sizes that loads as any other."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from rankonce.cli.options import TaskFileOption, quiet_transformers


class Measure(StrEnum):
    """The names of ``rankonce.distillation.importance.IMPORTANCES``, which imports torch."""

    ACTIVATION = "activation"
    TAYLOR = "taylor"
    RANDOM = "random"


_ROWS = {
    "parameters": "parameters",
    "num_hidden_layers": "layers",
    "intermediate_size": "MLP neurons of a layer",
    "num_attention_heads": "query heads",
    "num_key_value_heads": "key/value heads",
    "hidden_size": "hidden size",
    "vocab_size": "vocabulary",
    "flop_per_token": "FLOP a token, layers",
}


def prune(
    model: Annotated[str, typer.Argument(metavar="FOLDER|ID", help="Checkpoint to prune.")],
    data: Annotated[
        list[Path],
        typer.Option(
            exists=True,
            help="JSON lines of requests, with labels, to calibrate with; a recipe's folder.",
        ),
    ],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder of the smaller checkpoint.")],
    keep: Annotated[
        float | None, typer.Option(help="Share of the parameters to keep, such as 0.67.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Layers to keep.")] = None,
    intermediate_size: Annotated[
        int | None, typer.Option(help="MLP neurons to keep in every layer.")
    ] = None,
    kv_heads: Annotated[
        int | None, typer.Option(help="Key/value heads to keep, with their query heads.")
    ] = None,
    hidden_size: Annotated[int | None, typer.Option(help="Embedding width to keep.")] = None,
    drop_unused_vocabulary: Annotated[
        bool,
        typer.Option("--drop-unused-vocabulary", help="Cut tokens that no prompt of --data has."),
    ] = False,
    importance: Annotated[
        Measure, typer.Option(help="What says which parts stay.")
    ] = Measure.ACTIVATION,
    reconstruct: Annotated[
        bool,
        typer.Option(
            "--reconstruct",
            help="Choose heads and neurons by least squares and fit what stays anew.",
        ),
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Go the way to --keep in so many steps, with training between."),
    ] = None,
    step: Annotated[int | None, typer.Option(min=1, help="Which of the steps this is.")] = None,
    whole: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|ID",
            help="Model before the first step, whose share --keep is.",
            show_default="the model, at the first step",
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Calibrate with what a recipe's last stage learns.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the calibration examples drawn.")] = 0,
    task_file: TaskFileOption = None,
) -> None:
    """Cut layers, heads, neurons, channels and vocabulary rows; the same width in every layer.

    rankonce prune runs/teacher --data calibration.jsonl --out pruned --keep 0.67
    rankonce prune runs/half-way --whole runs/teacher --keep 0.5 --step 2 --steps 2 \
        --data calibration.jsonl --out pruned
    """
    if recipe is None and (folders := [path for path in data if path.is_dir()]):
        raise typer.BadParameter(f"{folders[0]} is a folder, for --recipe", param_hint="--data")
    if recipe is not None and len(data) > 1:
        raise typer.BadParameter("should be the recipe's folder alone", param_hint="--data")
    from rich.console import Console

    from rankonce.distillation.pruning import PruneConfig, prune_checkpoint, step_of
    from rankonce.prompts.tasks import load_task
    from rankonce.training.data import read_examples
    from rankonce.training.recipes import find_recipe
    from rankonce.training.stages import first_examples

    quiet_transformers()
    config = PruneConfig(
        keep=keep,
        num_hidden_layers=layers,
        intermediate_size=intermediate_size,
        num_key_value_heads=kv_heads,
        hidden_size=hidden_size,
        drop_unused_vocabulary=drop_unused_vocabulary,
        importance=importance.value,
        reconstruct=reconstruct,
        seed=seed,
    )
    if steps is not None or step is not None or whole is not None:
        if steps is None or step is None or keep is None:
            raise typer.BadParameter(
                "are needed together: --keep, --steps and --step", param_hint="--steps"
            )
        if step > 1 and whole is None:
            raise typer.BadParameter(
                "should name the model before the first step, whose share --keep is",
                param_hint="--whole",
            )
        config = step_of(whole or model, config, step=step, steps=steps)
    tasks = [load_task(path) for path in task_file or ()]
    if recipe is None:
        examples = [example for path in data for example in read_examples(path)]
    else:
        examples = first_examples(find_recipe(recipe).stages[-1], data[0], tasks)
    record = prune_checkpoint(model, out, config, examples, tasks=tasks)
    Console(width=100).print(_table(record))
    typer.echo(f"model: {out}", err=True)


def _table(record: Any) -> Any:
    from rich.table import Table

    table = Table("")
    for name in ("before", "after", "kept"):
        table.add_column(name, justify="right")
    for key, title in _ROWS.items():
        before, after = record["before"][key], record["after"][key]
        table.add_row(title, f"{before:,.0f}", f"{after:,.0f}", f"{after / before:.1%}")
    return table
