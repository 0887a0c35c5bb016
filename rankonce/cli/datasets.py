"""``rankonce datasets``: list the public datasets, download and convert one, make examples."""

import json
import sys
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rankonce.datasets.common_form import Dataset


def datasets(
    name: Annotated[
        str | None,
        typer.Argument(help="Prepare this dataset; amazon-2023:CATEGORY names one category."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False, help="Folder of its tables; downloads go on where they were."
        ),
    ] = None,
    given: Annotated[
        Path | None,
        typer.Option(
            "--from",
            exists=True,
            help="File or folder of the source that is at hand, instead of a download.",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Also print examples of this task as JSON lines, for rankonce train."),
    ] = None,
    max_examples: Annotated[int | None, typer.Option(min=1, help="Print no more.")] = None,
    max_members: Annotated[
        int | None, typer.Option(min=1, help="Make examples of so many members only.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The list, or the manifest, as JSON.")
    ] = False,
) -> None:
    """List the public datasets, or bring one into the common form.

    rankonce datasets ml-1m --out ml-1m
    rankonce datasets mind-small --out mind --task similar-item > examples.jsonl
    """
    if name is None:
        if out is not None or given is not None or task is not None:
            raise typer.BadParameter("is needed with the other options", param_hint="NAME")
        _print_list(as_json)
        return
    if out is None:
        raise typer.BadParameter("is needed to prepare a dataset", param_hint="--out")
    if task is None and (max_examples is not None or max_members is not None):
        raise typer.BadParameter("is needed to make examples", param_hint="--task")
    if task is not None and as_json:
        raise typer.BadParameter("prints examples already", param_hint="--task")
    dataset = _prepare(name, out, given)
    if task is not None:
        _print_examples(dataset, task, max_examples, max_members)
    elif as_json:
        typer.echo(json.dumps(dataset.manifest, indent=2, ensure_ascii=False))
    else:
        for table, facts in dataset.manifest["tables"].items():
            typer.echo(f"{dataset.tables[table]}: {facts['rows']:,} rows")
        for reason, count in dataset.manifest["dropped"].items():
            typer.echo(f"left out: {count:,} {reason}")


def _print_list(as_json: bool) -> None:
    from rankonce.datasets.sources import ADAPTERS

    rows = [
        {
            "name": adapter.name,
            "domain": adapter.domain,
            "size": adapter.size,
            "licence": adapter.licence,
            "address": adapter.page,
            "tasks": list(adapter.tasks),
        }
        for adapter in ADAPTERS.values()
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0], box=None)
    for row in rows:
        table.add_row(
            *(cell if isinstance(cell, str) else ", ".join(cell) for cell in row.values())
        )
    # A row stays one line where a program reads it.
    width = None if sys.stdout.isatty() else 10_000
    Console(width=width, highlight=False, markup=False).print(table)


def _prepare(name: str, out: Path, given: Path | None) -> "Dataset":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TransferSpeedColumn,
    )

    from rankonce.datasets.sources import find_adapter, prepare_dataset

    adapter = find_adapter(name)
    typer.echo(f"{adapter.name}: licence: {adapter.licence}; see {adapter.page}", err=True)
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=Console(stderr=True),
    )
    rows: dict[str, TaskID] = {}

    def show(file: str, done: int, total: int | None) -> None:
        if file not in rows:
            bar.start()
            rows[file] = bar.add_task(file, total=total)
        bar.update(rows[file], completed=done, total=total)

    try:
        return prepare_dataset(adapter, out, given=given, progress=show)
    finally:
        bar.stop()


def _print_examples(
    dataset: "Dataset", task: str, max_examples: int | None, max_members: int | None
) -> None:
    from rankonce.datasets.examples import make_examples
    from rankonce.datasets.rating_examples import ExampleConfig

    config = replace(ExampleConfig(), max_members=max_members)
    for example in islice(make_examples(dataset, task, config), max_examples):
        record = {**asdict(example.request), "labels": example.labels}
        typer.echo(json.dumps(record, ensure_ascii=False))
