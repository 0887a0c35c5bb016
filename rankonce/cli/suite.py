"""``rankonce suite``: every task, its metrics, buckets and arms, as one table and one report."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from rankonce.cli.options import (
    ChatOption,
    DeviceOption,
    KeepOption,
    MaxTokensPerPassOption,
    ModelOption,
    PrecisionOption,
    TaskFileOption,
    TrustRemoteCodeOption,
    load_ranker,
)
from rankonce.errors import DataError, TaskError

# The embedded ranker has no run record; its model card names the task.
_EMBEDDED_TASKS = ("movie-like",)


def suite(
    out: Annotated[
        Path,
        typer.Option(file_okay=False, help="Folder for suite.json, suite.parquet and report.html."),
    ],
    model: ModelOption = None,
    data: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder with MovieLens latest-small, Cranfield or a prepared dataset, itself or "
            "in its folders.",
            show_default="simulated platforms alone",
        ),
    ] = None,
    examples: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="JSON lines of requests with their labels, in place of the library's own data; "
            "may be given several times.",
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Measure this task; may be given several times.", show_default="all"),
    ] = None,
    trained_on: Annotated[
        str | None,
        typer.Option(
            metavar="TASK,...",
            help="Tasks that the model was trained on (T1); the others are T2.",
            show_default="those of its run record",
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Requests scored of each task at most.")] = 200,
    in_context: Annotated[
        str, typer.Option(metavar="N,...", help="Solved candidates in the prompt, an arm each.")
    ] = "2,8",
    history: Annotated[
        str,
        typer.Option(
            metavar="N,...",
            help="Newest events in the prompt, or all, whatever a task's policy takes.",
        ),
    ] = "0,5,20,50,all",
    titles: Annotated[
        bool, typer.Option("--titles/--no-titles", help="Also measure with the titles shuffled.")
    ] = True,
    late_share: Annotated[
        float,
        typer.Option(help="Newest part of the requests that is scored; simulators have their own."),
    ] = 0.15,
    since: Annotated[
        float | None,
        typer.Option(help="Score what was asked from then on (Unix seconds), instead of a share."),
    ] = None,
    num_resamples: Annotated[
        int, typer.Option(min=2, help="Bootstrap samples of members for the standard errors.")
    ] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
    task_file: TaskFileOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    keep: KeepOption = None,
    max_tokens_per_pass: MaxTokensPerPassOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    chat: ChatOption = None,
) -> None:
    """Measure a ranker on every task: later in time, in buckets, and in arms.

    rankonce suite --model DIR --data data/ --out report/
    """
    from rich.console import Console

    from rankonce.evaluation.suite import run_suite
    from rankonce.evaluation.suite_data import TimeCut, example_loaders, library_loaders
    from rankonce.evaluation.suite_html import check_report
    from rankonce.evaluation.suite_report import render_suite, write_suite
    from rankonce.evaluation.suite_results import SuiteConfig

    if data is not None and examples:
        raise typer.BadParameter("is instead of --data", param_hint="--examples")
    config = SuiteConfig(
        examples=_numbers(in_context, "--in-context"),
        history=_event_numbers(history),
        titles=titles,
        num_resamples=num_resamples,
        seed=seed,
    )
    check_report()
    cut = TimeCut(late_share=late_share, since=since, limit=limit)
    if examples:
        from rankonce.training.data import read_examples

        loaders = example_loaders((one for path in examples for one in read_examples(path)), cut)
        left_out: dict[str, str] = {}
        if since is None and late_share < 1:
            typer.echo(
                f"examples: of each task the newest {late_share:.0%} of the requests are scored, "
                "the others are what was known before; --late-share 1 scores all",
                err=True,
            )
    else:
        loaders, left_out = library_loaders(data, cut, seed=seed)
    if task:
        for name in task:
            if name not in loaders:
                raise DataError(
                    f"task: {name}: {left_out.get(name, 'there is no data of this task')}"
                )
        loaders, left_out = {name: loaders[name] for name in task}, {}
    named = None if trained_on is None else [one.strip() for one in trained_on.split(",")]
    ranker = load_ranker(
        model,
        task_files=task_file,
        device=device,
        precision=precision,
        keep=keep,
        max_tokens_per_pass=max_tokens_per_pass,
        prefix_cache_mb=0,
        trust_remote_code=trust_remote_code,
        chat=chat,
    )
    if unknown := sorted(set(named or ()) - {*ranker.tasks, ""}):
        raise TaskError(f"trained-on: no task is called {', '.join(unknown)}")
    from rankonce.training.checkpoint import trained_tasks

    recorded = _EMBEDDED_TASKS if model is None else trained_tasks(Path(model))
    report = run_suite(
        ranker,
        loaders,
        model="embedded ranker" if model is None else ranker.model.name,
        trained_on=recorded if named is None else filter(None, named),
        left_out=left_out,
        config=config,
    )
    write_suite(out, report)
    # A row stays one line where a program reads it.
    width = None if sys.stdout.isatty() else 10_000
    Console(width=width, highlight=False).print(render_suite(report))
    for name, reason in report.left_out.items():
        typer.echo(f"left out: {name}: {reason}", err=True)
    for failed in report.failures:
        typer.echo(f"failed: {failed.task}: {failed.failure}", err=True)
    typer.echo(f"report: {out / 'report.html'}", err=True)
    if report.failures:
        raise typer.Exit(1)


def _numbers(text: str, option: str) -> tuple[int, ...]:
    """Read numbers between commas; none, if there is nothing between them."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise typer.BadParameter("should be numbers like 2,8", param_hint=option) from error


def _event_numbers(text: str) -> tuple[int | None, ...]:
    """Read numbers of events between commas; "all" is None."""
    parts = [part.strip() for part in text.split(",")]
    numbers = _numbers(",".join(part for part in parts if part != "all"), "--history")
    return (*numbers, *[None] * parts.count("all"))
