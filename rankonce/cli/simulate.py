"""``rankonce simulate``: labelled requests of a platform whose truth is known."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from rankonce.errors import DataError


class Part(StrEnum):
    """Parts of the simulated time: the first 70 %, the 15 % after it, and the last 15 %."""

    train = "train"
    valid = "valid"
    test = "test"


class Labels(StrEnum):
    """What stands in ``labels``."""

    drawn = "drawn"
    truth = "truth"
    none = "none"


def simulate(
    task: Annotated[str, typer.Argument(help="Of a simulated platform, e.g. song-newcomer.")],
    out: Annotated[
        Path, typer.Option(dir_okay=False, help="JSON lines, for --data and --examples.")
    ],
    requests: Annotated[
        int, typer.Option(min=1, help="Drawn over the whole time, of which --part is a share.")
    ] = 2000,
    part: Annotated[
        Part | None, typer.Option(help="Only those of this part of the time.", show_default="all")
    ] = None,
    labels: Annotated[
        Labels,
        typer.Option(help="Drawn from the truth, the truth's own probabilities, or none (null)."),
    ] = Labels.drawn,
    history: Annotated[
        int | None,
        typer.Option(min=0, help="Newest events that are kept.", show_default="all"),
    ] = None,
) -> None:
    """Write requests of a simulated platform, in the order of time; always the same ones.

    rankonce simulate song-newcomer --requests 20000 --part train --out train.jsonl
    """
    from dataclasses import asdict, replace

    from rich.console import Console
    from rich.progress import Progress

    from rankonce.datasets.domains import TASK_SOURCES
    from rankonce.datasets.domains.platform import Domain, build_platform

    domain = TASK_SOURCES.get(task)
    if not isinstance(domain, Domain):
        known = [name for name, one in TASK_SOURCES.items() if isinstance(one, Domain)]
        raise DataError(f"task: should be one of {', '.join(known)}, is {task!r}")
    console = Console(stderr=True)
    written = 0
    unfinished = out.with_name(f"{out.name}.part")
    with (
        unfinished.open("w", encoding="utf-8") as file,
        Progress(console=console, disable=not console.is_terminal, transient=True) as progress,
    ):
        bar = progress.add_task("requests", total=requests)
        for one in build_platform(domain).examples(task, requests):
            progress.advance(bar)
            if part is not None and one.split != part.value:
                continue
            known_labels: object = one.example.labels
            if labels is Labels.truth:
                known_labels = one.truth
            elif labels is Labels.none:
                known_labels = [None] * len(one.truth)
            request = one.example.request
            if history is not None:
                events = request.history
                request = replace(request, history=events[max(0, len(events) - history) :])
            record = {**asdict(request), "labels": known_labels}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            written += 1
    unfinished.replace(out)
    typer.echo(f"{out}: {written:,} requests", err=True)
