"""An experiment from its file to its tables, comparisons and pictures.

OUT/experiment.json   the file as it was before the first step, with its rules
OUT/results.parquet   a row a run; OUT/results.xlsx the same, for people
OUT/report.json       comparisons and verdicts; OUT/NAME.png the pictures
OUT/steps/            see ``queue``
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rankonce.distillation.experiments.comparison import (
    Comparer,
    Comparison,
    Verdict,
    judge,
)
from rankonce.distillation.experiments.declaration import Experiment, Value
from rankonce.distillation.experiments.plan import Plan, Run
from rankonce.distillation.experiments.plots import draw_plot
from rankonce.distillation.experiments.queue import RANKONCE, Device, Outcome, run_steps
from rankonce.distillation.experiments.table import (
    check_excel,
    read_path,
    read_rows,
    write_excel,
    write_parquet,
)
from rankonce.distillation.experiments.tracking import Tracker
from rankonce.environment import describe_environment
from rankonce.errors import ExperimentError

Row = Mapping[str, Any]
# What a verdict rests on beside the rules, which may not change at all.
_SETTLED = ("variables", "steps", "measures", "runs", "grid")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What an experiment found.

    Attributes:
        rows: one a run: id, run, the grid's settings, the columns, seconds, commit, failure.
        comparisons: of every other run with the baseline.
        verdicts: one a rule.
    """

    rows: Sequence[Row]
    comparisons: Sequence[Comparison]
    verdicts: Sequence[Verdict]
    changed: Sequence[str] = ()

    @property
    def failures(self) -> list[Row]:
        """The runs that did not finish."""
        return [row for row in self.rows if row["failure"] is not None]


def run_experiment(
    plan: Plan,
    out: Path,
    devices: Sequence[Device],
    *,
    tracker: Tracker | None = None,
    ended: Callable[[Outcome], None] = lambda _: None,
    compared: Callable[[int, int], None] = lambda *_: None,
    program: str = RANKONCE,
) -> Report:
    """Run what has not been run; write a row as soon as a run's last measure has ended.

    Args:
        ended: is told of every step as it ends.
        compared: is told how many files of scores were resampled, of how many.
        program: what the steps' commands are given to, ``module:function``.

    Raises:
        ExperimentError: the folder belongs to another experiment, or a file cannot be written.
    """
    experiment = plan.experiment
    changed = _claim(out, experiment)
    outcomes: dict[str, Outcome] = {}
    rows: dict[str, Row] = {}
    # Rows of an earlier call stand until their turn comes, those of other settings for good.
    table = out / "results.parquet"
    before = read_rows(table) if table.exists() else {}

    def note(outcome: Outcome) -> None:
        outcomes[outcome.step.digest] = outcome
        ended(outcome)
        for run in plan.runs:
            if run.id not in rows and all(one in outcomes for one in run.measures.values()):
                rows[run.id] = _make_row(run, plan, outcomes)
                write_parquet(table, list({**before, **rows}.values()))
                write_excel(out / "results.xlsx", rows[run.id])
                if tracker is not None:
                    tracker.log(rows[run.id], variables=run.variables)

    run_steps(plan.steps, out, devices, ended=note, program=program)
    ordered = [rows[run.id] for run in plan.runs]
    finished = [row for row in ordered if row["failure"] is None]
    for plot in experiment.plots:
        if finished:
            draw_plot(
                out / f"{plot.name}.png",
                plot,
                finished,
                grid=tuple(experiment.grid),
                measured=experiment.columns,
            )
    comparisons, verdicts = _compare(plan, outcomes, compared)
    report = Report(rows=ordered, comparisons=comparisons, verdicts=verdicts, changed=changed)
    record = {"experiment": experiment, **asdict(report), "environment": describe_environment()}
    _write_json(out / "report.json", record)
    return report


def _claim(out: Path, experiment: Experiment) -> tuple[str, ...]:
    """Write the file down before anything runs; what decides may not change after a result.

    Returns:
        What else was changed since: runs that vanished or say something else, other values of
        variables and of the grid, other commands. A verdict is of the file as it is now.
    """
    check_excel()
    out.mkdir(parents=True, exist_ok=True)
    path = out / "experiment.json"
    content = experiment.model_dump(mode="json")
    if path.exists() and next(out.glob("steps/*/step.json"), None) is not None:
        before = json.loads(path.read_text())
        if before["name"] != experiment.name:
            raise ExperimentError(
                f"out: {out} belongs to the experiment {before['name']!r}, this is "
                f"{experiment.name!r}"
            )
        for name in ("rules", "compare", "baseline", "metric"):
            if before[name] != content[name]:
                raise ExperimentError(
                    f"{name}: should be what stood there before the first result ({path}); a new "
                    "decision needs a new folder"
                )
        return tuple(name for name in _SETTLED if not _holds(before[name], content[name]))
    _write_json(path, content)
    return ()


