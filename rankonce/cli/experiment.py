"""``rankonce experiment``: a file of steps, variables and rules, run from end to end."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rankonce.distillation.experiments.comparison import Comparison
    from rankonce.distillation.experiments.plan import Plan
    from rankonce.distillation.experiments.runner import Report


def experiment(
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="YAML; see docs/experiments.md.")
    ],
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Folder of its steps, tables and pictures.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change a variable; may be repeated."),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(
            min=1, help="Steps at a time on the processor.", show_default="one for every GPU, or 1"
        ),
    ] = None,
    mlflow: Annotated[
        str | None, typer.Option(metavar="URI", help="Also log every run to MLflow.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the steps that would be run, and end.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
) -> None:
    """Train, prune, quantise, evaluate and benchmark, as a file says; go on where it stopped.

    rankonce experiment proof.yaml --out runs/proof
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from rankonce.distillation.experiments.declaration import read_experiment
    from rankonce.distillation.experiments.plan import plan_experiment
    from rankonce.distillation.experiments.queue import Outcome, find_devices
    from rankonce.distillation.experiments.runner import run_experiment
    from rankonce.distillation.experiments.tracking import Tracker

    read = read_experiment(file, settings=settings or ())
    plan = plan_experiment(read, commands=_known_commands())
    if dry_run:
        _print_plan(plan, out)
        return
    tracker = Tracker(mlflow, read.name) if mlflow is not None else None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(f"{read.name}: steps", total=len(plan.steps))

        def tell(outcome: Outcome) -> None:
            progress.advance(bar)
            if not outcome.was_known:
                how = f"{outcome.seconds:.0f} s"
                if outcome.failure is not None:
                    how = f"failed: {outcome.failure}"
                typer.echo(f"{outcome.step.name} {outcome.step.digest}: {how}", err=True)

        compared = progress.add_task(f"{read.name}: comparisons", total=None)

        def tell_compared(done: int, total: int) -> None:
            progress.update(compared, completed=done, total=total)

        report = run_experiment(
            plan,
            out,
            find_devices(slots),
            tracker=tracker,
            ended=tell,
            compared=tell_compared,
        )
    if as_json:
        typer.echo((out / "report.json").read_text(), nl=False)
    else:
        _print_report(report)
    typer.echo(f"results: {out / 'results.xlsx'}, {out / 'results.parquet'}", err=True)
    for row in report.failures:
        typer.echo(f"failed: {row['run']} {row['id']}: {row['failure']}", err=True)
    if report.failures:
        raise typer.Exit(1)


def _known_commands() -> Mapping[str, frozenset[str]]:
    """Give the options of every subcommand, those of a group by both words."""
    from typer.main import get_command

    from rankonce.cli import app

    found: dict[str, frozenset[str]] = {}

    def visit(command: object, words: tuple[str, ...]) -> None:
        for name, inner in getattr(command, "commands", {}).items():
            if hasattr(inner, "commands"):
                visit(inner, (*words, name))
            else:
                options = (
                    one for param in inner.params for one in (*param.opts, *param.secondary_opts)
                )
                found[" ".join((*words, name))] = frozenset(options)

    visit(get_command(app), ())
    return found


def _print_plan(plan: "Plan", out: Path) -> None:
    for digest, step in plan.steps.items():
        is_done = (out / "steps" / digest / "step.json").exists()
        state = "done" if is_done else "to run"
        typer.echo(f"{digest}  {state:6}  {step.name}: rankonce {' '.join(step.command)}")
    typer.echo(f"{len(plan.runs)} runs, {len(plan.steps)} steps", err=True)


def _print_report(report: "Report") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=160, highlight=False)
    names = list(dict.fromkeys(name for row in report.rows for name in row if name != "id"))
    table = Table(*names)
    for row in report.rows:
        table.add_row(*(Text(_cell(row.get(name))) for name in names))
    console.print(table)
    for one in report.comparisons:
        console.print(Text(_describe(one)))
    if report.changed:
        console.print(
            Text(
                f"changed since the first result: {', '.join(report.changed)}; the verdicts are of "
                "the file as it is now"
            )
        )
    for verdict in report.verdicts:
        rule = verdict.rule
        answer = {True: "holds", False: "does not hold", None: "undecided: a run is missing"}
        bound = f"above {rule.above}" if rule.above is not None else f"within ±{rule.within}"
        console.print(Text(f"{rule.name} ({bound}): {answer[verdict.holds]}"))
        if verdict.comparison is not None:
            console.print(Text(f"  {_describe(verdict.comparison)}"))


def _describe(one: "Comparison") -> str:
    where = f" at {one.settings}" if one.settings else ""
    spread = f", {one.spread:.4f} between settings" if one.spread is not None else ""
    return (
        f"{one.run} − {one.against}{where}: {one.metric} {one.estimate.value:+.4f} "
        f"(95 % {one.estimate.low:+.4f} to {one.estimate.high:+.4f}; "
        f"90 % {one.low_90:+.4f} to {one.high_90:+.4f}{spread})"
    )


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
