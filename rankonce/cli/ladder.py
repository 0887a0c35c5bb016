"""``rankonce ladder``: smaller rankers rung by rung, each taught by one above it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from rankonce.cli.options import is_first_process, quiet_transformers
from rankonce.cli.training_options import RunFolderOption


def ladder(
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="The rungs, in YAML or TOML.")
    ],
    out: RunFolderOption,
) -> None:
    """Run the rungs of a ladder and print what each is and how good; killed, it goes on.

    rankonce ladder ladder.yaml --out runs/ladder
    """
    from rankonce.distillation.ladder import read_ladder, run_ladder

    quiet_transformers()
    rows = run_ladder(read_ladder(file), out)
    if is_first_process():
        typer.echo("\n".join(write_table(rows)))
        typer.echo(f"table: {out / 'ladder.json'}", err=True)


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
    heads = [f"{task} {metric}" for task, metric in columns]
    lines = [
        f"| rung | parameters | teacher | {' | '.join(heads)} |",
        f"|---|---:|---|{'---:|' * len(heads)}",
    ]
    for row in rows:
        found = [row.get("metrics", {}).get(task, {}).get(metric) for task, metric in columns]
        cells = ["–" if value is None else f"{value:.4f}" for value in found]
        lines.append(
            f"| {row['name']} | {row['parameters']:,} | {row['teacher'] or '–'} | "
            f"{' | '.join(cells)} |"
        )
    return lines
