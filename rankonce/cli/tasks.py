"""``rankonce tasks``: list the tasks, show one, check a task file."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankonce.cli.options import TaskFileOption

if TYPE_CHECKING:
    from rankonce.prompts.spelling import FieldSpec
    from rankonce.prompts.tasks import Lines, Task

# The moment of the example request; its events lie before it.
_EXAMPLE_TIME = 1_700_000_000


def tasks(
    name: Annotated[str | None, typer.Argument(help="Show this task.")] = None,
    example: Annotated[
        bool, typer.Option("--example", help="Print only an example request, on one line.")
    ] = False,
    check: Annotated[
        Path | None,
        typer.Option("--check", exists=True, dir_okay=False, help="Check this task file."),
    ] = None,
    task_file: TaskFileOption = None,
) -> None:
    """List the tasks, show one, or check a task file.

    rankonce tasks movie-like --example | rankonce score -
    """
    from rankonce.prompts.tasks import find_task, library_tasks, load_task

    if check is not None:
        task = load_task(check)
        typer.echo(f"{check}: task {task.name}, version {task.version}, is valid")
        return
    known = {**library_tasks(), **{task.name: task for task in map(load_task, task_file or ())}}
    if name is None:
        if example:
            raise typer.BadParameter("needs the name of a task", param_hint="--example")
        _print_table(list(known.values()))
        return
    task = find_task(name, known)
    request = example_request(task)
    if example:
        typer.echo(json.dumps(request, ensure_ascii=False))
        return
    typer.echo(_write_yaml(task))
    typer.echo("# A request for it:")
    typer.echo(json.dumps(request, ensure_ascii=False, indent=2))


def example_request(task: "Task") -> dict[str, Any]:
    """Make a request that the task takes: every field once, and once only the required ones."""
    request: dict[str, Any] = {
        "id": "example",
        "task": task.name,
        "time": _EXAMPLE_TIME,
        "profile": _example_fields(task.profile, "profile"),
    }
    if task.history is not None:
        actions = task.history.actions or ("viewed", "chose")
        request["history"] = [
            {
                "item": {
                    "fields": _example_fields(task.history, f"event {place}", whole=place > 1)
                },
                "action": action,
                "time": _EXAMPLE_TIME - 86_400 * 10 ** (len(actions) - place),
            }
            for place, action in enumerate(actions, start=1)
        ]
    request["candidates"] = [
        {
            "id": letter,
            "fields": _example_fields(task.candidate, f"candidate {letter}", whole=whole),
        }
        for letter, whole in (("a", True), ("b", False))
    ]
    return request


def _example_fields(part: "Lines", owner: str, *, whole: bool = True) -> dict[str, Any]:
    return {
        name: _example_value(name, spec, owner)
        for name, spec in part.fields.items()
        if spec.required or whole
    }


def _example_value(name: str, spec: "FieldSpec", owner: str) -> Any:
    words = name.replace("_", " ")
    middle = spec.buckets[len(spec.buckets) // 2] if spec.buckets else None
    values: dict[str, Any] = {
        "text": f"{words} of {owner}",
        "list": [f"first of {words}", f"second of {words}"],
        "count": 42 if middle is None else middle,
        "share": 0.62 if middle is None else middle,
        "percentile": 97 if middle is None else middle,
        "age": 3 * 86_400,
        "number": 0 if middle is None else middle,
    }
    return values[spec.type]


def _print_table(known: "list[Task]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "name", "version", "question", "labels", "ranking value", "required fields", box=None
    )
    for task in known:
        table.add_row(
            task.name,
            str(task.version),
            task.question,
            " ".join(task.label_names),
            describe_ranking(task),
            ", ".join(_required_fields(task)),
        )
    # A row stays one line where a program reads it.
    width = None if sys.stdout.isatty() else 10_000
    Console(width=width, highlight=False, markup=False).print(table)


def describe_ranking(task: "Task") -> str:
    """Say what candidates are ordered by."""
    if task.ranking.kind == "expected_grade":
        return "expected grade"
    return f"log-odds of {task.ranking.label}"


def _required_fields(task: "Task") -> list[str]:
    parts = {"profile": task.profile, "history": task.history, "candidate": task.candidate}
    return [
        f"{part}.{name}"
        for part, lines in parts.items()
        if lines is not None
        for name, spec in lines.fields.items()
        if spec.required
    ]


def _write_yaml(task: "Task") -> str:
    import yaml

    data = task.model_dump(mode="json", exclude_unset=True)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
