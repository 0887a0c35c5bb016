"""``rankonce bench training`` and its kin: what training costs, and what its settings change."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from rankonce.cli.options import DeviceOption, quiet_transformers


def adapters(
    size: Annotated[str, typer.Option(help="Of the backbone: 1m to 150m.")] = "1m",
    examples: Annotated[int, typer.Option(min=20, help="Of each task.")] = 100,
    epochs: Annotated[int, typer.Option(min=1, help="Of the backbone.")] = 4,
    adapter_epochs: Annotated[int, typer.Option(min=1, help="Of each adapter.")] = 2,
    rank: Annotated[int, typer.Option(min=1, help="Of each adapter.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of everything.")] = 0,
    output: Annotated[Path, typer.Option(help="JSON.")] = Path("results/adapters.json"),
) -> None:
    """Compare an adapter per domain with the backbone that they share, on simulated platforms."""
    from rankonce.benchmarks.adapters import StudyOptions, run_study

    quiet_transformers()
    options = StudyOptions(
        size=size,
        num_examples=examples,
        epochs=epochs,
        adapter_epochs=adapter_epochs,
        rank=rank,
        seed=seed,
        output=output,
    )
    typer.echo(run_study(options))


def training(
    size: Annotated[str, typer.Option(help="Of the model, 1m to 150m.")] = "3m",
    candidates: Annotated[int, typer.Option(min=1, help="Of a member, up to 100.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="Every arm is timed once a round.")] = 5,
    device: DeviceOption = None,
    output: Annotated[Path, typer.Option(dir_okay=False, help="JSON.")] = Path(
        "results/training-packed.json"
    ),
) -> None:
    """Time training with many candidates in a sequence beside one prompt a candidate."""
    import torch

    from rankonce.benchmarks.training import TrainingOptions, describe_training, measure_training

    options = TrainingOptions(
        size=size,
        num_candidates=candidates,
        rounds=rounds,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        output=output,
    )
    typer.echo(describe_training(measure_training(options)))


def training_options(
    task: Annotated[str, typer.Option(help="Of a simulated platform.")] = "job-apply",
    train: Annotated[int, typer.Option(min=1, help="Requests to learn from.")] = 300,
    valid: Annotated[int, typer.Option(min=1, help="Requests to measure on.")] = 150,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the requests.")] = 2,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every arm.")] = 3,
    output: Annotated[Path, typer.Option(dir_okay=False, help="JSON.")] = Path(
        "results/training-options.json"
    ),
    record: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Train nothing, print this record."),
    ] = None,
) -> None:
    """Measure what dropout by layer, SGD at the end and another schedule change, and memory."""
    from rankonce.benchmarks.training_options import (
        OptionsBenchmark,
        describe_options,
        measure_options,
    )

    if record is not None:
        typer.echo(describe_options(json.loads(record.read_text())))
        return
    quiet_transformers()
    default = OptionsBenchmark()
    options = replace(
        default,
        task=task,
        num_train=train,
        num_valid=valid,
        config=replace(default.config, epochs=epochs),
        seeds=tuple(range(seeds)),
        output=output,
    )
    typer.echo(describe_options(measure_options(options)))


def scaling(
    task: Annotated[str, typer.Option(help="Of a simulated platform.")] = "song-newcomer",
    size: Annotated[
        list[str] | None,
        typer.Option(help="Of the grid; give several.", show_default="0.07m, 0.16m, 0.4m"),
    ] = None,
    train: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Requests; give several.", show_default="400, 800, 1600"),
    ] = None,
    predict_size: Annotated[str, typer.Option(help="Of the point that is predicted.")] = "0.4m",
    predict_train: Annotated[int, typer.Option(min=1, help="Its requests.")] = 3200,
    rate: Annotated[
        list[float] | None,
        typer.Option(
            help="Learning rate that every size tries; give several.",
            show_default="0.0015, 0.003, 0.006",
        ),
    ] = None,
    trial_train: Annotated[int, typer.Option(min=1, help="Requests of a trial.")] = 800,
    valid: Annotated[int, typer.Option(min=1, help="Requests to measure on.")] = 250,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the requests.")] = 1,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every point.")] = 2,
    output: Annotated[
        Path, typer.Option(dir_okay=False, help="JSON; a study that was cut short goes on.")
    ] = Path("results/scaling.json"),
    plot: Annotated[Path | None, typer.Option(dir_okay=False, help="Picture, .png.")] = None,
    record: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Train nothing, print this record."),
    ] = None,
) -> None:
    """Fit a law of loss by size and data, predict a point with it, then run that point."""
    from rankonce.benchmarks.scaling import ScalingStudy, measure_scaling
    from rankonce.benchmarks.scaling_report import check_picture, describe_scaling, plot_scaling

    if plot is not None:
        check_picture()
    if record is not None:
        found = json.loads(record.read_text())
    else:
        quiet_transformers()
        default = ScalingStudy()
        study = ScalingStudy(
            task=task,
            sizes=tuple(size or default.sizes),
            amounts=tuple(train or default.amounts),
            held_out=(predict_size, predict_train),
            rates=tuple(rate or default.rates),
            trial_amount=trial_train,
            num_valid=valid,
            config=replace(default.config, epochs=epochs),
            seeds=tuple(range(seeds)),
            output=output,
        )
        found = measure_scaling(study)
    if plot is not None:
        plot_scaling(plot, found)
    typer.echo(describe_scaling(found))
