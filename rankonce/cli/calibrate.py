"""``rankonce calibrate``: fit what a model's scores mean, and store it beside the model."""

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rankonce.cli.options import (
    ChatOption,
    DeviceOption,
    KeepOption,
    MaxTokensPerPassOption,
    PrecisionOption,
    TaskFileOption,
    TrustRemoteCodeOption,
    load_ranker,
)
from rankonce.cli.request_files import is_parquet

if TYPE_CHECKING:
    from rankonce.records import TrainingExample


class CalibrationMethod(StrEnum):
    """The methods of ``rankonce.calibration``."""

    TEMPERATURE = "temperature"
    PLATT = "platt"
    ISOTONIC = "isotonic"


def calibrate(
    model: Annotated[
        Path,
        typer.Option(exists=True, file_okay=False, help="Folder of a model, or of an adapter."),
    ],
    data: Annotated[
        Path,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="JSON lines of requests with labels, as finetune takes; or Parquet rows, as "
            "evaluate takes, which need --train and --items.",
        ),
    ],
    method: Annotated[
        CalibrationMethod, typer.Option(help="The form of the function.")
    ] = CalibrationMethod.PLATT,
    train: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="With rows: those whose labels are known."),
    ] = None,
    items: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="With rows: item_id, title, genres."),
    ] = None,
    held_out: Annotated[
        float,
        typer.Option(min=0.05, max=0.95, help="Share of requests, or members, to measure on."),
    ] = 0.3,
    seed: Annotated[int, typer.Option(min=0, help="Draws them.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="JSON with full precision.")] = False,
    task_file: TaskFileOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    keep: KeepOption = None,
    max_tokens_per_pass: MaxTokensPerPassOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    chat: ChatOption = None,
) -> None:
    """Fit probabilities to labels and store the fit beside the model, by task.

    The order of candidates stays as it is. What is printed was measured on requests that were held
    out.

    rankonce calibrate --model DIR --data examples.jsonl --method isotonic
    """
    from rich.console import Console
    from rich.table import Table

    from rankonce.calibration import write_calibrations
    from rankonce.environment import describe_environment
    from rankonce.evaluation.calibration import calibrate_task, score_labels

    examples, groups = _read(data, train, items)
    ranker = load_ranker(
        str(model),
        task_files=task_file,
        device=device,
        precision=precision,
        keep=keep,
        max_tokens_per_pass=max_tokens_per_pass,
        trust_remote_code=trust_remote_code,
        chat=chat,
        calibrate=False,
    )
    fits = {
        name: calibrate_task(scored, method=method.value, held_out=held_out, seed=seed)
        for name, scored in score_labels(ranker, examples, groups).items()
    }
    path = write_calibrations(model, fits)
    if as_json:
        record = {
            "method": method.value,
            "held_out": held_out,
            "seed": seed,
            "tasks": {name: fit.model_dump() for name, fit in fits.items()},
            "environment": describe_environment(),
        }
        typer.echo(json.dumps(record, indent=2))
    else:
        table = Table("task", "rows fitted", "rows held out", "", "before", "after")
        for name, fit in fits.items():
            rows = [f"{fit.measured[key]:,.0f}" for key in ("num_fitted", "num_held_out")]
            for key in ("log_loss", "calibration_error"):
                values = [f"{fit.measured[f'{key}_{when}']:.4f}" for when in ("before", "after")]
                table.add_row(name, *rows, key.replace("_", " "), *values)
        Console(width=100).print(table)
    typer.echo(f"{method.value}: {path}", err=True)


def _read(
    data: Path, train: Path | None, items: Path | None
) -> tuple[list["TrainingExample"], list[int] | None]:
    """Read labelled requests, and whose they are where that is known."""
    if not is_parquet(data):
        from rankonce.training.data import read_examples

        return read_examples(data), None
    if train is None or items is None:
        missing = "--train" if train is None else "--items"
        raise typer.BadParameter("is needed with Parquet rows", param_hint=missing)
    from rankonce.datasets.movielens import movie_examples, movie_rows, read_rows

    movies = movie_rows(read_rows(data), read_rows(items), train=read_rows(train))
    examples = list(movie_examples(movies, candidates_per_example=500, shared_history=False))
    members = movies.rows["user_id"].to_list()
    return examples, [members[int(str(one.request.candidates[0].id))] for one in examples]
