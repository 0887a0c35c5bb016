"""``rankonce pretrain``: first or continued pretraining on a platform's texts."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

from rankonce.cli.options import is_first_process, quiet_transformers
from rankonce.cli.training_options import (
    LearningRateOption,
    PassTokensOption,
    RunFolderOption,
    SeedOption,
    SetOption,
    StartModelOption,
    change_config,
    check_start,
    size_option,
    tell_model,
)


def pretrain(
    data: Annotated[
        list[str],
        typer.Option(
            metavar="PATH[=WEIGHT]",
            help="Text, JSON lines or Parquet file, or a folder; the weight is how often an epoch "
            "reads it, 1 by default; may be repeated.",
        ),
    ],
    out: RunFolderOption,
    valid: Annotated[
        list[Path] | None,
        typer.Option(exists=True, help="The same, held out: perplexity of the result."),
    ] = None,
    model: StartModelOption = None,
    size: Annotated[str | None, size_option(default="10m")] = None,
    max_steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Read the data as a stream, anew when it ends, for so many steps."
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Passes over the data, whose tokens are held in memory.", show_default="1"
        ),
    ] = None,
    tokens_per_step: Annotated[int, typer.Option(min=1, help="Learnt tokens of a step.")] = 16_384,
    max_tokens_per_document: Annotated[
        int, typer.Option(min=2, help="A longer document is cut into pieces.")
    ] = 2048,
    max_tokens_per_pass: PassTokensOption = 16_384,
    learning_rate: LearningRateOption = 1e-3,
    schedule: Annotated[
        Literal["cosine", "warmup-stable-decay"],
        typer.Option(help="How the learning rate falls."),
    ] = "cosine",
    until: Annotated[
        datetime | None,
        typer.Option(
            formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"],
            help="UTC; events and ratings from then on are left out.",
        ),
    ] = None,
    seed: SeedOption = 0,
    settings: SetOption = None,
) -> None:
    """Pretrain on texts: plain ones, items and histories in words.

    rankonce pretrain --data ml-1m/ --data notes.jsonl=0.5 --out runs/base
    """
    from rankonce.training.loop import TrainConfig
    from rankonce.training.pretraining import PretrainingData
    from rankonce.training.pretraining import pretrain as run

    check_start(model, size)
    if max_steps is not None and epochs is not None:
        raise typer.BadParameter("takes the place of --epochs", param_hint="--max-steps")
    weights = dict(map(read_weight, data))
    if len(weights) < len(data):
        raise typer.BadParameter("should name each file once", param_hint="--data")
    quiet_transformers()
    measured = run(
        PretrainingData(
            weights=weights,
            valid=valid or (),
            max_tokens_per_document=max_tokens_per_document,
            until=until.replace(tzinfo=UTC).timestamp() if until else None,
        ),
        out,
        config=change_config(
            TrainConfig(buffer_size=2048),
            settings,
            epochs=epochs or 1,
            max_steps=max_steps,
            targets_per_step=tokens_per_step,
            max_tokens_per_pass=max_tokens_per_pass,
            learning_rate=learning_rate,
            schedule=schedule,
            seed=seed,
        ),
        size=size or "10m",
        model=model,
        report=lambda line: typer.echo(line, err=True),
    )
    if measured is not None and is_first_process():
        typer.echo(json.dumps(measured))
    tell_model(out)


def read_weight(text: str) -> tuple[Path, float]:
    """Read ``PATH`` or ``PATH=WEIGHT``; a path may hold = itself."""
    path, is_given, weight = text.rpartition("=")
    try:
        return (Path(path), float(weight)) if is_given else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0