def _holds(before: Any, now: Any) -> bool:
    """Whether all that stood there still does; more may have come."""
    if isinstance(before, Mapping):
        return all(name in now and _holds(one, now[name]) for name, one in before.items())
    if isinstance(before, list):
        return all(one in now for one in before)
    return bool(before == now)


def _make_row(run: Run, plan: Plan, outcomes: Mapping[str, Outcome]) -> Row:
    measured = {name: outcomes[digest] for name, digest in run.measures.items()}
    failure = next((one.failure for one in measured.values() if one.failure is not None), None)
    columns: dict[str, Any] = {}
    for name, path in plan.experiment.columns.items():
        measure, _, rest = path.partition(".")
        if measured[measure].failure is None:
            try:
                columns[name] = read_path(measured[measure].answer, rest)
            except ExperimentError as error:
                failure = failure or str(error)
    needed = _closure(plan, run)
    return {
        "id": run.id,
        "run": run.name,
        **run.settings,
        **columns,
        # Of all steps that the run needed, whichever run they were made for.
        "seconds": round(sum(outcomes[one].seconds for one in needed), 1),
        "commit": ", ".join(sorted({outcomes[one].commit for one in needed} - {""})),
        "variables": json.dumps(run.variables, sort_keys=True),
        "failure": failure,
    }


def _closure(plan: Plan, run: Run) -> set[str]:
    found: set[str] = set()
    open_ = list(run.measures.values())
    while open_:
        digest = open_.pop()
        if digest not in found:
            found.add(digest)
            open_ += plan.steps[digest].needs
    return found


def _compare(
    plan: Plan, outcomes: Mapping[str, Outcome], compared: Callable[[int, int], None]
) -> tuple[list[Comparison], list[Verdict]]:
    experiment = plan.experiment
    if experiment.compare is None:
        return [], []
    found: list[tuple[Run, Path]] = []
    for run in plan.runs:
        outcome = outcomes[run.measures[experiment.compare]]
        path = outcome.folder / "scores.parquet"
        if outcome.failure is None and not path.exists():
            raise ExperimentError(
                f"compare: {experiment.compare} should write {{scores}}; {path} is missing"
            )
        if outcome.failure is None:
            found.append((run, path))

    def scores(where: Mapping[str, Value]) -> dict[tuple[str, str], Path]:
        return {
            (run.name, ", ".join(f"{key}={value}" for key, value in run.settings.items())): path
            for run, path in found
            if where.items() <= run.settings.items()
        }

    def count_settings(where: Mapping[str, Value]) -> int:
        return len(
            {tuple(r.settings.items()) for r in plan.runs if where.items() <= r.settings.items()}
        )

    wanted: list[tuple[str, Mapping[str, Value], str]] = [
        (name, rule.where, rule.metric)
        for rule in experiment.rules
        for name in (rule.run, rule.against)
    ]
    if experiment.baseline is not None:
        wanted += [(str(run["name"]), {}, experiment.metric) for run in experiment.runs]
    files = dict.fromkeys(
        (path, metric)
        for name, where, metric in wanted
        for (one, _), path in scores(where).items()
        if one == name
    )
    comparer = Comparer()
    # Minutes where there are many rows.
    for done, (path, metric) in enumerate(files, start=1):
        comparer.resample(path, metric)
        compared(done, len(files))
    others = [str(run["name"]) for run in experiment.runs if run["name"] != experiment.baseline]
    comparisons = [
        one
        for name in others
        if experiment.baseline is not None
        for one in comparer.compare(name, experiment.baseline, scores({}), metric=experiment.metric)
    ]
    verdicts = [
        judge(
            rule,
            comparer.compare(rule.run, rule.against, scores(rule.where), metric=rule.metric),
            num_settings=count_settings(rule.where),
        )
        for rule in experiment.rules
    ]
    return comparisons, verdicts


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, default=lambda value: value.model_dump(mode="json"))
    part = path.with_suffix(".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)
