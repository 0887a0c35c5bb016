"""``rankonce bench rungs`` and ``bench pruning``: checkpoints of many sizes side by side."""

import json
from pathlib import Path
from typing import Annotated

import typer

from rankonce.cli.options import DeviceOption, PrecisionOption, TaskFileOption, quiet_transformers


def rungs(
    folders: Annotated[
        list[Path], typer.Argument(exists=True, file_okay=False, help="Checkpoints.")
    ],
    data: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="JSON lines of labelled requests.")
    ],
    rounds: Annotated[int, typer.Option(min=1, help="Each times every checkpoint once.")] = 5,
    max_tokens_per_pass: Annotated[int, typer.Option(min=1, help="Of a timed pass.")] = 4096,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    task_file: TaskFileOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON with full precision.")] = False,
) -> None:
    """Measure size, memory, speed and quality of checkpoints in one run.

    rankonce bench rungs runs/teacher runs/student --data examples.jsonl --json
    """
    from rankonce.benchmarks.rungs import RungsOptions, describe_rungs, measure_rungs
    from rankonce.prompts.tasks import load_task
    from rankonce.training.data import read_examples

    quiet_transformers()
    options = RungsOptions(
        rounds=rounds,
        device=device,
        precision=precision,
        max_tokens_per_pass=max_tokens_per_pass,
        tasks=tuple(load_task(path) for path in task_file or ()),
    )
    record = measure_rungs(folders, read_examples(data), options)
    typer.echo(json.dumps(record, indent=1) if as_json else describe_rungs(record))


def pruning(
    data: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Folder of MovieLens latest-small.")
    ],
    keep: Annotated[
        list[float] | None,
        typer.Option(help="Share of the parameters; give several.", show_default="0.6, 0.3"),
    ] = None,
    calibration: Annotated[int, typer.Option(min=1, help="Examples to calibrate with.")] = 60,
    valid: Annotated[int, typer.Option(min=1, help="Examples to measure on.")] = 300,
    output: Annotated[Path, typer.Option(dir_okay=False, help="JSON.")] = Path(
        "results/pruning.json"
    ),
) -> None:
    """Prune the embedded ranker in every way and measure it without any training."""
    from rankonce.benchmarks.pruning import PruningStudy, describe_pruning, measure_pruning

    quiet_transformers()
    study = PruningStudy(
        data=data,
        keeps=tuple(keep or (0.6, 0.3)),
        num_calibration=calibration,
        num_valid=valid,
        output=output,
    )
    typer.echo(describe_pruning(measure_pruning(study)))
