"""``rankonce ladder``: smaller rankers rung by rung, each taught by one above it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankonce.cli.options import is_first_process, quiet_transformers
from rankonce.cli.training_options import RunFolderOption

if TYPE_CHECKING:
    from rankonce.distillation.ladder import Ladder

# Requests that models are timed on, at most.
_TIMED = 100
_SPEED = {
    "latency_ms": "pass p50, ms",
    "tokens_per_s": "tokens/s",
    "candidates_per_s": "candidates/s",
    "peak_memory_mb": "peak memory, MB",
}


def ladder(
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="The rungs, in YAML or TOML.")
    ],
    out: RunFolderOption,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change what the file says, e.g. rungs.small.size=0.4m; may be repeated.",
        ),
    ] = None,
    rounds: Annotated[
        int,
        typer.Option(
            min=0,
            help="Time all models side by side on held-out requests so often; 0 leaves it out.",
        ),
    ] = 3,
) -> None:
    """Run the rungs of a ladder and print what each is, how good and how fast; killed, it goes on.

    rankonce ladder ladder.yaml --out runs/ladder
    """
    from rankonce.distillation.ladder import read_ladder, run_ladder
    from rankonce.training.checkpoint import write_json

    quiet_transformers()
    read = read_ladder(file, settings or ())
    rows = run_ladder(read, out)
    if is_first_process():
        path = out / "ladder.json"
        if rounds:
            timing = _time(read, rows, rounds)
            write_json(path, {**json.loads(path.read_text()), "rungs": rows, "timing": timing})
        typer.echo("\n".join(write_table(rows)))
        typer.echo(f"table: {path}", err=True)


def _time(ladder: "Ladder", rows: list[dict[str, Any]], rounds: int) -> dict[str, Any]:
    """Add to every row what ``rankonce bench rungs`` says of its model's speed and memory.

    Returns:
        How it was timed; empty where the ladder has no held-out requests.
    """
    from rankonce.benchmarks.rungs import RungsOptions, measure_rungs
    from rankonce.distillation.ladder import held_out_examples
    from rankonce.prompts.tasks import load_task

    tasks = tuple(load_task(path) for path in ladder.task_files)
    examples = held_out_examples(ladder, tasks)[:_TIMED]
    if not examples:
        return {}
    options = RungsOptions(rounds=rounds, tasks=tasks)
    timed = measure_rungs([Path(row["model"]) for row in rows], examples, options)
    for row, rung in zip(rows, timed["rungs"], strict=True):
        row["speed"] = {name: rung[name] for name in _SPEED}
    return {name: value for name, value in timed.items() if name not in ("rungs", "environment")}


def write_table(rows: list[dict[str, Any]]) -> list[str]:
    """Write the table of a ladder in Markdown."""
    columns = sorted(
        {
            (task, metric)
            for row in rows
            for task, metrics in row.get("metrics", {}).items()
            for metric in metrics
        }
    )
    speed = [name for name in _SPEED if "speed" in rows[0]]
    heads = [f"{task} {metric}" for task, metric in columns] + [_SPEED[name] for name in speed]
    lines = [
        f"| rung | parameters | teacher | {' | '.join(heads)} |",
        f"|---|---:|---|{'---:|' * len(heads)}",
    ]
    for row in rows:
        found = [row.get("metrics", {}).get(task, {}).get(metric) for task, metric in columns]
        cells = ["–" if value is None else f"{value:.4f}" for value in found]
        cells += [f"{row['speed'][name]:,.1f}" for name in speed]
        lines.append(
            f"| {row['name']} | {row['parameters']:,} | {row['teacher'] or '–'} | "
            f"{' | '.join(cells)} |"
        )
    return lines
